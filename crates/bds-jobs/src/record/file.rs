//! `RecordFile`: the file of a record, opened or made anew, and its writes.
//!
//! A new record is written under another name, synced, and then gets its own: so a file under that
//! name has a header, and one without was damaged or is another's. Foreign files are never touched.

use std::path::{Path, PathBuf};

use bds_core::{Error, ErrorKind, Result};
use bds_io::{Buf, File, Fs, IoVec, OpenOptions};

use super::format::{FileKind, PAGE_LEN, RecordHeader, RecordPage};

/// Pairs of pages that are read at once.
const READ_PAIRS: u64 = 128;

/// The open file of a record.
#[derive(Clone, Debug)]
pub(super) struct RecordFile {
    fs: Fs,
    path: PathBuf,
    file: File,
}

/// What a file under the record's name turned out to be.
#[derive(Debug)]
pub(super) enum Found {
    Nothing,
    /// A record whose headers are damaged.
    Damaged,
    Record(RecordFile, Box<RecordHeader>),
}

impl RecordFile {
    /// Looks what there is under this name, and changes nothing.
    ///
    /// # Errors
    /// Of the file system; `InvalidInput`: it is no record; `NotSupported`: of another version.
    pub(super) async fn find(fs: &Fs, path: &Path) -> Result<Found> {
        let io = |error| Error::io(error, "cannot open the job's record").file(path);
        match fs.stat(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Found::Nothing);
            }
            Err(error) => return Err(io(error)),
            // Opening a FIFO or a terminal can wait for its other end.
            Ok(stat) if stat.kind != bds_io::FileKind::Regular => return Err(foreign(path)),
            Ok(_) => {}
        }
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = fs.open(path, &options).map_err(io)?;
        let record = Self { fs: fs.clone(), path: path.to_owned(), file };
        let pages =
            [record.read(0, PAGE_LEN).await?, record.read(PAGE_LEN as u64, PAGE_LEN).await?];
        let headers = pages.iter().filter_map(|page| RecordHeader::parse(page));
        if let Some(header) = headers.max_by_key(|header| header.epoch) {
            return Ok(Found::Record(record, Box::new(header)));
        }
        match (FileKind::of(&pages[0]), FileKind::of(&pages[1])) {
            (FileKind::Record, _) | (_, FileKind::Record) => Ok(Found::Damaged),
            (FileKind::OtherVersion(version), _) | (_, FileKind::OtherVersion(version)) => {
                let message = format!("the job's record has version {version}, which is not known");
                Err(Error::new(ErrorKind::NotSupported, message).file(path))
            }
            _ => Err(foreign(path)),
        }
    }

    /// Makes a record with this header, durably, in the place of a damaged one.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) async fn create(fs: &Fs, path: &Path, header: &RecordHeader) -> Result<Self> {
        let io = |error| Error::io(error, "cannot make the job's record").file(path);
        let temporary = temporary_name(path);
        let file = open_new(fs, &temporary).map_err(io)?;
        let record = Self { fs: fs.clone(), path: path.to_owned(), file };
        let written = async {
            record.file.set_len(RecordPage::pair_at(header.pages())).await.map_err(io)?;
            record.write(header.slot(), header.to_page()).await?;
            record.sync().await?;
            fs.replace(&temporary, path).map_err(io)
        };
        if let Err(error) = written.await {
            let _removed = fs.remove(&temporary);
            return Err(error);
        }
        Ok(record)
    }

    /// Passes each page that says something on, and makes what was read durable: a page of which
    /// only the cache knows could turn into an older one.
    ///
    /// # Errors
    /// Of the file.
    pub(super) async fn load(
        &self,
        header: &RecordHeader,
        mut each: impl FnMut(&RecordPage),
    ) -> Result<()> {
        let pages = header.pages();
        let mut number = 0;
        while number < pages {
            let count = READ_PAIRS.min(pages - number);
            let len = usize::try_from(2 * count).expect("at most READ_PAIRS") * PAGE_LEN;
            let bytes = self.read(RecordPage::pair_at(number), len).await?;
            for (number, pair) in (number..).zip(bytes.chunks(2 * PAGE_LEN)) {
                if let Some(page) = RecordPage::newest(pair, &header.id, number) {
                    each(&page);
                }
            }
            number += count;
        }
        self.sync().await
    }

    pub(super) async fn write_page(&self, page: &RecordPage, id: &[u8; 16]) -> Result<()> {
        self.write(page.at(), page.to_bytes(id)).await
    }

    pub(super) async fn write_header(&self, header: &RecordHeader) -> Result<()> {
        self.write(header.slot(), header.to_page()).await
    }

    pub(super) async fn sync(&self) -> Result<()> {
        let synced = self.file.sync_data().await;
        synced.map_err(|error| Error::io(error, "cannot flush the job's record").file(&self.path))
    }

    /// Removes the file, durably.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn remove(&self) -> Result<()> {
        let removed = self.fs.remove(&self.path).and_then(|()| self.fs.sync_name(&self.path));
        removed.map_err(|error| Error::io(error, "cannot remove the job's record").file(&self.path))
    }

    /// Reads `len` bytes; those behind the end are zeros.
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(len, PAGE_LEN).iov();
        let mut done = 0;
        while done < len {
            let count = self.file.read(offset + done as u64, buf.slice(done..len)).await;
            let io = |error| Error::io(error, "cannot read the job's record").file(&self.path);
            match count.map_err(io)? {
                0 => break,
                count => done += count,
            }
        }
        Ok(buf.to_vec(0..len))
    }

    async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        write_all(&self.file, offset, bytes, "the job's record")
            .await
            .map_err(|e| e.file(&self.path))
    }
}

async fn write_all(file: &File, offset: u64, bytes: Vec<u8>, what: &str) -> Result<()> {
    let len = bytes.len();
    let iov = IoVec::from(bytes);
    let mut done = 0;
    while done < len {
        let count = file.write(offset + done as u64, iov.slice(done..len), false).await;
        match count.map_err(|error| Error::io(error, format!("cannot write {what}")))? {
            0 => return Err(Error::new(ErrorKind::Io, format!("{what} takes no more bytes"))),
            count => done += count,
        }
    }
    Ok(())
}

/// Writes a whole file that is there afterwards, durably, or is what it was.
///
/// # Errors
/// Of the file system.
pub(super) async fn write_file(fs: &Fs, path: &Path, bytes: Vec<u8>, what: &str) -> Result<()> {
    let io = |error| Error::io(error, format!("cannot write {what}")).file(path);
    let temporary = temporary_name(path);
    let file = open_new(fs, &temporary).map_err(io)?;
    let written = async {
        write_all(&file, 0, bytes, what).await.map_err(|error| error.file(path))?;
        file.sync_data().await.map_err(io)?;
        fs.replace(&temporary, path).map_err(io)
    };
    let written = written.await;
    if written.is_err() {
        let _removed = fs.remove(&temporary);
    }
    written
}

/// A name beside `path` that no other process uses for this.
fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    name.into()
}

/// Makes a file under a temporary name, in the place of one that an ended process left.
fn open_new(fs: &Fs, path: &Path) -> std::io::Result<File> {
    match fs.remove(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let options =
        OpenOptions { write: true, create: true, exclusive: true, ..OpenOptions::default() };
    fs.open(path, &options)
}

fn foreign(path: &Path) -> Error {
    let message = "there is a file that is no record of a job: name another record, or remove it";
    Error::new(ErrorKind::InvalidInput, message).file(path)
}

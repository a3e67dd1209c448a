//! `ManifestPlan`: the checked options of a manifest, and the files that they name.

use std::path::{Path, PathBuf};

use bds_core::{Error, ErrorKind, Result};
use bds_io::{Buf, Fs, OpenOptions};

use super::format::CHUNK_BITS;
use super::options::{ManifestOptions, wrong};
use crate::manifest::{ContentHash, MAX_NOTE_LEN, Manifest};

/// Longest manifest that is read, in bytes: that of 8 TiB.
const MAX_LEN: u64 = 4 << 30;

/// The manifest that a job writes.
#[derive(Debug)]
pub(super) struct ManifestPlan {
    pub(super) path: PathBuf,
    pub(super) base: Option<Manifest>,
    pub(super) note: String,
}

impl ManifestPlan {
    /// Checks the options; `len`: bytes of the image.
    pub(super) async fn new(fs: &Fs, options: &ManifestOptions, len: u64) -> Result<Self> {
        if options.note.len() > MAX_NOTE_LEN {
            return wrong(format!("a manifest's note is at most {MAX_NOTE_LEN} bytes long"));
        }
        check_replaceable(fs, &options.path).await?;
        let base = match &options.base {
            Some(path) => Some(read_manifest(fs, path).await.map_err(|error| error.file(path))?),
            None => None,
        };
        if let Some(base) = &base
            && (base.chunk_len() != 1 << CHUNK_BITS || base.len() > len)
        {
            let words = "the base's manifest has another chunk size, or is of a longer image";
            return wrong(words).map_err(|error: Error| match &options.base {
                Some(path) => error.file(path),
                None => error,
            });
        }
        Ok(Self { path: options.path.clone(), base, note: options.note.clone() })
    }

    /// The hash of a chunk that was not copied, from the base's manifest.
    pub(super) fn of_base(&self, index: u64, len: u64) -> Option<ContentHash> {
        let base = self.base.as_ref()?;
        let is_whole = base.len() == len || (index + 1) << CHUNK_BITS <= base.len();
        is_whole.then(|| base.hashes().get(usize::try_from(index).ok()?).copied())?
    }
}

/// Checks that nothing but an older manifest has this name.
async fn check_replaceable(fs: &Fs, path: &Path) -> Result<()> {
    match fs.stat(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(error, "cannot look at the manifest").file(path)),
        Ok(_) => {}
    }
    match read_manifest(fs, path).await {
        Ok(_) => Ok(()),
        Err(_) => {
            let words = "there is a file that is no manifest: name another one, or remove it";
            Err(Error::new(ErrorKind::AlreadyExists, words).file(path))
        }
    }
}

async fn read_manifest(fs: &Fs, path: &Path) -> Result<Manifest> {
    let io = |error| Error::io(error, "cannot read the manifest");
    let is_file = fs.stat(path).map_err(io)?.kind == bds_io::FileKind::Regular;
    let file = match is_file {
        true => fs.open(path, &OpenOptions::default()).map_err(io)?,
        // Reading a FIFO or a terminal would wait for its writer.
        false => return Err(Error::new(ErrorKind::InvalidImage, "this is not a manifest")),
    };
    let len = file.len().map_err(io)?;
    let Some(len) = usize::try_from(len).ok().filter(|len| *len as u64 <= MAX_LEN) else {
        return Err(Error::new(ErrorKind::InvalidImage, "this is not a manifest"));
    };
    let buf = Buf::zeroed(len.max(1), 1).iov();
    let mut done = 0;
    while done < len {
        match file.read(done as u64, buf.slice(done..len)).await.map_err(io)? {
            0 => break,
            count => done += count,
        }
    }
    Manifest::parse(&buf.to_vec(0..done))
}

//! Looking at a file before a driver opens it: what sort of thing it is, which file, what its first bytes resemble.
//!
//! Reads only, takes no lock, and is over before anything is opened.

use std::path::{Path, PathBuf};

use bds_io::{File, FileKind, FileLook, Fs, IoVec, OpenOptions};

use super::Graph;
use crate::driver::{Candidate, PROBE_LEN, Registry, probe};
use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;

/// What a file looks like. A guess: see [`crate::driver::probe`] for what it must not be used for.
#[derive(Clone, Debug)]
pub struct FileGuess {
    /// The protocol that opens it: `file` or `host_device`.
    pub protocol: &'static str,
    /// The formats it may hold, the surest first.
    pub formats: Vec<Candidate>,
}

impl Graph {
    /// Guesses what lies in a file.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// # let path = std::env::temp_dir().join(format!("bds-guess-{}", std::process::id()));
    /// std::fs::write(&path, "hello").expect("there is room");
    /// let guess = graph.guess_file(&path).await?;
    /// assert_eq!(guess.protocol, "file");
    /// assert!(guess.formats.is_empty(), "no driver here knows the bytes again");
    /// # std::fs::remove_file(&path).expect("it is ours");
    /// # Ok(()) });
    /// ```
    pub async fn guess_file(&self, path: &Path) -> Result<FileGuess> {
        let file = Inspected::new(&self.config().fs, path.to_owned())?;
        let formats = file.guess(&self.config().registry).await?;
        Ok(FileGuess { protocol: file.protocol(), formats })
    }
}

/// A file that was looked at. Not open: a chain of images would hold two descriptors of each.
pub(super) struct Inspected {
    fs: Fs,
    path: PathBuf,
    kind: FileKind,
    identity: (u64, u64),
}

impl Inspected {
    pub(super) fn new(fs: &Fs, path: PathBuf) -> Result<Self> {
        match fs.look(&path) {
            Ok(FileLook { kind, identity }) => Ok(Self { fs: fs.clone(), path, kind, identity }),
            Err(error) => Err(Error::io(error, "cannot open").file(path)),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// (device, inode).
    pub(super) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    pub(super) fn protocol(&self) -> &'static str {
        match self.kind {
            FileKind::Block | FileKind::Char => "host_device",
            _ => "file",
        }
    }

    /// What opens it as a protocol node.
    pub(super) fn options(&self) -> Options {
        file_options(self.protocol(), &self.path)
    }

    pub(super) async fn guess(&self, registry: &Registry) -> Result<Vec<Candidate>> {
        let file = self.open()?;
        let head = self.head(&file).await?;
        let len = file
            .len()
            .map_err(|error| Error::io(error, "cannot tell the length").file(&self.path))?;
        Ok(probe(registry, &head, len))
    }

    /// Opens what holds bytes at offsets. Anything else, a FIFO for example, could make a reader wait for ever.
    fn open(&self) -> Result<File> {
        let no_image = |kind: FileKind| {
            let words = format!(
                "{}, which holds no image: name a regular file or a block device",
                kind.describe()
            );
            Error::new(ErrorKind::InvalidInput, words).file(&self.path)
        };
        if !self.kind.is_seekable() {
            return Err(no_image(self.kind));
        }
        let file = self
            .fs
            .open(&self.path, &OpenOptions::default())
            .map_err(|error| Error::io(error, "cannot open").file(&self.path))?;
        if file.kind().is_seekable() { Ok(file) } else { Err(no_image(file.kind())) }
    }

    async fn head(&self, file: &File) -> Result<Vec<u8>> {
        let iov = IoVec::from(vec![0; PROBE_LEN]);
        let mut filled = 0;
        while filled < PROBE_LEN {
            let offset = filled as u64;
            let rest = iov.slice(filled..PROBE_LEN);
            let count = file
                .read(offset, rest)
                .await
                .map_err(|error| Error::io(error, "cannot read").file(&self.path).at(offset))?;
            if count == 0 {
                break;
            }
            filled += count;
        }
        let mut head = vec![0; filled];
        iov.copy_to(0, &mut head);
        Ok(head)
    }
}

/// Options that open a file by name, whatever characters it holds.
pub(super) fn file_options(protocol: &str, path: &Path) -> Options {
    let mut options = Options::new().with("driver", protocol);
    options.set_path("filename", path);
    options
}

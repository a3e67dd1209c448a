//! Inspects a file before a driver opens it: its kind, its identity, and the formats that its first
//! bytes resemble.
//!
//! Reads only, takes no lock, and is over before anything is opened.

use std::path::{Path, PathBuf};

use bds_io::{File, FileKind, FileStat, Fs, IoVec, OpenOptions};

use crate::driver::{Candidate, PROBE_LEN, Registry, TAIL_LEN, foreign_format, probe};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::options::Options;

/// The guessed protocol and format of a file. See [`crate::driver::probe`] for what it must not be
/// used for.
#[derive(Clone, Debug)]
pub struct FileGuess {
    /// The protocol that opens it: `file` or `host_device`.
    pub protocol: &'static str,
    /// The formats it may hold, the surest first.
    pub formats: Vec<Candidate>,
    /// A format that no driver here reads, if the file is marked as one and no driver is sure that
    /// it is its own.
    pub foreign: Option<&'static str>,
}

/// From this score on a driver has seen a mark of its format, and not just found nothing against
/// it.
const SURE_SCORE: u8 = 2;

impl FileGuess {
    /// The format to open the file with when none was named.
    ///
    /// # Errors
    /// `NotSupported`, with its name, for a format that is not read here: it must not pass for raw.
    pub fn best(&self) -> Result<&'static str> {
        match self.foreign {
            None => Ok(self.formats.first().map_or("raw", |best| best.driver)),
            Some(name) => Err(Error::new(
                ErrorKind::NotSupported,
                format!(
                    "this looks like {name}, which is not a format that is read here; convert or \
                     unpack it with another tool, or say that its format is raw (-f raw) to take its \
                     bytes as they are"
                ),
            )),
        }
    }
}

impl Graph {
    /// Guesses protocol and format of a file.
    ///
    /// ```
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// # let path = std::env::temp_dir().join(format!("bds-guess-{}", std::process::id()));
    /// std::fs::write(&path, "hello").expect("a writable directory");
    /// let guess = graph.guess_file(&path).await?;
    /// assert_eq!(guess.protocol, "file");
    /// assert_eq!(guess.formats[0].driver, "raw", "no other driver knows these bytes");
    /// assert_eq!(guess.best()?, "raw");
    /// std::fs::write(&path, "vhdxfile").expect("a writable directory");
    /// assert!(graph.guess_file(&path).await?.best().is_err(), "a container is no raw disk");
    /// # std::fs::remove_file(&path).expect("it is ours");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn guess_file(&self, path: &Path) -> Result<FileGuess> {
        let file = Inspected::new(&self.config().fs, path.to_owned())?;
        file.guess(&self.config().registry).await
    }
}

/// An inspected file. Not open: a chain of images would hold two descriptors of each.
pub(in crate::graph) struct Inspected {
    fs: Fs,
    path: PathBuf,
    kind: FileKind,
    identity: (u64, u64),
}

impl Inspected {
    pub(in crate::graph) fn new(fs: &Fs, path: PathBuf) -> Result<Self> {
        match fs.stat(&path) {
            Ok(FileStat { kind, identity, .. }) => {
                Ok(Self { fs: fs.clone(), path, kind, identity })
            }
            Err(error) => Err(Error::io(error, "cannot open").file(path)),
        }
    }

    pub(in crate::graph) fn path(&self) -> &Path {
        &self.path
    }

    /// (device, inode).
    pub(in crate::graph) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    pub(in crate::graph) fn protocol(&self) -> &'static str {
        match self.kind {
            FileKind::Block | FileKind::Char => "host_device",
            _ => "file",
        }
    }

    /// The options that open it as a protocol node.
    pub(in crate::graph) fn options(&self) -> Options {
        file_options(self.protocol(), &self.path)
    }

    pub(in crate::graph) async fn guess(&self, registry: &Registry) -> Result<FileGuess> {
        let file = self.open()?;
        let head = self.part(&file, 0, PROBE_LEN).await?;
        let len = file
            .len()
            .map_err(|error| Error::io(error, "cannot tell the length").file(&self.path))?;
        let tail = self.part(&file, len.saturating_sub(TAIL_LEN as u64), TAIL_LEN).await?;
        let formats = probe(registry, &head, len);
        let is_known = formats.first().is_some_and(|best| best.score >= SURE_SCORE);
        let foreign = if is_known { None } else { foreign_format(&head, &tail) };
        Ok(FileGuess { protocol: self.protocol(), formats, foreign })
    }

    /// Opens a seekable file. Any other kind, a FIFO for example, could make a reader wait for
    /// ever.
    fn open(&self) -> Result<File> {
        let no_image = |kind: FileKind| {
            let message = format!(
                "{}, which holds no image: name a regular file or a block device",
                kind.describe()
            );
            Error::new(ErrorKind::InvalidInput, message).file(&self.path)
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

    /// At most `len` bytes from `begin`, as far as the file has them.
    async fn part(&self, file: &File, begin: u64, len: usize) -> Result<Vec<u8>> {
        let iov = IoVec::from(vec![0; len]);
        let mut filled = 0;
        while filled < len {
            let offset = begin + filled as u64;
            let rest = iov.slice(filled..len);
            let count = file
                .read(offset, rest)
                .await
                .map_err(|error| Error::io(error, "cannot read").file(&self.path).at(offset))?;
            if count == 0 {
                break;
            }
            filled += count;
        }
        Ok(iov.to_vec(0..filled))
    }
}

/// Options that open a file by name, whatever characters it holds.
pub(in crate::graph) fn file_options(protocol: &str, path: &Path) -> Options {
    let mut options = Options::new().with("driver", protocol);
    options.set_path("filename", path);
    options
}

//! Reference gates: decide whether a file named inside an image may be opened.
//!
//! An image may be hostile, so a name in it must be allowed before it is followed. Every such name
//! goes through the graph's one gate, and stays a file name there: it is never read as a URL, as
//! `json:` or as options. The gates here refuse what QEMU would read so (`nbd:…`); a caller's own
//! gate may name a file or node for it. The format comes from the image or from the gate; it is
//! guessed only if the gate says so.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bds_io::Fs;

use crate::driver::ReferenceKind;

/// The question to a gate: which name, in which image.
#[derive(Clone, Copy, Debug)]
pub struct GateQuestion<'a> {
    /// The kind of reference.
    pub kind: ReferenceKind,
    /// The name as stored.
    pub stored_name: &'a OsStr,
    /// The format as stored, if any.
    pub stored_format: Option<&'a str>,
    /// The number of such references between the node the user opened and the image that holds the
    /// name; 0: that node itself.
    pub depth: usize,
    /// The node whose image holds the name.
    pub parent_node: &'a str,
    /// The file that holds the image, if it lies in one.
    pub parent_file: Option<&'a Path>,
    /// The file that the stored name means to QEMU: see [`resolve`].
    pub resolved: &'a Path,
    /// Where names are looked up.
    pub fs: &'a Fs,
}

impl GateQuestion<'_> {
    /// The part in front of a colon that QEMU would read as a protocol (`nbd`, `json`): then the
    /// stored name is no file name. `file` does not count.
    pub fn scheme(&self) -> Option<String> {
        let name = self.stored_name.as_bytes();
        let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
        let is_scheme = name[end] == b':' && &name[..end] != b"file";
        is_scheme.then(|| String::from_utf8_lossy(&name[..end]).into_owned())
    }

    /// The refusal of a name that is no file name.
    fn refuse_scheme(&self) -> Option<GateDecision> {
        let scheme = self.scheme()?;
        Some(GateDecision::Refuse(format!(
            "unknown protocol '{scheme}' (a file of this name is stored as ./{})",
            self.stored_name.display()
        )))
    }
}

/// How the format of a referenced image is found. A data file has none and ignores this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReferenceFormat {
    /// As the image says; refused if it does not say.
    Stored,
    /// This one, whatever the image says.
    Named(String),
    /// As the image says, else guessed from the bytes. A writer of the referenced file can then
    /// choose how it is read.
    StoredOrProbed,
}

/// The gate's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GateDecision {
    /// Open this file.
    Open {
        /// Its path.
        path: PathBuf,
        /// Its format.
        format: ReferenceFormat,
    },
    /// Use this node, which is open already.
    Node(String),
    /// Do not open it, and fail; the text says why and what to do.
    Refuse(String),
}

/// Decides about files named inside images.
pub trait ReferenceGate: Send + Sync + 'static {
    /// May it be opened, and how? Must not block for long.
    fn decide(&self, question: &GateQuestion<'_>) -> GateDecision;
}

impl fmt::Debug for dyn ReferenceGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReferenceGate")
    }
}

/// Refuses everything. The default.
#[derive(Clone, Copy, Debug, Default)]
pub struct DenyAll;

impl ReferenceGate for DenyAll {
    fn decide(&self, _question: &GateQuestion<'_>) -> GateDecision {
        GateDecision::Refuse("files named inside images are not opened here".to_owned())
    }
}

/// Allows exactly the stored names it was given, each as given.
#[derive(Clone, Debug, Default)]
pub struct Explicit {
    map: HashMap<OsString, GateDecision>,
}

impl Explicit {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// A stored name stands for this file, in this format (for a data file the format does not
    /// matter).
    #[must_use]
    pub fn file(
        mut self,
        stored_name: impl Into<OsString>,
        path: impl Into<PathBuf>,
        format: &str,
    ) -> Self {
        let format = ReferenceFormat::Named(format.to_owned());
        self.map.insert(stored_name.into(), GateDecision::Open { path: path.into(), format });
        self
    }

    /// A stored name stands for this node.
    #[must_use]
    pub fn node(mut self, stored_name: impl Into<OsString>, node_name: &str) -> Self {
        self.map.insert(stored_name.into(), GateDecision::Node(node_name.to_owned()));
        self
    }
}

impl ReferenceGate for Explicit {
    fn decide(&self, question: &GateQuestion<'_>) -> GateDecision {
        self.map.get(question.stored_name).cloned().unwrap_or_else(|| {
            GateDecision::Refuse("the name is not on the caller's list".to_owned())
        })
    }
}

/// Allows files that lie beside the image: a plain name without directories, and no symbolic link.
#[derive(Clone, Copy, Debug, Default)]
pub struct SameDirectory;

impl ReferenceGate for SameDirectory {
    fn decide(&self, question: &GateQuestion<'_>) -> GateDecision {
        if let Some(refusal) = question.refuse_scheme() {
            return refusal;
        }
        let stored = Path::new(question.stored_name);
        let mut parts = stored.components();
        let is_plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
            && !question.stored_name.as_bytes().contains(&b'/');
        if !is_plain {
            return GateDecision::Refuse(
                "only a plain file name beside the image is allowed".into(),
            );
        }
        let Some(directory) = question.parent_file.map(directory_of) else {
            return GateDecision::Refuse("the image lies in no directory".into());
        };
        // Not `resolved`: a data file is beside the image here whatever the working directory is.
        let real = match question.fs.canonicalize(&directory.join(stored)) {
            Ok(real) => real,
            Err(error) => return GateDecision::Refuse(format!("it cannot be looked up: {error}")),
        };
        let directory = real_directory(question.fs, &directory);
        if real != directory.join(stored) {
            return GateDecision::Refuse(
                "it is a symbolic link; only a file beside the image is allowed".into(),
            );
        }
        GateDecision::Open { path: real, format: ReferenceFormat::Stored }
    }
}

/// Allows files below given directories, after links are resolved. A process that can change those
/// directories while an image is opened can redirect it: the roots must belong to the caller.
#[derive(Clone, Debug, Default)]
pub struct UnderRoots {
    roots: Vec<PathBuf>,
}

impl UnderRoots {
    /// Files below any of these directories.
    pub fn new(roots: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self { roots: roots.into_iter().map(Into::into).collect() }
    }
}

impl ReferenceGate for UnderRoots {
    fn decide(&self, question: &GateQuestion<'_>) -> GateDecision {
        if let Some(refusal) = question.refuse_scheme() {
            return refusal;
        }
        let real = match question.fs.canonicalize(question.resolved) {
            Ok(real) => real,
            Err(error) => return GateDecision::Refuse(format!("it cannot be looked up: {error}")),
        };
        let is_inside =
            self.roots.iter().any(|root| real.starts_with(real_directory(question.fs, root)));
        if is_inside {
            GateDecision::Open { path: real, format: ReferenceFormat::Stored }
        } else {
            GateDecision::Refuse("it lies outside the directories that are allowed".into())
        }
    }
}

/// Allows every file name. For trusted images, and for tools that replace qemu-img.
#[derive(Clone, Copy, Debug, Default)]
pub struct TrustAll {
    /// Guess the format of a backing file whose image does not say it.
    pub may_probe: bool,
}

impl ReferenceGate for TrustAll {
    fn decide(&self, question: &GateQuestion<'_>) -> GateDecision {
        if let Some(refusal) = question.refuse_scheme() {
            return refusal;
        }
        let format =
            if self.may_probe { ReferenceFormat::StoredOrProbed } else { ReferenceFormat::Stored };
        GateDecision::Open { path: question.resolved.to_owned(), format }
    }
}

/// A directory with its links resolved; one that does not exist as itself, which no real file is
/// below (a simulated disk has no directories, only names).
fn real_directory(fs: &Fs, directory: &Path) -> PathBuf {
    fs.canonicalize(directory).unwrap_or_else(|_| directory.to_owned())
}

/// The directory in which names stored in `file` are looked up.
fn directory_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The path a stored name means to QEMU. A relative name of a backing file starts at the directory
/// of the image that holds it. That of a data file, and one with `file:` in front, starts at the
/// working directory of the process, as on a command line.
pub fn resolve(
    kind: ReferenceKind,
    stored_name: impl AsRef<OsStr>,
    parent_file: Option<&Path>,
) -> PathBuf {
    let bytes = stored_name.as_ref().as_bytes();
    let (stored, is_typed) = match bytes.strip_prefix(b"file:") {
        Some(rest) => (rest, true),
        None => (bytes, false),
    };
    let stored = Path::new(OsStr::from_bytes(stored));
    match parent_file.and_then(Path::parent) {
        Some(directory) if kind == ReferenceKind::Backing && !is_typed && stored.is_relative() => {
            directory.join(stored)
        }
        _ => stored.to_owned(),
    }
}

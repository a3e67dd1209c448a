//! Contexts that a driver gets to open a node or to create an image, with the options common to all
//! drivers.

use std::ffi::OsString;
use std::fmt;

use bds_io::Fs;

use super::{BoxFuture, Child};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventSender;
use crate::options::Options;

bitflags::bitflags! {
    /// Role of a child in its parent. At most one each of `PRIMARY`, `COW`, `FILTERED`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Role: u32 {
        /// Holds guest data.
        const DATA = 1;
        /// Holds the format's metadata.
        const METADATA = 2;
        /// Shown unchanged by a filter.
        const FILTERED = 4;
        /// Shown where this node has nothing (backing).
        const COW = 8;
        /// The one that stands for the node's file.
        const PRIMARY = 16;
    }
}

/// Cache mode: QEMU's three switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheMode {
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Ignore flushes: fast, and unsafe at a power cut.
    pub no_flush: bool,
    /// False: every write is followed by a flush (for the user at the top).
    pub writeback: bool,
}

impl Default for CacheMode {
    fn default() -> Self {
        Self { direct: false, no_flush: false, writeback: true }
    }
}

impl CacheMode {
    /// Parses qemu-img's names: none, writeback, writethrough, directsync, unsafe.
    pub fn parse(word: &str) -> Option<Self> {
        let (direct, no_flush, writeback) = match word {
            "none" | "off" => (true, false, true),
            "writeback" => (false, false, true),
            "writethrough" => (false, false, false),
            "directsync" => (true, false, false),
            "unsafe" => (false, true, true),
            _ => return None,
        };
        Some(Self { direct, no_flush, writeback })
    }
}

/// What is done with writes of zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DetectZeroes {
    /// Nothing.
    #[default]
    Off,
    /// They become zero writes.
    On,
    /// They become zero writes that may unmap.
    Unmap,
}

/// Flags a node is opened with: the options common to all drivers, which the graph parses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// No byte is ever written.
    pub read_only: bool,
    /// Read-only is fine if the host does not allow writing.
    pub auto_read_only: bool,
    /// Header and directory structures only: no references, no locks, no repair.
    pub info_only: bool,
    /// For `check`: open what a normal open would refuse as inconsistent.
    pub for_check: bool,
    /// Do not take "others must not" locks, and share everything (qemu-img -U).
    pub force_share: bool,
    /// Lets no other program write to any of the files meanwhile, not even to pure data files,
    /// which a reader otherwise shares (qemu-img convert). No effect with `force_share`.
    pub refuse_writers: bool,
    /// Caches.
    pub cache: CacheMode,
    /// Pass discards down (discard=unmap).
    pub discard: bool,
    /// Zero detection.
    pub detect_zeroes: DetectZeroes,
    /// Inserted by a job: left out where a device's images are listed.
    pub is_implicit: bool,
    /// Role in the parent it is opened for; empty when it is opened on its own. A protocol derives
    /// its image locks from it: a format that keeps metadata in a file shares it with no other
    /// writer.
    pub role: Role,
}

/// Kind of a reference stored in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReferenceKind {
    /// A backing file.
    Backing,
    /// An external data file.
    DataFile,
}

/// A reference to a file, stored in an image. The reference gate decides whether it is opened.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Its purpose.
    pub kind: ReferenceKind,
    /// The name as stored: a file name, never read as a URL or `json:`.
    pub stored_name: OsString,
    /// The format as stored, if any.
    pub stored_format: Option<String>,
}

/// A request to open one child.
#[derive(Clone, Debug)]
pub struct ChildRequest {
    /// The child's name, which is also the option's ("file", "backing", "data-file").
    pub name: &'static str,
    /// Its role in its parent.
    pub role: Role,
    /// The option's value, if the user gave one: a node name or a tree.
    pub option: Option<serde_json::Value>,
    /// The reference stored in the image, if the option is not given.
    pub reference: Option<Reference>,
}

/// Opens children for a driver. Implemented by the graph.
pub trait ChildOpener: Send {
    /// `Ok(None)` if there is neither option nor reference, or the option is null.
    fn open_child<'a>(&'a mut self, request: ChildRequest) -> BoxFuture<'a, Result<Option<Child>>>;
}

/// Context in which a driver opens a node.
pub struct OpenContext<'a> {
    /// The node's name.
    pub node_name: &'a str,
    /// The driver's own options; it takes what it knows, the graph refuses the rest.
    pub options: Options,
    /// The common ones.
    pub flags: OpenFlags,
    /// Resolves file names.
    pub fs: &'a Fs,
    /// Sends events of the node.
    pub events: EventSender,
    opener: &'a mut dyn ChildOpener,
}

impl fmt::Debug for OpenContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenContext").field("node_name", &self.node_name).finish_non_exhaustive()
    }
}

impl<'a> OpenContext<'a> {
    /// Made by the graph.
    pub fn new(
        node_name: &'a str,
        options: Options,
        flags: OpenFlags,
        fs: &'a Fs,
        opener: &'a mut dyn ChildOpener,
    ) -> Self {
        Self { node_name, options, flags, fs, events: EventSender::default(), opener }
    }

    /// Opens the child that the option `name` describes; it must be given.
    pub async fn child(&mut self, name: &'static str, role: Role) -> Result<Child> {
        let option = self.options.take(name);
        let request = ChildRequest { name, role, option, reference: None };
        self.opener.open_child(request).await?.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("option '{name}' is missing: name a node or describe one"),
            )
            .node(self.node_name)
        })
    }

    /// Opens the child that the option `name` describes, or else the one that the image refers to.
    pub async fn reference(
        &mut self,
        name: &'static str,
        role: Role,
        reference: Option<Reference>,
    ) -> Result<Option<Child>> {
        let option = self.options.take(name);
        self.opener.open_child(ChildRequest { name, role, option, reference }).await
    }
}

/// Context in which a format creates an image.
#[derive(Debug)]
pub struct CreateContext<'a> {
    /// The file to hold it: writable, resizable, empty.
    pub file: Child,
    /// The external data file, if the options name one (opened by the caller).
    pub data_file: Option<Child>,
    /// Length of the backing image in bytes, if one is named and could be opened.
    pub backing_len: Option<u64>,
    /// The format's create options (`size` among them); it takes what it knows, the caller refuses
    /// the rest.
    pub options: &'a mut Options,
}

//! Reopens a driver with other options and flags: prepared first, then committed or dropped.
//!
//! ```text
//! prepare_reopen ──► Reopen ──► commit     cannot fail, cannot wait
//!                       └─────► drop       nothing has changed
//! ```

use std::fmt;

use bds_io::Fs;

use super::OpenFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;

/// Context in which a driver prepares a reopen.
pub struct ReopenContext<'a> {
    /// The present flags of the node.
    pub current: OpenFlags,
    /// The new flags.
    pub flags: OpenFlags,
    /// The driver's own options that get another value; the others stay. It takes those it can
    /// change while it is open, the graph refuses the rest.
    pub options: Options,
    /// Resolves file names.
    pub fs: &'a Fs,
}

impl fmt::Debug for ReopenContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { current, flags, options, .. } = self;
        let mut out = f.debug_struct("ReopenContext");
        out.field("current", current).field("flags", flags).field("options", options).finish()
    }
}

/// A prepared reopen of a driver. Dropped: nothing has changed.
pub trait Reopen: Send {
    /// Takes effect. Cannot fail, does not wait.
    fn commit(self: Box<Self>);

    /// True if the node will be read-only although the flags say otherwise (`auto_read_only`).
    fn is_read_only(&self) -> bool {
        false
    }

    /// The new [`super::Limits::request_alignment`], if it will differ. The reopen is refused if a
    /// user does not support it.
    fn request_alignment(&self) -> Option<u32> {
        None
    }
}

/// For drivers that have nothing to change.
impl Reopen for () {
    fn commit(self: Box<Self>) {}
}

/// The default of [`super::Driver::prepare_reopen`].
pub(super) fn by_default<'a>(
    driver: &str,
    context: &ReopenContext<'_>,
) -> Result<Box<dyn Reopen + 'a>> {
    let ReopenContext { current, flags, .. } = context;
    let words = if current.read_only != flags.read_only {
        "cannot be switched between read-only and writable while it is open"
    } else if current.cache.direct != flags.cache.direct {
        "cannot change 'cache.direct' while it is open"
    } else {
        return Ok(Box::new(()));
    };
    Err(Error::new(ErrorKind::NotSupported, format!("a {driver} node {words}; open it anew")))
}

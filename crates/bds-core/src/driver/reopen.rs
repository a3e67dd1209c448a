//! Changing options and flags of an open driver: prepared first, then done or dropped.
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

/// What a driver gets when it is asked to prepare.
pub struct ReopenContext<'a> {
    /// How the node is opened now.
    pub current: OpenFlags,
    /// How it shall be opened.
    pub flags: OpenFlags,
    /// The driver's own options that shall have another value; the others stay. It takes what it can change while it is open, the
    /// graph refuses the rest.
    pub options: Options,
    /// Where file names are looked up.
    pub fs: &'a Fs,
}

impl fmt::Debug for ReopenContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { current, flags, options, .. } = self;
        let mut out = f.debug_struct("ReopenContext");
        out.field("current", current).field("flags", flags).field("options", options).finish()
    }
}

/// A prepared change of a driver. Dropped: nothing has changed.
pub trait Reopen: Send {
    /// Takes effect. Cannot fail, does not wait.
    fn commit(self: Box<Self>);

    /// Will the node only be readable although the flags say otherwise (`auto_read_only`)?
    fn is_read_only(&self) -> bool {
        false
    }

    /// What [`super::Limits::request_alignment`] will be, if it will differ: users that cannot live with it have the reopen refused.
    fn request_alignment(&self) -> Option<u32> {
        None
    }
}

/// For drivers that have nothing to change.
impl Reopen for () {
    fn commit(self: Box<Self>) {}
}

/// What a driver does that says nothing about it.
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

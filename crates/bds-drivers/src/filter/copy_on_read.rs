//! The `copy-on-read` filter: copies what is read into the node below, so that the next read finds
//! it there.
//!
//! Options are QEMU's `file` and `bottom`. The request path does the copying: reads go down with
//! the flag `COPY_ON_READ`. With `bottom`, only data of the layers from `file` down to that node is
//! copied; data further below is read and not copied. If a change of the graph takes `bottom` out
//! of the chain, nothing is copied any more.
//!
//! Errors at open: `ReadOnly` if the file is not writable; `InvalidInput` if `bottom` is not a node
//! of the chain.
//!
//! Copies do not change what is read from the file, so the file must be writable; the node itself
//! need not be.

use std::any::Any;

use bds_core::driver::{
    Access, BoxFuture, Child, Driver, NodeUse, OpenContext, Perm, ReadFlags, Reopen, ReopenContext,
    Role, StatusFlags,
};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::pass_through::{filter_type, pass_on};

/// The `copy-on-read` filter.
#[derive(Clone, Copy, Debug)]
pub struct CopyOnRead;

const OPEN_OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "file",
        kind: OptionKind::Child,
        help: "the node to read from and to copy into",
        default: None,
    },
    OptionSpec {
        name: "bottom",
        kind: OptionKind::String,
        help: "name of the lowest node in the chain whose data is copied",
        default: None,
    },
];

struct CopyOnReadNode {
    file: Child,
    bottom: Option<String>,
}

impl CopyOnReadNode {
    /// Reads in parts: each is copied or not, as `bottom` requires.
    async fn read_above(
        &self,
        bottom: &str,
        offset: u64,
        iov: IoVec,
        flags: ReadFlags,
    ) -> Result<()> {
        let end = iov.len();
        let mut done = 0;
        while done < end {
            let at = offset + done as u64;
            let requested = (end - done) as u64;
            let (len, is_copied) = match self.file.status_down_to(bottom, at, requested).await {
                Ok(run) => (run.len, run.flags.contains(StatusFlags::ALLOCATED)),
                Err(error) if error.kind() == ErrorKind::NotFound => (0, false),
                Err(error) => return Err(error),
            };
            // Past the end there is nothing to copy.
            let len = usize::try_from(len).ok().filter(|len| *len > 0).unwrap_or(end - done);
            let next = end.min(done + len);
            let copy = if is_copied { ReadFlags::COPY_ON_READ } else { ReadFlags::empty() };
            self.file.read(at, iov.slice(done..next), flags | copy).await?;
            done = next;
        }
        Ok(())
    }
}

impl Driver for CopyOnReadNode {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    pass_on!(self.file =>
        len, limits, is_filter, write_flags, zero_flags, try_write, write, compressed_unit,
        write_compressed, write_zeroes, discard, block_status, truncate, allocated_len);

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        match &self.bottom {
            None => self.file.read(offset, iov, flags | ReadFlags::COPY_ON_READ),
            Some(bottom) => Box::pin(self.read_above(bottom, offset, iov, flags)),
        }
    }

    /// Copies are written whatever the parents do, also below a read-only node.
    fn child_access(&self, _name: &str, role: Role, node: &NodeUse) -> Access {
        let mut access = Access::of_child(role, node);
        if node.is_active {
            access.perm |= Perm::WRITE_UNCHANGED;
        }
        access
    }

    /// Accepts any mode; whether the file may be written is decided by the permissions.
    fn prepare_reopen<'n, 'c>(
        &'n self,
        _context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(async { Ok(Box::new(()) as Box<dyn Reopen>) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

filter_type!(CopyOnRead, "copy-on-read", "what is read is kept in the node below");

impl CopyOnRead {
    async fn open_node(&self, context: &mut OpenContext<'_>) -> Result<CopyOnReadNode> {
        let bottom = context.options.take_str("bottom")?;
        let file = context.child("file", Role::FILTERED | Role::PRIMARY).await?;
        if !file.is_writable() {
            let words = "copy-on-read writes to its file: open the file with read-only=off";
            return Err(Error::new(ErrorKind::ReadOnly, words));
        }
        if let Some(bottom) = &bottom {
            file.status_down_to(bottom, 0, 0).await.map_err(|error| {
                error.with_kind(ErrorKind::InvalidInput).context("option 'bottom'")
            })?;
        }
        Ok(CopyOnReadNode { file, bottom })
    }
}

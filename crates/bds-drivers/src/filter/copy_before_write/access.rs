//! The `snapshot-access` driver: shows the snapshot that a `copy-before-write` node keeps.
//!
//! Its option is QEMU's `file`, the copy-before-write node. Reads return the bytes as they were
//! when the snapshot began. A discard gives parts of it up: they need not be kept any more, and
//! reads of them fail. Writes are not supported.
//!
//! Errors at open: `NotSupported`: the file keeps no snapshot.

use std::any::Any;

use bds_core::driver::{
    Access, Attempt, BoxFuture, Category, Child, Driver, DriverType, NodeUse, OpenContext, Perm,
    Precision, ReadFlags, Role, StatusRun, WriteFlags,
};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

/// The `snapshot-access` driver.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotAccess;

const OPEN_OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "file",
    kind: OptionKind::Child,
    help: "the copy-before-write node whose snapshot is shown",
    default: None,
}];

struct SnapshotNode {
    file: Child,
    len: u64,
}

impl Driver for SnapshotNode {
    fn name(&self) -> &'static str {
        "snapshot-access"
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        self.file.snapshot_read(offset, iov)
    }

    fn write(&self, _offset: u64, _iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::new(ErrorKind::NotSupported, "a snapshot cannot be written")) })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            self.file.snapshot_discard(offset, len).await?;
            Ok(Attempt::Done)
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        self.file.snapshot_status(offset, len, precision)
    }

    /// Reads through the node above, whose permissions it has.
    fn child_access(&self, _name: &str, _role: Role, _node: &NodeUse) -> Access {
        Access { perm: Perm::CONSISTENT_READ, shared: Perm::all() }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DriverType for SnapshotAccess {
    fn name(&self) -> &'static str {
        "snapshot-access"
    }

    fn category(&self) -> Category {
        // It interprets no bytes of a file; a format could be named for an image.
        Category::Filter
    }

    fn help(&self) -> &'static str {
        "shows the snapshot that a copy-before-write node keeps"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            // Not its data: what it shows is only partly there, and it never writes it.
            let file = context.child("file", Role::PRIMARY).await?;
            // An empty read tells whether the node keeps a snapshot.
            file.snapshot_read(0, IoVec::default()).await?;
            let len = file.len();
            Ok(Box::new(SnapshotNode { file, len }) as Box<dyn Driver>)
        })
    }
}

//! The filters of a commit: they show their child, use none of its permissions, and let its other
//! users do everything.
//!
//! ```text
//! overlay ─► commit_top ─► top ─► … ─► commit_base ─► base ◄─ the job writes
//! ```
//!
//! The upper one says for the users of `top` that they do not depend on the images below being
//! consistent by themselves: what is read through `top` stays the same, what the images in between
//! show does not. The lower one lets the job write to `base`, whatever the users above share: what
//! it writes is hidden by the images in between.

use std::any::Any;

use bds_core::Result;
use bds_core::driver::{
    Access, Attempt, BoxFuture, Category, Child, Driver, DriverType, HostMap, Limits, NodeUse,
    OpenContext, Precision, ReadFlags, Role, StatusFlags, StatusRun, WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec};
use bds_io::IoVec;

/// The driver type; its value is its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shield(pub(crate) &'static str);

const OPEN_OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "file",
    kind: OptionKind::Child,
    help: "the node to show",
    default: None,
}];

impl DriverType for Shield {
    fn name(&self) -> &'static str {
        self.0
    }

    fn category(&self) -> Category {
        Category::Filter
    }

    fn help(&self) -> &'static str {
        "shows its child while a job changes what lies below"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let file = context.child("file", Role::FILTERED | Role::PRIMARY).await?;
            Ok(Box::new(ShieldNode { name: self.0, file }) as Box<dyn Driver>)
        })
    }
}

struct ShieldNode {
    name: &'static str,
    file: Child,
}

impl Driver for ShieldNode {
    fn name(&self) -> &'static str {
        self.name
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, ..self.file.limits() }
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.file.try_read(offset, iov)
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        self.file.read(offset, iov, flags)
    }

    // It is opened read-only: the graph lets no write come here.
    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.file.write(offset, iov, flags)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        self.file.write_zeroes(offset, len, flags)
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let end = self.len();
        let run = if offset >= end {
            StatusRun { len: 0, flags: StatusFlags::EOF, map: None }
        } else {
            let map = Some(HostMap { child: self.file.name(), offset });
            StatusRun { len: len.min(end - offset), flags: StatusFlags::RAW, map }
        };
        Box::pin(async move { Ok(run) })
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        self.file.allocated_len()
    }

    fn child_access(&self, _name: &str, _role: Role, _node: &NodeUse) -> Access {
        Access::NONE
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

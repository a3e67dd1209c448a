//! Opens a filter node without a graph, for tests of calls that only the graph makes.

use std::path::PathBuf;
use std::sync::Arc;

use bds_core::driver::{
    Attempt, BoxFuture, Child, ChildOpener, ChildPort, ChildRequest, Driver, DriverType, Limits,
    OpenContext, OpenFlags, Precision, ReadFlags, StatusFlags, StatusRun, Truncate, WriteFlags,
    ZeroFlags,
};
use bds_core::{Options, Result};
use bds_io::{Fs, IoVec};
use serde_json::Value;

/// Opens a node over a [`Blank`] disk of 1 GiB.
pub(super) async fn open(
    driver: &dyn DriverType,
    name: &str,
    options: Value,
) -> Result<Arc<dyn Driver>> {
    let options = Options::from_json(options)?;
    let mut opener = Opener;
    let mut context = OpenContext::new(name, options, OpenFlags::default(), &Fs::Host, &mut opener);
    driver.open(&mut context).await.map(Arc::from)
}

struct Opener;

impl ChildOpener for Opener {
    fn open_child<'a>(&'a mut self, request: ChildRequest) -> BoxFuture<'a, Result<Option<Child>>> {
        Box::pin(async move { Ok(Some(Child::new(request.name, Box::new(Blank)))) })
    }
}

/// A disk that completes every request at once and stores nothing.
struct Blank;

impl ChildPort for Blank {
    fn len(&self) -> u64 {
        1 << 30
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn node_name(&self) -> String {
        "blank".into()
    }

    fn filename(&self) -> Option<PathBuf> {
        None
    }

    fn driver_name(&self) -> &'static str {
        "blank"
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn can_zero(&self) -> bool {
        true
    }

    /// Declines ranges in the upper half.
    fn try_read(&self, offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        (offset < 1 << 29).then_some(Ok(()))
    }

    fn try_write(&self, offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        (offset < 1 << 29).then_some(Ok(()))
    }

    fn read(&self, _: u64, _: IoVec, _: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn write(&self, _: u64, _: IoVec, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn write_compressed(&self, _: u64, _: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Done) })
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn block_status(&self, _: u64, len: u64, _: Precision) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::ZERO, map: None }) })
    }

    fn is_zero(&self, _: u64, _: u64) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async { Ok(true) })
    }

    fn truncate(&self, _: Truncate) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async { Ok(None) })
    }

    fn identity(&self) -> Option<(u64, u64)> {
        None
    }
}

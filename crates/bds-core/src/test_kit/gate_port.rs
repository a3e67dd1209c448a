//! A request path of one step for graph tests: passes the gate, counts the request in flight, calls
//! the driver.

use std::path::PathBuf;
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_io::IoVec;

use crate::driver::{
    Access, Attempt, BoxFuture, ChildPort, Limits, Precision, ReadFlags, StatusRun, Truncate,
    WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Edge, NodeRef, Root, Target, walk};

/// Attaches a backend's root edge.
pub(crate) fn root(node: &NodeRef, name: &str, access: Access) -> Arc<Edge> {
    let root = Root { kind: HolderKind::Backend, name, access, is_fixed: false, is_backend: false };
    node.graph().attach_root(Some(node), &root).unwrap()
}

/// Makes the child handle's end of an edge.
pub(crate) fn port(edge: Arc<Edge>) -> Box<dyn ChildPort> {
    Box::new(Port(edge))
}

/// Sends a read through an edge, as a backend would.
pub(crate) async fn read(edge: &Edge) -> Result<()> {
    let in_flight = loop {
        if let Some(ticket) = edge.ticket() {
            let target = edge.target();
            let shard = target.tracker().enter();
            let in_flight = InFlight { target, shard };
            if edge.admits(ticket) {
                break in_flight;
            }
        }
        edge.wait_open().await;
    };
    in_flight.target.driver().read(0, IoVec::default(), ReadFlags::empty()).await
}

struct InFlight<'a> {
    target: Target<'a>,
    shard: crate::tracker::ShardNumber,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.target.tracker().leave(self.shard);
    }
}

fn unsupported<T>() -> BoxFuture<'static, Result<T>> {
    Box::pin(async { Err(Error::new(ErrorKind::NotSupported, "not in this test")) })
}

struct Port(Arc<Edge>);

impl ChildPort for Port {
    fn len(&self) -> u64 {
        self.0.target().len()
    }
    fn limits(&self) -> Limits {
        self.0.target().limits()
    }
    fn node_name(&self) -> String {
        self.0.target().name().to_owned()
    }
    fn filename(&self) -> Option<PathBuf> {
        walk::filename(&self.0.target())
    }
    fn driver_name(&self) -> &'static str {
        self.0.target().driver_name()
    }
    fn is_writable(&self) -> bool {
        self.0.target().is_writable()
    }
    fn can_zero(&self) -> bool {
        false
    }
    fn try_read(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }
    fn try_write(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }
    fn read(&self, _offset: u64, _iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(read(&self.0))
    }
    fn write(&self, _offset: u64, _iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        unsupported()
    }
    fn write_compressed(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        unsupported()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> BoxFuture<'_, Result<Attempt>> {
        unsupported()
    }
    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        unsupported()
    }
    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let target = self.0.target();
            target.driver().flush_to_os().await
        })
    }
    fn block_status(&self, _: u64, _: u64, _: Precision) -> BoxFuture<'_, Result<StatusRun>> {
        unsupported()
    }
    fn is_zero(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<bool>> {
        unsupported()
    }
    fn truncate(&self, _change: Truncate) -> BoxFuture<'_, Result<()>> {
        unsupported()
    }
    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        unsupported()
    }
    fn identity(&self) -> Option<(u64, u64)> {
        walk::identity(&self.0.target())
    }
}

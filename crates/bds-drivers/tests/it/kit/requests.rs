//! Helpers of tests that poll requests by hand: buffers, backends, a single poll, a time limit.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bds_core::graph::NodeRef;
use bds_core::request::{Backend, BackendOptions};
use bds_io::{Buf, IoVec};
use futures_util::future::{Either, select};

/// A buffer of `len` bytes, all of them `byte`.
pub(crate) fn filled(byte: u8, len: u64) -> IoVec {
    let len = usize::try_from(len).unwrap();
    let iov = Buf::zeroed(len, 4096).iov();
    iov.fill(0..len, byte);
    iov
}

/// A backend that may write to the node.
pub(crate) fn writer(node: &NodeRef, name: &str) -> Backend {
    let options = BackendOptions { name: name.into(), writable: true, ..Default::default() };
    Backend::new(node, options).unwrap()
}

/// Polls the future once; true if it completed.
pub(crate) async fn poll_once<F: Future + ?Sized>(future: &mut Pin<Box<F>>) -> bool {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}

/// Panics if the work takes longer than `limit`.
pub(crate) async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = T>) -> T {
    match select(pin!(work), pin!(bds_io::sleep(limit))).await {
        Either::Left((done, _)) => done,
        Either::Right(_) => panic!("{what}: hangs"),
    }
}

//! `Lease`: memory of the caller's that is lent to the library until the last operation on it ends.
//!
//! An operation in flight owns its buffers through anchors. The anchor of C's memory is a `Lease`:
//! when its last clone is dropped, and not before, C gets the memory back. So a request that was
//! dropped or failed early never returns memory that the kernel still writes to.

use std::sync::Arc;

use bds_io::sync::oneshot;

/// The anchor of memory that a blocking call lends.
pub(crate) struct Lease {
    /// Dropped with the lease, which tells the receiver.
    _ended: oneshot::Sender<()>,
}

impl Lease {
    /// A lease, and what waits for its end.
    pub(crate) fn new() -> (Arc<Self>, LeaseEnd) {
        let (sender, receiver) = oneshot::channel();
        (Arc::new(Self { _ended: sender }), LeaseEnd(receiver))
    }
}

/// Waits for the end of a lease.
pub(crate) struct LeaseEnd(oneshot::Receiver<()>);

impl LeaseEnd {
    /// Returns when no operation uses the memory any more.
    pub(crate) async fn wait(self) {
        // An error: the sender was dropped, which is the end that is waited for.
        let _ = self.0.await;
    }
}

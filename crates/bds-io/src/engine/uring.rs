//! The io_uring engine: submits and reaps the operations of one Context through a ring.
//!
//! Operations are queued as they come and go to the kernel with one `io_uring_enter` a turn, which
//! also reaps. Each stays in a slab with everything it points at until its completion is seen.
//!
//! Drop order: `drop` waits until the slab is empty, and only then the ring and the memory go.
//! Should waiting itself fail, the slab is leaked: memory that the kernel may still write to is
//! never freed.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use slab::Slab;

use super::{Completed, run_on_worker};
use crate::completion::Completion;
use crate::context::ContextOptions;
use crate::op::{Op, OpKind, OpResult};
use crate::sys;

/// Completion of the read of the eventfd.
const WAKE: u64 = u64::MAX;
/// Completion of a cancellation.
const CANCEL: u64 = u64::MAX - 1;
/// Bytes that one transfer may have (MAX_RW_COUNT); longer ones come back short, as from the system
/// calls.
const TRANSFER_LEN_MAX: usize = 0x7fff_f000;

/// An operation that the kernel has, or that waits to be submitted.
#[derive(Debug)]
struct PendingOp {
    op: Op,
    completion: Arc<Completion<OpResult>>,
    /// The iovec array that a vectored transfer points at.
    vectors: Option<Vectors>,
    /// No future waits for it, and the kernel was asked to cancel it.
    is_cancelled: bool,
}

impl PendingOp {
    /// True if a future waits for it.
    fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.completion) > 1
    }
}

#[derive(Debug)]
struct Vectors(Box<[libc::iovec]>);

/// Operations that this kernel's ring supports; the others go to threads.
#[derive(Debug, Clone, Copy)]
struct Supported {
    allocate: bool,
    set_len: bool,
}

/// A ring with the operations in flight on it.
pub(crate) struct Uring {
    ring: ManuallyDrop<IoUring>,
    ops: ManuallyDrop<Slab<PendingOp>>,
    /// Keys of operations that found the submission queue full.
    backlog: VecDeque<usize>,
    wake: Arc<OwnedFd>,
    /// Target of the kernel's read of the eventfd.
    wake_count: ManuallyDrop<Box<u64>>,
    /// A read of the eventfd is in the ring.
    is_armed: bool,
    supported: Supported,
    completed: Vec<Completed>,
    /// Signalled by the kernel when there is something to reap, for foreign event loops.
    event_fd: Option<OwnedFd>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.ops.len()).finish_non_exhaustive()
    }
}

impl Uring {
    pub(crate) fn new(options: &ContextOptions, wake: &Arc<OwnedFd>) -> io::Result<Uring> {
        let ring = build(options.ring_entries.clamp(8, 4096))?;
        let params = ring.params();
        if !params.is_feature_ext_arg()
            || !params.is_feature_nodrop()
            || !params.is_feature_submit_stable()
        {
            let text = "this kernel's io_uring is older than 5.11";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let supported = Supported {
            allocate: probe.is_supported(opcode::Fallocate::CODE),
            set_len: probe.is_supported(opcode::Ftruncate::CODE),
        };
        Ok(Uring {
            ring: ManuallyDrop::new(ring),
            ops: ManuallyDrop::new(Slab::new()),
            backlog: VecDeque::new(),
            wake: wake.clone(),
            wake_count: ManuallyDrop::new(Box::new(0)),
            is_armed: false,
            supported,
            completed: Vec::new(),
            event_fd: None,
        })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.ops.len()
    }

    pub(crate) fn submit(
        &mut self,
        op: Op,
        completion: Arc<Completion<OpResult>>,
    ) -> Option<Completed> {
        let is_supported = match op.kind {
            OpKind::Read { .. } | OpKind::Write { .. } | OpKind::SyncData => true,
            OpKind::Allocate { .. } => self.supported.allocate,
            OpKind::SetLen { .. } => self.supported.set_len,
            OpKind::Discard { .. } | OpKind::ZeroOut { .. } | OpKind::CopyRange { .. } => false,
        };
        if !is_supported {
            return run_on_worker(op, completion);
        }
        let vectors = match &op.kind {
            OpKind::Read { iov, .. } | OpKind::Write { iov, .. } if iov.segments().len() > 1 => {
                Some(Vectors(sys::vectors(iov).into_vec().into_boxed_slice()))
            }
            _ => None,
        };
        let key = self.ops.insert(PendingOp { op, completion, vectors, is_cancelled: false });
        self.start(key);
        None
    }

    /// Queues the operation for the kernel, freeing queue entries if there are none.
    fn start(&mut self, key: usize) {
        let entry = match entry(&self.ops[key]) {
            Ok(entry) => entry.user_data(key as u64),
            Err(error) => return self.complete(key, Err(error)),
        };
        if !self.backlog.is_empty() || !self.push(&entry) {
            self.backlog.push_back(key);
        }
    }

    /// False if the queue is full and the kernel takes nothing now.
    fn push(&mut self, entry: &squeue::Entry) -> bool {
        for _ in 0..2 {
            // SAFETY: an entry names memory and a descriptor owned by its `PendingOp` (or by
            // `self`: the eventfd and its count), which stay until the completion is reaped or, at
            // the end, are leaked. Slab growth moves a `PendingOp`, not what it points at: segments
            // are anchored, vectors are boxed.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return true;
            }
            // Errors (EBUSY: too many completions unreaped) are ignored; the next flush meets them.
            let _ = self.ring.submit();
        }
        false
    }

    /// Submits queued operations and reaps, without waiting. No system call if there is neither.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.push_backlog();
        if !self.ring.submission().is_empty() {
            self.enter(0, None)?;
        }
        self.reap_done()
    }

    /// Reaps without submitting what is queued: that goes with the next `flush` or `wait`, which
    /// must follow.
    pub(crate) fn reap_done(&mut self) -> io::Result<()> {
        let queue = self.ring.submission();
        let is_needed = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if is_needed {
            self.enter(0, None)?;
        }
        self.reap();
        Ok(())
    }

    /// As `flush`, but waits for a completion or an eventfd signal, up to `timeout` (`None`: for
    /// ever).
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.arm();
        self.push_backlog();
        // An operation that was refused before it reached the kernel has completed too, without a
        // completion entry.
        let want = usize::from(self.completed.is_empty());
        self.enter(want, timeout)?;
        self.reap();
        Ok(())
    }

    /// Queues a read of the eventfd, so that a signal on it arrives as a completion.
    fn arm(&mut self) {
        if !self.is_armed {
            let to: *mut u64 = &raw mut **self.wake_count;
            let entry = opcode::Read::new(Fd(self.wake.as_raw_fd()), to.cast(), 8).build();
            self.is_armed = self.push(&entry.user_data(WAKE));
        }
    }

    /// An eventfd that the kernel signals when `flush` would reap something. Not the ring's own
    /// descriptor, whose signals cannot be stopped while the ring is driven.
    pub(crate) fn event_fd(&mut self) -> io::Result<BorrowedFd<'_>> {
        if self.event_fd.is_none() {
            let event_fd = sys::eventfd()?;
            self.ring.submitter().register_eventfd(event_fd.as_raw_fd())?;
            self.event_fd = Some(event_fd);
        }
        Ok(self.event_fd.as_ref().expect("made above").as_fd())
    }

    /// Stops signals on the eventfd.
    pub(crate) fn disable_event_fd(&mut self) {
        if self.event_fd.is_some() {
            self.ring.completion().disable_eventfd();
        }
    }

    /// Clears the eventfd and allows signals again.
    pub(crate) fn enable_event_fd(&mut self) {
        if let Some(event_fd) = &self.event_fd {
            self.ring.completion().enable_eventfd();
            sys::clear(event_fd);
        }
    }

    fn push_backlog(&mut self) {
        while let Some(key) = self.backlog.pop_front() {
            match entry(&self.ops[key]) {
                Ok(entry) => {
                    if !self.push(&entry.user_data(key as u64)) {
                        return self.backlog.push_front(key);
                    }
                }
                Err(error) => self.complete(key, Err(error)),
            }
        }
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        let time;
        let mut args = SubmitArgs::new();
        if let Some(timeout) = timeout {
            time = Timespec::from(timeout);
            args = args.timespec(&time);
        }
        #[cfg(test)]
        tests::count_enter(want);
        match self.ring.submitter().submit_with_args(want, &args) {
            Ok(_) => Ok(()),
            // ETIME: the timeout. EINTR: a signal. EBUSY, EAGAIN: reap first. The caller tries
            // again.
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Completes every operation whose completion entry is there.
    fn reap(&mut self) {
        loop {
            let Some(done) = self.ring.completion().next() else { return };
            match (done.user_data(), done.result()) {
                (WAKE, _) => self.is_armed = false,
                (CANCEL, _) => {}
                (key, result) => self.finish(key, result),
            }
        }
    }

    fn finish(&mut self, key: u64, result: i32) {
        let Ok(key) = usize::try_from(key) else { return };
        match -result {
            libc::EINTR => self.start(key),
            // The ring cannot wait for this file; a thread can.
            libc::EAGAIN => self.pass_to_worker(key),
            // Not requested: the kernel could start no thread for it (RLIMIT_NPROC) and has not
            // begun it.
            libc::ECANCELED if !self.ops[key].is_cancelled => self.pass_to_worker(key),
            errno => {
                let result =
                    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(errno));
                self.complete(key, result);
            }
        }
    }

    fn pass_to_worker(&mut self, key: usize) {
        let PendingOp { op, completion, .. } = self.ops.remove(key);
        self.completed.extend(run_on_worker(op, completion));
    }

    fn complete(&mut self, key: usize, result: OpResult) {
        let PendingOp { op, completion, .. } = self.ops.remove(key);
        self.completed.push(Completed { op, completion, result });
    }

    /// Takes the operations completed since the last call, to be delivered once the engine is no
    /// longer borrowed.
    pub(crate) fn swap_completed(&mut self, other: &mut Vec<Completed>) {
        std::mem::swap(&mut self.completed, other);
    }

    /// True if a future waits for an operation.
    pub(crate) fn has_awaited(&self) -> bool {
        self.ops.iter().any(|(_, pending)| pending.is_awaited())
    }

    /// Asks the kernel to cancel the operations that futures wait for. Those that it cancels (not
    /// begun, or waiting) go to a thread; the others complete in the ring.
    pub(crate) fn cancel_awaited(&mut self) {
        let awaited = self.ops.iter().filter(|(_, pending)| pending.is_awaited());
        let awaited = awaited.map(|(key, _)| key).collect();
        self.cancel(awaited);
    }

    fn cancel(&mut self, keys: Vec<usize>) {
        for key in keys {
            let cancel = opcode::AsyncCancel::new(key as u64).build();
            self.push(&cancel.user_data(CANCEL));
        }
    }

    /// Asks the kernel to cancel everything, and waits until nothing is in flight. An operation
    /// that a future still waits for (in a task that outlives the Context) continues on a thread if
    /// the kernel cancels it.
    fn drain(&mut self) -> io::Result<()> {
        if self.is_armed {
            sys::signal(&self.wake);
        }
        self.cancel_awaited();
        let mut abandoned = Vec::new();
        for (key, pending) in self.ops.iter_mut().filter(|(_, pending)| !pending.is_awaited()) {
            pending.is_cancelled = true;
            abandoned.push(key);
        }
        self.cancel(abandoned);
        while !self.ops.is_empty() || self.is_armed {
            self.push_backlog();
            self.enter(1, None)?;
            self.reap();
        }
        Ok(())
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if self.drain().is_err() {
            // What the kernel still does is unknown; see the module's drop order.
            return;
        }
        self.completed.drain(..).for_each(Completed::deliver);
        // SAFETY: dropped once, here, and not used afterwards; nothing is in flight, so the kernel
        // does not use any of the memory any more.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.ops);
            ManuallyDrop::drop(&mut self.wake_count);
        }
    }
}

/// Sets up the ring with the best flags this kernel has: only one thread enters, and completions do
/// not interrupt it.
///
/// Not IORING_SETUP_DEFER_TASKRUN: a wait for one completion then returns with the first few of
/// many (8,400 enters for 100,000 reads instead of 3,400), and waiting for more than one may hang
/// if the others depend on this thread.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut best = IoUring::builder();
    best.setup_clamp()
        .setup_cqsize(entries * 4)
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .dontfork();
    let mut plain = IoUring::builder();
    plain.setup_clamp().setup_cqsize(entries * 4).dontfork();
    best.build(entries).or_else(|_| plain.build(entries))
}

/// The submission queue entry of an operation. Errors: an offset past what the kernel takes.
fn entry(pending: &PendingOp) -> io::Result<squeue::Entry> {
    let fd = Fd(pending.op.file.as_fd().as_raw_fd());
    Ok(match &pending.op.kind {
        OpKind::Read { offset, iov } => {
            let offset = sys::to_off(*offset)?.cast_unsigned();
            match (&pending.vectors, iov.segments().first()) {
                (Some(Vectors(vectors)), _) => {
                    let count = u32::try_from(vectors.len()).unwrap_or(u32::MAX);
                    opcode::Readv::new(fd, vectors.as_ptr(), count).offset(offset).build()
                }
                (None, Some(seg)) => opcode::Read::new(fd, seg.as_ptr(), transfer_len(seg.len()))
                    .offset(offset)
                    .build(),
                (None, None) => opcode::Nop::new().build(),
            }
        }
        OpKind::Write { offset, iov, dsync } => {
            let offset = sys::to_off(*offset)?.cast_unsigned();
            let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
            match (&pending.vectors, iov.segments().first()) {
                (Some(Vectors(vectors)), _) => {
                    let count = u32::try_from(vectors.len()).unwrap_or(u32::MAX);
                    let write = opcode::Writev::new(fd, vectors.as_ptr(), count);
                    write.offset(offset).rw_flags(flags).build()
                }
                (None, Some(seg)) => {
                    let write = opcode::Write::new(fd, seg.as_ptr(), transfer_len(seg.len()));
                    write.offset(offset).rw_flags(flags).build()
                }
                (None, None) => opcode::Nop::new().build(),
            }
        }
        OpKind::SyncData => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        OpKind::Allocate { mode, offset, len } => {
            let offset = sys::to_off(*offset)?.cast_unsigned();
            let len = sys::to_off(*len)?.cast_unsigned();
            opcode::Fallocate::new(fd, len).offset(offset).mode(*mode).build()
        }
        OpKind::SetLen { len } => {
            opcode::Ftruncate::new(fd, sys::to_off(*len)?.cast_unsigned()).build()
        }
        OpKind::Discard { .. } | OpKind::ZeroOut { .. } | OpKind::CopyRange { .. } => {
            return Err(io::ErrorKind::Unsupported.into());
        }
    })
}

fn transfer_len(len: usize) -> u32 {
    u32::try_from(len.min(TRANSFER_LEN_MAX)).expect("the maximum fits")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::StreamExt;
    use futures_util::stream::FuturesUnordered;

    use crate::{Context, ContextOptions, EngineKind, File, OpenOptions};

    thread_local! {
        static ENTERS_WITHOUT_WAIT: Cell<u32> = const { Cell::new(0) };
        static ENTERS: Cell<u32> = const { Cell::new(0) };
    }

    /// Counts a system call of this thread's rings.
    pub(super) fn count_enter(want: usize) {
        ENTERS.with(|count| count.set(count.get() + 1));
        if want == 0 {
            ENTERS_WITHOUT_WAIT.with(|count| count.set(count.get() + 1));
        }
    }

    /// A `FuturesUnordered` yields after 32 polls by waking itself. Its operations go to the kernel
    /// with the wait that follows.
    #[test]
    fn a_turn_enters_the_kernel_once() {
        let options = ContextOptions { engine: EngineKind::Uring, ..ContextOptions::default() };
        let context = match Context::new(options) {
            Ok(context) => context,
            Err(error) => {
                println!("skipped: no io_uring: {error}");
                return;
            }
        };
        let temp = tempfile::tempfile().expect("a temporary file can be made");
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = File::from_fd(temp.into(), &options).expect("an open file");
        context.block_on(async {
            ENTERS.set(0);
            ENTERS_WITHOUT_WAIT.set(0);
            // The kernel never completes a sync while it is submitted.
            let mut syncs: FuturesUnordered<_> = (0..32).map(|_| file.sync_data()).collect();
            while let Some(done) = syncs.next().await {
                done.expect("a sync of a temporary file");
            }
        });
        assert_eq!(ENTERS_WITHOUT_WAIT.get(), 0, "something was submitted without waiting");
        assert!(ENTERS.get() >= 1, "the syncs went through the ring");
    }
}

//! The kernel's ring.
//!
//! Operations are queued as they come and go to the kernel with one `io_uring_enter` a turn, which also
//! reaps. Each sits in a slab with everything it points at until its completion is seen.
//!
//! Drop order: `drop` waits until the slab is empty, and only then the ring and the memory go. Should waiting
//! itself fail, the slab is leaked: memory that the kernel may still write to is never freed.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use slab::Slab;

use super::{Landed, run_on_worker};
use crate::cell::AnswerCell;
use crate::context::ContextOptions;
use crate::op::{Answer, Op, OpKind};
use crate::sys;

/// Completion of the read of the eventfd.
const WAKE: u64 = u64::MAX;
/// Completion of a cancellation.
const CANCEL: u64 = u64::MAX - 1;
/// Bytes that one transfer may have (MAX_RW_COUNT); longer ones come back short, as from the system calls.
const TRANSFER_LEN_MAX: usize = 0x7fff_f000;

/// An operation in the kernel's hands, or on its way there.
#[derive(Debug)]
struct Flight {
    op: Op,
    cell: Arc<AnswerCell<Answer>>,
    /// What a vectored transfer points at.
    vectors: Option<Vectors>,
    /// Nothing waits for it, and the kernel was asked to cancel it.
    is_given_up: bool,
}

impl Flight {
    /// Does a future wait for its end?
    fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.cell) > 1
    }
}

#[derive(Debug)]
struct Vectors(Box<[libc::iovec]>);

/// Which operations this kernel's ring knows; the others go to threads.
#[derive(Debug, Clone, Copy)]
struct Known {
    allocate: bool,
    set_len: bool,
}

/// A ring with the operations in flight on it.
pub(crate) struct Uring {
    ring: ManuallyDrop<IoUring>,
    flights: ManuallyDrop<Slab<Flight>>,
    /// Keys of flights that found the submission queue full.
    backlog: VecDeque<usize>,
    wake: Arc<OwnedFd>,
    /// Where the kernel puts the eventfd's count.
    wake_count: ManuallyDrop<Box<u64>>,
    is_armed: bool,
    known: Known,
    landed: Vec<Landed>,
    /// Signalled by the kernel when there is something to reap, for foreign loops.
    bell: Option<OwnedFd>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.flights.len()).finish_non_exhaustive()
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
        let known = Known {
            allocate: probe.is_supported(opcode::Fallocate::CODE),
            set_len: probe.is_supported(opcode::Ftruncate::CODE),
        };
        Ok(Uring {
            ring: ManuallyDrop::new(ring),
            flights: ManuallyDrop::new(Slab::new()),
            backlog: VecDeque::new(),
            wake: wake.clone(),
            wake_count: ManuallyDrop::new(Box::new(0)),
            is_armed: false,
            known,
            landed: Vec::new(),
            bell: None,
        })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    pub(crate) fn submit(&mut self, op: Op, cell: Arc<AnswerCell<Answer>>) -> Option<Landed> {
        let is_known = match op.kind {
            OpKind::Read { .. } | OpKind::Write { .. } | OpKind::SyncData => true,
            OpKind::Allocate { .. } => self.known.allocate,
            OpKind::SetLen { .. } => self.known.set_len,
            OpKind::Discard { .. } | OpKind::ZeroOut { .. } | OpKind::CopyRange { .. } => false,
        };
        if !is_known {
            return run_on_worker(op, cell);
        }
        let vectors = match &op.kind {
            OpKind::Read { iov, .. } | OpKind::Write { iov, .. } if iov.segments().len() > 1 => {
                Some(Vectors(sys::vectors(iov).into_vec().into_boxed_slice()))
            }
            _ => None,
        };
        let key = self.flights.insert(Flight { op, cell, vectors, is_given_up: false });
        self.start(key);
        None
    }

    /// Queues the flight for the kernel, making room if the queue is full.
    fn start(&mut self, key: usize) {
        let entry = match entry(&self.flights[key]) {
            Ok(entry) => entry.user_data(key as u64),
            Err(error) => return self.land(key, Err(error)),
        };
        if !self.backlog.is_empty() || !self.push(&entry) {
            self.backlog.push_back(key);
        }
    }

    /// False if there is no room and the kernel does not make any now.
    fn push(&mut self, entry: &squeue::Entry) -> bool {
        for _ in 0..2 {
            // SAFETY: an entry names memory and a descriptor owned by its flight (or by `self`: the eventfd
            // and its count), which stay until the completion is reaped or, at the end, are leaked. Slab
            // growth moves a Flight, not what it points at: segments are anchored, vectors are boxed.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return true;
            }
            // Errors (EBUSY: too many completions unreaped) pass; whoever flushes next meets them.
            let _ = self.ring.submit();
        }
        false
    }

    /// Hands queued operations to the kernel and reaps, without waiting. No system call if there is neither.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.push_backlog();
        if !self.ring.submission().is_empty() {
            self.enter(0, None)?;
        }
        self.reap_done()
    }

    /// Reaps without handing over what is queued: that goes with the next `flush` or `wait`, which the caller owes.
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

    /// As `flush`, but waits for a completion or an eventfd signal, up to `timeout` (None: forever).
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.arm();
        self.push_backlog();
        // What was refused before it reached the kernel is an end too; no completion will come for it.
        let want = usize::from(self.landed.is_empty());
        self.enter(want, timeout)?;
        self.reap();
        Ok(())
    }

    /// Lets a signal on the eventfd arrive as a completion.
    fn arm(&mut self) {
        if !self.is_armed {
            let to: *mut u64 = &raw mut **self.wake_count;
            let entry = opcode::Read::new(Fd(self.wake.as_raw_fd()), to.cast(), 8).build();
            self.is_armed = self.push(&entry.user_data(WAKE));
        }
    }

    /// An eventfd that the kernel signals when `flush` would reap something. The ring's own descriptor does
    /// not serve: it cannot be silenced while the ring is driven.
    pub(crate) fn bell(&mut self) -> io::Result<BorrowedFd<'_>> {
        if self.bell.is_none() {
            let bell = sys::event()?;
            self.ring.submitter().register_eventfd(bell.as_raw_fd())?;
            self.bell = Some(bell);
        }
        Ok(self.bell.as_ref().expect("made above").as_fd())
    }

    /// Silences the bell while the ring is driven, or clears it and lets it ring again.
    pub(crate) fn set_bell(&mut self, is_on: bool) {
        let Some(bell) = &self.bell else { return };
        let queue = self.ring.completion();
        if is_on {
            queue.enable_eventfd();
            sys::clear(bell);
        } else {
            queue.disable_eventfd();
        }
    }

    fn push_backlog(&mut self) {
        while let Some(key) = self.backlog.pop_front() {
            match entry(&self.flights[key]) {
                Ok(entry) => {
                    if !self.push(&entry.user_data(key as u64)) {
                        return self.backlog.push_front(key);
                    }
                }
                Err(error) => self.land(key, Err(error)),
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
            // ETIME: the timeout. EINTR: a signal. EBUSY, EAGAIN: reap first. The caller goes round again.
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Lands every flight whose completion is there.
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
            // Not asked for: the kernel got no thread of its own for it (RLIMIT_NPROC). It has not begun it.
            libc::ECANCELED if !self.flights[key].is_given_up => self.pass_to_worker(key),
            errno => {
                let answer =
                    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(errno));
                self.land(key, answer);
            }
        }
    }

    fn pass_to_worker(&mut self, key: usize) {
        let Flight { op, cell, .. } = self.flights.remove(key);
        self.landed.extend(run_on_worker(op, cell));
    }

    fn land(&mut self, key: usize, answer: Answer) {
        let Flight { op, cell, .. } = self.flights.remove(key);
        self.landed.push(Landed { op, cell, answer });
    }

    /// What has been finished since the last time, to be told once the engine is no longer borrowed.
    pub(crate) fn swap_landed(&mut self, other: &mut Vec<Landed>) {
        std::mem::swap(&mut self.landed, other);
    }

    /// Is there an operation that a future waits for?
    pub(crate) fn has_awaited(&self) -> bool {
        self.flights.iter().any(|(_, flight)| flight.is_awaited())
    }

    /// Asks the kernel to give up what futures wait for. What it gives up (it has not begun it, or it may wait for
    /// ever) goes to a thread; what it cannot give up any more ends in the ring.
    pub(crate) fn withdraw_awaited(&mut self) {
        let awaited = self.flights.iter().filter(|(_, flight)| flight.is_awaited());
        let awaited = awaited.map(|(key, _)| key).collect();
        self.cancel(awaited);
    }

    fn cancel(&mut self, keys: Vec<usize>) {
        for key in keys {
            let cancel = opcode::AsyncCancel::new(key as u64).build();
            self.push(&cancel.user_data(CANCEL));
        }
    }

    /// Asks the kernel to give up everything, and waits for all ends. What a future still waits for (that of a task
    /// that outlives the Context) goes on in a thread if the kernel gives it up.
    fn drain(&mut self) -> io::Result<()> {
        if self.is_armed {
            sys::signal(&self.wake);
        }
        self.withdraw_awaited();
        let mut abandoned = Vec::new();
        for (key, flight) in self.flights.iter_mut().filter(|(_, flight)| !flight.is_awaited()) {
            flight.is_given_up = true;
            abandoned.push(key);
        }
        self.cancel(abandoned);
        while !self.flights.is_empty() || self.is_armed {
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
            // Nothing is known about what the kernel still does; see the module's drop order.
            return;
        }
        self.landed.drain(..).for_each(Landed::tell);
        // SAFETY: dropped once, here, and not used afterwards; nothing is in flight, so the kernel does not
        // know any of the memory any more.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.flights);
            ManuallyDrop::drop(&mut self.wake_count);
        }
    }
}

/// The best ring this kernel gives: only one thread enters, and completions do not interrupt it.
///
/// Not IORING_SETUP_DEFER_TASKRUN: a wait for one completion then returns with the first few of many (8,400 enters for
/// 100,000 reads instead of 3,400), and waiting for more than one may hang if the others wait for us.
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

/// The flight as the kernel takes it. Errors: an offset past what the kernel knows.
fn entry(flight: &Flight) -> io::Result<squeue::Entry> {
    let fd = Fd(flight.op.file.as_fd().as_raw_fd());
    Ok(match &flight.op.kind {
        OpKind::Read { offset, iov } => {
            let offset = sys::to_off(*offset)?.cast_unsigned();
            match (&flight.vectors, iov.segments().first()) {
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
            match (&flight.vectors, iov.segments().first()) {
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

    /// A `FuturesUnordered` yields after 32 polls by waking itself. What it queued goes to the kernel with the wait that follows.
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
            // The kernel never answers a sync while it is handed over.
            let mut syncs: FuturesUnordered<_> = (0..32).map(|_| file.sync_data()).collect();
            while let Some(done) = syncs.next().await {
                done.expect("a sync of a temporary file");
            }
        });
        assert_eq!(ENTERS_WITHOUT_WAIT.get(), 0, "something was handed over without waiting");
        assert!(ENTERS.get() >= 1, "the syncs went through the ring");
    }
}

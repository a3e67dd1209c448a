//! `Context`: one thread's executor, engine and clock; and functions that find the current one.
//!
//! ```text
//! thread drives a Context (block_on, turn)  → that Context
//! thread runs Sim::block_on                 → the simulated world
//! plain thread in bds_io::block_on          → its own cached Context
//! anything else (tokio, a VMM's loop)       → the background Context, one thread for the process
//! ```
//!
//! Any future may be dropped or forgotten at any await: the engine owns an operation until it is
//! over. A task may outlive its Context: the tasks of a dropped Context, and those left when a
//! plain thread's `block_on` returns, continue in the background one.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Context as PollContext, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use crate::clock::{self, Sleep};
use crate::completion::Completion;
use crate::current::{self, Current};
use crate::executor::{self, Local, Shared};
use crate::op::{Op, OpResult};
use crate::task::{self, Task};
use crate::workers;

/// I/O engine of a [`Context`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EngineKind {
    /// io_uring where the kernel has it, else the pool. The environment variable `BDS_ENGINE`,
    /// `uring` or `pool`, overrides this choice.
    #[default]
    Auto,
    /// io_uring only.
    Uring,
    /// Blocking calls on threads.
    Pool,
}

/// Options of a [`Context`]; make them with `..ContextOptions::default()`.
#[derive(Clone, Debug)]
pub struct ContextOptions {
    /// I/O engine.
    pub engine: EngineKind,
    /// Entries of the submission queue (8 to 4096, rounded up to a power of two). More operations
    /// than that may be in flight; they then take more than one system call a turn.
    pub ring_entries: u32,
}

impl Default for ContextOptions {
    fn default() -> ContextOptions {
        ContextOptions { engine: EngineKind::Auto, ring_entries: 256 }
    }
}

/// One thread's executor, engine and clock. Not `Send`: make it where it runs.
///
/// Tasks run only while the Context is driven, by `block_on` or `turn`. Other tasks may wait for
/// locks that they hold, so drop a Context that will not be driven for a while. Dropping it waits
/// for the operations in flight (after asking the kernel to cancel them); unfinished tasks and
/// sleeps move to the background Context and continue there.
#[derive(Debug)]
pub struct Context {
    local: Rc<Local>,
}

impl Context {
    /// Makes a Context of the host.
    pub fn new(options: ContextOptions) -> io::Result<Context> {
        Ok(Context { local: Rc::new(Local::new(&options)?) })
    }

    /// The engine in use: `Uring` or `Pool`.
    pub fn engine(&self) -> EngineKind {
        self.local.engine().borrow().kind()
    }

    /// Runs `future` to completion on this thread, driving this Context.
    ///
    /// May be called from inside a task of the same Context; other tasks then run inside it. To
    /// wait so for something that only the calling task can do is a deadlock, as with any lock.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _entered = current::enter(Current::Host(self.local.clone()));
        self.local.block_on(future)
    }

    /// Spawns onto this Context.
    pub fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        self.local.shared.spawn(future)
    }

    /// A handle with which other threads spawn onto this Context.
    pub fn handle(&self) -> ContextHandle {
        ContextHandle { shared: self.local.shared.clone() }
    }

    /// A descriptor that is readable when `turn` has something to do: for foreign event loops.
    ///
    /// Poll it for reading and call `turn(Some(Duration::ZERO))` when it is readable. From the
    /// first call on, every turn ends with arming the descriptor, which costs a little.
    /// `examples/event_loop.rs` shows a whole loop.
    ///
    /// # Panics
    /// If the process has no descriptors left.
    pub fn fd(&self) -> RawFd {
        let _entered = current::enter(Current::Host(self.local.clone()));
        self.local.fd().expect("an epoll and a timer descriptor can be made")
    }

    /// Runs ready tasks, reaps completions, and waits up to `timeout` (`None`: for ever; zero: not
    /// at all). True if a task ran or an operation completed.
    pub fn turn(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let _entered = current::enter(Current::Host(self.local.clone()));
        self.local.turn(timeout)
    }
}

/// Spawns onto a [`Context`] from any thread. If the Context is gone, tasks go to the background
/// one.
#[derive(Clone, Debug)]
pub struct ContextHandle {
    pub(crate) shared: Arc<Shared>,
}

impl ContextHandle {
    /// Spawns onto the Context.
    pub fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        self.shared.spawn(future)
    }

    pub(crate) fn submit(&self, op: Op, completion: Arc<Completion<OpResult>>) {
        self.shared.submit(op, completion);
    }

    pub(crate) fn add_timer(&self, deadline: Duration, completion: Arc<Completion<()>>) {
        self.shared.add_timer(deadline, completion);
    }
}

/// The background Context: it has a thread of its own, started on first use, and serves threads
/// that drive none.
pub(crate) fn background() -> io::Result<ContextHandle> {
    static BACKGROUND: Mutex<Option<ContextHandle>> = Mutex::new(None);
    thread_local! {
        static KNOWN: RefCell<Option<ContextHandle>> = const { RefCell::new(None) };
    }
    if let Ok(Some(known)) = KNOWN.try_with(|known| known.borrow().clone()) {
        return Ok(known);
    }
    let mut background = BACKGROUND.lock().unwrap_or_else(PoisonError::into_inner);
    let handle = match &*background {
        Some(handle) => handle.clone(),
        None => background.insert(start_background()?).clone(),
    };
    let _ = KNOWN.try_with(|known| known.replace(Some(handle.clone())));
    Ok(handle)
}

fn start_background() -> io::Result<ContextHandle> {
    let (sender, receiver) = mpsc::channel();
    workers::start_thread("bds-io", move || {
        let context = match Context::new(ContextOptions::default()) {
            Ok(context) => context,
            Err(error) => return drop(sender.send(Err(error))),
        };
        drop(sender.send(Ok(context.handle())));
        context.block_on(std::future::pending::<()>());
    })?;
    receiver.recv().unwrap_or_else(|_| Err(io::Error::other("the background thread ended")))
}

/// Ring entries of a plain thread's cached Context: it drives one future at a time, and the tasks
/// of that.
const CACHED_RING_ENTRIES: u32 = 64;
/// A plain thread's `block_on` waits so long for operations whose futures were dropped.
const ABANDONED_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs `future` to completion on this thread.
///
/// If a Context (or a simulated world) is entered, it is driven meanwhile, also from inside one of
/// its tasks. Else the thread gets a small Context of its own, cached until the thread ends, so
/// that operations and tasks need no other thread; tasks that are not done when this returns
/// continue in the background Context. BlockOps in flight whose futures were dropped are waited
/// for up to a second, so that files are released when this returns; those that a task waits for
/// are waited for, or go to a thread of the pool if the kernel can cancel them.
pub fn block_on<F: Future>(future: F) -> F::Output {
    match current::get() {
        Current::Host(local) => local.block_on(future),
        Current::Sim(sim) => sim.block_on(future),
        Current::None => match cached() {
            Some(context) => {
                let _leave = LeaveContext(&context);
                context.block_on(future)
            }
            None => park_on(future),
        },
    }
}

/// Ends a plain thread's `block_on`, also on a panic: its Context is not driven until the next one.
struct LeaveContext<'a>(&'a Context);

impl Drop for LeaveContext<'_> {
    fn drop(&mut self) {
        let local = &self.0.local;
        {
            // Tasks that the future cancelled are dropped here, not on another thread later.
            let _entered = current::enter(Current::Host(local.clone()));
            local.run_ready();
        }
        local.move_to_background();
        local.wait_in_flight(ABANDONED_TIMEOUT);
    }
}

/// A thread's cached Context, dropped when the thread ends.
struct Cached {
    context: Cell<Option<Rc<Context>>>,
    /// The process that made it. The child of a fork has neither the ring's memory nor the threads
    /// that may hold the executor's locks: when it exits, the Context is left as it is.
    process: Cell<u32>,
}

impl Drop for Cached {
    fn drop(&mut self) {
        let Some(context) = self.context.take() else { return };
        if self.process.get() != std::process::id() {
            std::mem::forget(context);
        }
    }
}

/// This thread's cached Context. `None` if it cannot have one (no descriptors left, or the thread
/// is ending).
fn cached() -> Option<Rc<Context>> {
    thread_local! {
        static CACHED: Cached = const { Cached { context: Cell::new(None), process: Cell::new(0) } };
    }
    CACHED
        .try_with(|Cached { context: cached, process }| {
            let context = cached.take().or_else(|| {
                process.set(std::process::id());
                let options = ContextOptions {
                    ring_entries: CACHED_RING_ENTRIES,
                    ..ContextOptions::default()
                };
                let local = Local::new(&options).ok()?;
                Some(Rc::new(Context { local: Rc::new(local) }))
            });
            cached.set(context.clone());
            context
        })
        .ok()
        .flatten()
}

/// Polls on this thread while the background Context does everything else.
fn park_on<F: Future>(future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = PollContext::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// Makes sure that tasks and operations of this thread have a Context: the one it drives, or the
/// background one, whose thread is started if needed. Call it early: without one, operations block
/// the thread that begins them, and tasks are polled by the threads that wake them.
///
/// # Errors
/// No thread (RLIMIT_NPROC, memory) or no descriptors are left.
pub fn ensure_context() -> io::Result<()> {
    match current::get() {
        Current::Sim(_) | Current::Host(_) => Ok(()),
        Current::None => background().map(drop),
    }
}

/// Spawns onto the current Context, or the shared background one. In a simulated world: onto that.
/// Without any (see [`ensure_context`]) the task is polled here, and later by the threads that wake
/// it.
#[track_caller]
pub fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Task<T> {
    match current::get() {
        Current::Sim(sim) => sim.spawn(future),
        Current::Host(local) => local.shared.spawn(future),
        Current::None => match background() {
            Ok(background) => background.spawn(future),
            Err(_) => {
                let (runnable, task) = task::create(future, executor::schedule_anywhere);
                runnable.schedule();
                task
            }
        },
    }
}

/// As [`spawn`], but polls the future once before it returns, on this thread and without a queue.
/// From then on its executor polls it, whether or not the handle is polled: a handle that is kept
/// or forgotten delays nothing. Dropping the handle drops the future before the drop returns; if
/// another thread polls the future just then, after that poll.
#[track_caller]
pub fn spawn_now<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Task<T> {
    match current::get() {
        Current::Sim(sim) => sim.spawn_now(future),
        Current::Host(local) => local.shared.spawn_now(future),
        Current::None => match background() {
            Ok(background) => background.shared.spawn_now(future),
            Err(_) => {
                let (runnable, task) =
                    task::create_dropped_with_handle(future, executor::schedule_anywhere);
                runnable.run();
                task
            }
        },
    }
}

/// Runs CPU-heavy `work` on the CPU thread pool (simulated: inline, at a seeded moment). If the
/// future is dropped, the work still runs to completion. A panic of the work is passed on to the
/// future.
pub async fn spawn_cpu<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    if let Some(sim) = simulation() {
        return sim.spawn_cpu(work).await;
    }
    let mut work = Some(work);
    let mut completion = None;
    let outcome = std::future::poll_fn(move |cx| {
        if let Some(work) = work.take() {
            let result = Completion::new(cx.waker().clone());
            completion = Some(result.clone());
            let mut job = Some(move || result.complete(catch_unwind(AssertUnwindSafe(work))));
            let is_taken = workers::cpu().submit(|| Box::new(job.take().expect("called once")));
            if !is_taken && let Some(job) = job {
                job();
            }
        }
        completion
            .as_ref()
            .map_or(Poll::Pending, |completion: &Arc<Completion<_>>| completion.poll(cx))
    })
    .await;
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Time since an arbitrary start; virtual in a simulated world.
pub fn now() -> Duration {
    current::with(|current| match current {
        Current::Sim(sim) => sim.now(),
        _ => clock::now(),
    })
}

/// Bytes that no other call returns, on this machine or elsewhere: for ids. Not for secrets. In a
/// simulated world they follow from its seed.
pub fn random_id() -> [u8; 16] {
    let halves = current::with(|current| match current {
        Current::Sim(sim) => sim.random_id(),
        // Keys that the standard library draws from the system, different for each state.
        _ => [0; 2].map(|salt: u64| RandomState::new().hash_one(salt)),
    });
    let mut id = [0; 16];
    for (out, half) in id.chunks_exact_mut(8).zip(halves) {
        out.copy_from_slice(&half.to_le_bytes());
    }
    id
}

/// Waits; in virtual time in a simulated world. On the host never less than `how_long`.
pub async fn sleep(how_long: Duration) {
    match simulation() {
        Some(sim) => sim.sleep(how_long).await,
        None => Sleep::new(how_long).await,
    }
}

/// Lets other ready tasks run once.
pub async fn yield_now() {
    if let Some(sim) = simulation() {
        return sim.yield_now().await;
    }
    let mut is_first = true;
    std::future::poll_fn(move |cx| {
        if std::mem::take(&mut is_first) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    })
    .await;
}

fn simulation() -> Option<crate::Sim> {
    current::with(|current| match current {
        Current::Sim(sim) => Some(sim.clone()),
        _ => None,
    })
}

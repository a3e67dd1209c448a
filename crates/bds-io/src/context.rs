//! A Context is one thread's executor, engine and clock; the free functions find the one that is meant.
//!
//! ```text
//! thread drives a Context (block_on, turn)  → that Context
//! thread runs Sim::block_on                 → the simulated world
//! plain thread in bds_io::block_on          → its own cached Context
//! anything else (tokio, a VMM's loop)       → the background Context, one thread for the process
//! ```
//!
//! Whatever begins an operation may be dropped or forgotten at any await: the engine owns the operation until
//! it is over. A task is not bound to the life of its Context either: what a dropped Context leaves, and what is
//! left when a plain thread's `block_on` returns, goes on in the background one.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Context as PollContext, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use crate::cell::AnswerCell;
use crate::clock::{self, Sleep};
use crate::current::{self, Current};
use crate::executor::{self, Local, Shared};
use crate::op::{Answer, Op};
use crate::task::{self, Task};
use crate::workers;

/// Which engine moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// io_uring where the kernel has it, else the pool. `BDS_ENGINE=uring|pool` decides instead if set.
    #[default]
    Auto,
    /// io_uring only.
    Uring,
    /// Blocking calls on threads.
    Pool,
}

/// How a Context is made.
#[derive(Clone, Debug)]
pub struct ContextOptions {
    /// Which engine.
    pub engine: EngineKind,
    /// Entries of the submission queue (8 to 4096, rounded up to a power of two). More operations than that
    /// may be in flight; they then take more than one system call a turn.
    pub ring_entries: u32,
}

impl Default for ContextOptions {
    fn default() -> ContextOptions {
        ContextOptions { engine: EngineKind::Auto, ring_entries: 256 }
    }
}

/// One thread's executor, engine and clock. Not `Send`: make it where it runs.
///
/// Tasks run only while the Context is driven, by `block_on` or `turn`. Other threads may wait for what they hold, so a
/// thread that is not going to drive its Context for a while drops it. Dropping it waits for the operations
/// in flight (after asking the kernel to give up what it can); unfinished tasks and sleeps move to the
/// background Context and go on there.
#[derive(Debug)]
pub struct Context {
    local: Rc<Local>,
}

impl Context {
    /// A Context on the host.
    pub fn new(options: ContextOptions) -> io::Result<Context> {
        Ok(Context { local: Rc::new(Local::new(&options)?) })
    }

    /// Which engine it got: `Uring` or `Pool`.
    pub fn engine(&self) -> EngineKind {
        self.local.engine().borrow().kind()
    }

    /// Runs `future` to its end on this thread, driving this Context.
    ///
    /// May be called from inside a task of the same Context; other tasks then run inside it. Waiting so for
    /// something that only the calling task can do is a deadlock, as with any lock.
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

    /// Lets other threads spawn onto this Context.
    pub fn handle(&self) -> ContextHandle {
        ContextHandle { shared: self.local.shared.clone() }
    }

    /// Readable when `turn` has something to do: for foreign event loops.
    ///
    /// Poll it for reading and call `turn(Some(Duration::ZERO))` when it is. From the first call on, every
    /// turn ends with the descriptor telling the truth, which costs a little. Panics if the process has no
    /// descriptors left.
    pub fn fd(&self) -> RawFd {
        let _entered = current::enter(Current::Host(self.local.clone()));
        self.local.fd().expect("an epoll and a timer descriptor can be made")
    }

    /// Runs what is ready, reaps completions, waits up to `timeout` (None: forever; zero: not at all). True
    /// if anything ran.
    pub fn turn(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let _entered = current::enter(Current::Host(self.local.clone()));
        self.local.turn(timeout)
    }
}

/// Spawns onto a Context from any thread. If the Context is gone, tasks go to the background one.
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

    pub(crate) fn submit(&self, op: Op, cell: Arc<AnswerCell<Answer>>) {
        self.shared.submit(op, cell);
    }

    pub(crate) fn add_timer(&self, deadline: Duration, cell: Arc<AnswerCell<()>>) {
        self.shared.add_timer(deadline, cell);
    }
}

/// The Context of a thread of its own, for whoever has none. Started on first use.
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
    let (tell, hear) = mpsc::channel();
    workers::start_thread("bds-io", move || {
        let context = match Context::new(ContextOptions::default()) {
            Ok(context) => context,
            Err(error) => return drop(tell.send(Err(error))),
        };
        drop(tell.send(Ok(context.handle())));
        context.block_on(std::future::pending::<()>());
    })?;
    hear.recv().unwrap_or_else(|_| Err(io::Error::other("the background thread ended")))
}

/// Entries of a plain thread's own ring: it drives one future at a time, and what that spawns.
const CACHED_RING_ENTRIES: u32 = 64;
/// How long a plain thread waits for operations that its future left behind.
const SETTLE_PATIENCE: Duration = Duration::from_secs(1);

/// Runs `future` on this thread.
///
/// If a Context (or a simulated world) is entered, it is driven meanwhile, also from inside one of its tasks.
/// Else the thread gets a small Context of its own, kept until it ends, so that operations and tasks need no other
/// thread; tasks that are not done when this returns go on in the background Context. Operations in flight that
/// nothing waits for any more are waited for up to a second, so that files are let go when this returns; those that
/// a task waits for are waited for, or go to a thread of the pool if the kernel can give them up.
pub fn block_on<F: Future>(future: F) -> F::Output {
    match current::get() {
        Current::Host(local) => local.block_on(future),
        Current::Sim(sim) => sim.block_on(future),
        Current::None => match cached() {
            Some(context) => {
                let _leaving = Leaving(&context);
                context.block_on(future)
            }
            None => park_on(future),
        },
    }
}

/// A plain thread's `block_on` ends, also by a panic: its Context is not driven until the next one.
struct Leaving<'a>(&'a Context);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let local = &self.0.local;
        {
            // What the future cancelled when it ended is dropped here and now, not on another thread later.
            let _entered = current::enter(Current::Host(local.clone()));
            local.run_ready();
        }
        local.hand_over();
        local.settle(SETTLE_PATIENCE);
    }
}

/// This thread's own Context. None if it cannot have one (no descriptors left, or the thread is ending).
fn cached() -> Option<Rc<Context>> {
    thread_local! {
        static CACHED: Cell<Option<Rc<Context>>> = const { Cell::new(None) };
    }
    CACHED
        .try_with(|cached| {
            let context = cached.take().or_else(|| {
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

/// Makes sure that tasks and operations of this thread have a Context: the one it drives, or the background one, whose
/// thread is started if need be. To be asked early: without one, operations block the thread that begins them, and
/// tasks are polled by the threads that wake them.
///
/// # Errors
/// The machine gives no thread (RLIMIT_NPROC, memory), or no descriptors.
pub fn ensure_home() -> io::Result<()> {
    match current::get() {
        Current::Sim(_) | Current::Host(_) => Ok(()),
        Current::None => background().map(drop),
    }
}

/// Spawns onto the current Context, or the shared background one. In a simulated Context: onto that. Without any (see
/// [`ensure_home`]) the task is polled here, and later by the threads that wake it.
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

/// As [`spawn`], but polls the future once before it returns, on this thread and without a queue. From then on its
/// executor polls it, whether or not the answer is polled: keeping the answer, or forgetting it, holds nothing up.
/// Dropping it drops the future before the drop returns; if another thread polls the future just then, after that poll.
#[track_caller]
pub fn spawn_now<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Task<T> {
    match current::get() {
        Current::Sim(sim) => sim.spawn_now(future),
        Current::Host(local) => local.shared.spawn_now(future),
        Current::None => match background() {
            Ok(background) => background.shared.spawn_now(future),
            Err(_) => {
                let (runnable, task) = task::create_gripped(future, executor::schedule_anywhere);
                runnable.run();
                task
            }
        },
    }
}

/// Runs CPU-heavy `work` on the worker pool (simulated: inline, finishing at a seeded moment). If the future
/// is dropped, the work still runs to its end. A panic of the work is passed on.
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    if let Some(sim) = simulation() {
        return sim.offload(work).await;
    }
    let mut work = Some(work);
    let mut cell = None;
    let outcome = std::future::poll_fn(move |cx| {
        if let Some(work) = work.take() {
            let answer = AnswerCell::new(cx.waker().clone());
            cell = Some(answer.clone());
            let mut job = Some(move || answer.complete(catch_unwind(AssertUnwindSafe(work))));
            let is_taken = workers::cpu().submit(|| Box::new(job.take().expect("called once")));
            if !is_taken && let Some(job) = job {
                job();
            }
        }
        cell.as_ref().map_or(Poll::Pending, |cell: &Arc<AnswerCell<_>>| cell.poll(cx))
    })
    .await;
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Time since an arbitrary start; virtual in a simulated Context.
pub fn now() -> Duration {
    current::with(|world| match world {
        Current::Sim(sim) => sim.now(),
        _ => clock::now(),
    })
}

/// Waits; virtual in a simulated Context. On the host never less than `how_long`.
pub async fn sleep(how_long: Duration) {
    match simulation() {
        Some(sim) => sim.sleep(how_long).await,
        None => Sleep::new(how_long).await,
    }
}

/// Lets others run.
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
    current::with(|world| match world {
        Current::Sim(sim) => Some(sim.clone()),
        _ => None,
    })
}

//! A Context is one thread's executor, engine and clock.

use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::task::{self, Poll};
use std::time::Duration;

use crate::current::{self, Current};

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
#[derive(Clone, Debug, Default)]
pub struct ContextOptions {
    /// Which engine.
    pub engine: EngineKind,
}

/// What the owning thread alone touches.
#[derive(Debug)]
pub(crate) struct Local {}

/// One thread's executor, engine and clock. Not `Send`: make it where it runs.
#[derive(Debug)]
pub struct Context {
    _not_send: std::marker::PhantomData<*mut ()>,
}

impl Context {
    /// A Context on the host.
    pub fn new(options: ContextOptions) -> io::Result<Context> {
        let _ = options;
        todo!()
    }
    /// Runs `future` to its end on this thread, driving this Context.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _ = future;
        todo!()
    }
    /// Spawns onto this Context.
    pub fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let _ = future;
        todo!()
    }
    /// Readable when `turn` has something to do: for foreign event loops.
    pub fn fd(&self) -> RawFd {
        todo!()
    }
    /// Runs what is ready, reaps completions, waits up to `timeout` (None: forever; zero: not at all). True if anything ran.
    pub fn turn(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let _ = timeout;
        todo!()
    }
}

/// A spawned future. Dropping it cancels; `detach` lets it run on.
#[derive(Debug)]
#[must_use = "dropping a Task cancels it; await or detach it"]
pub struct Task<T>(pub(crate) async_task::Task<T>);

impl<T> Task<T> {
    /// Lets the task run to its end without anyone waiting.
    pub fn detach(self) {
        self.0.detach();
    }
}

impl<T> Future for Task<T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<T> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// Runs `future` on this thread: on its Context if one is entered, else parked while the shared background Context does I/O.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let _ = future;
    todo!()
}

/// Spawns onto the current Context, or the shared background one. In a simulated Context: onto that.
#[track_caller]
pub fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Task<T> {
    match current::get() {
        Current::Sim(sim) => sim.spawn(future),
        _ => todo!(),
    }
}

/// Runs CPU-heavy `work` on the worker pool (simulated: inline, finishing at a seeded moment).
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let sim = match current::get() {
        Current::Sim(sim) => Some(sim),
        _ => None,
    };
    match sim {
        Some(sim) => sim.offload(work).await,
        None => todo!(),
    }
}

/// Time since an arbitrary start; virtual in a simulated Context.
pub fn now() -> Duration {
    match current::get() {
        Current::Sim(sim) => sim.now(),
        _ => todo!(),
    }
}

/// Waits; virtual in a simulated Context.
pub async fn sleep(how_long: Duration) {
    let sim = match current::get() {
        Current::Sim(sim) => Some(sim),
        _ => None,
    };
    match sim {
        Some(sim) => sim.sleep(how_long).await,
        None => todo!(),
    }
}

/// Lets others run.
pub async fn yield_now() {
    let sim = match current::get() {
        Current::Sim(sim) => Some(sim),
        _ => None,
    };
    match sim {
        Some(sim) => sim.yield_now().await,
        None => todo!(),
    }
}

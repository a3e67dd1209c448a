//! A Context is one thread's executor, engine and clock.

use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::task::{self, Poll};
use std::time::Duration;

/// Which engine moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// io_uring where the kernel has it, else the pool.
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
pub struct Task<T>(std::marker::PhantomData<T>);

impl<T> Task<T> {
    /// Lets the task run to its end without anyone waiting.
    pub fn detach(self) {
        todo!()
    }
}

impl<T> Future for Task<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, _cx: &mut task::Context<'_>) -> Poll<T> {
        todo!()
    }
}

/// Runs `future` on this thread: on its Context if one is entered, else parked while the shared background Context does I/O.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let _ = future;
    todo!()
}

/// Spawns onto the current Context, or the shared background one. In a simulated Context: onto that.
pub fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Task<T> {
    let _ = future;
    todo!()
}

/// Runs CPU-heavy `work` on the worker pool (simulated: inline, finishing at a seeded moment).
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let _ = work;
    todo!()
}

/// Time since an arbitrary start; virtual in a simulated Context.
pub fn now() -> Duration {
    todo!()
}

/// Waits; virtual in a simulated Context.
pub async fn sleep(how_long: Duration) {
    let _ = how_long;
    todo!()
}

/// Lets others run.
pub async fn yield_now() {
    todo!()
}

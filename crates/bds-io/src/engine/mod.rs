//! I/O engines: execute operations through io_uring or on threads that block.
//!
//! An engine belongs to one thread's Context. It owns every operation from `submit` on, and stores
//! the result in its `Completion`, which wakes the task.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::completion::Completion;
use crate::context::{ContextOptions, EngineKind};
use crate::op::{Op, OpResult};
use crate::sys;
use crate::workers;

mod uring;

use uring::Uring;

/// An I/O engine, by kind.
#[derive(Debug)]
pub(crate) enum Engine {
    Uring(Box<Uring>),
    /// Threads complete operations and wake this one through its eventfd.
    Pool,
}

impl Engine {
    /// `wake` is the Context's eventfd, on which `wait` also waits.
    pub(crate) fn new(options: &ContextOptions, wake: &Arc<OwnedFd>) -> io::Result<Engine> {
        let kind = match (options.engine, std::env::var("BDS_ENGINE").as_deref()) {
            (EngineKind::Auto, Ok("uring")) => EngineKind::Uring,
            (EngineKind::Auto, Ok("pool")) => EngineKind::Pool,
            (EngineKind::Auto, Ok(other)) if !other.is_empty() => {
                let text = format!("BDS_ENGINE is \"{other}\"; it may be \"uring\" or \"pool\"");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            (kind, _) => kind,
        };
        match kind {
            EngineKind::Pool => Ok(Engine::Pool),
            EngineKind::Uring => Ok(Engine::Uring(Box::new(Uring::new(options, wake)?))),
            EngineKind::Auto => Ok(match Uring::new(options, wake) {
                Ok(uring) => Engine::Uring(Box::new(uring)),
                Err(_) => Engine::Pool,
            }),
        }
    }

    pub(crate) fn kind(&self) -> EngineKind {
        match self {
            Engine::Uring(_) => EngineKind::Uring,
            Engine::Pool => EngineKind::Pool,
        }
    }

    /// Takes the operation over. It may reach the kernel only with the next `flush` or `wait`. One
    /// that is done already, because no thread could be started for it, is returned: to be
    /// delivered when nothing is borrowed.
    pub(crate) fn submit(
        &mut self,
        op: Op,
        completion: Arc<Completion<OpResult>>,
    ) -> Option<Completed> {
        match self {
            Engine::Uring(uring) => uring.submit(op, completion),
            Engine::Pool => run_on_worker(op, completion),
        }
    }

    /// Submits what is queued and reaps what is done, without waiting.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.flush(),
            Engine::Pool => Ok(()),
        }
    }

    /// Reaps what is done. What is queued stays so until the next `flush` or `wait`, which must
    /// follow.
    pub(crate) fn reap_done(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.reap_done(),
            Engine::Pool => Ok(()),
        }
    }

    /// As `flush`, but waits up to `timeout` (`None`: for ever) for a completion or a signal on the
    /// eventfd.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>, wake: &OwnedFd) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.wait(timeout),
            Engine::Pool => {
                if wait_readable(wake.as_fd(), timeout)? {
                    sys::clear(wake);
                }
                Ok(())
            }
        }
    }

    /// An eventfd that becomes readable when `flush` would reap something; `None`: only the
    /// Context's eventfd does.
    pub(crate) fn event_fd(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        match self {
            Engine::Uring(uring) => uring.event_fd().map(Some),
            Engine::Pool => Ok(None),
        }
    }

    /// Stops signals on the eventfd while the engine is driven.
    pub(crate) fn disable_event_fd(&mut self) {
        if let Engine::Uring(uring) = self {
            uring.disable_event_fd();
        }
    }

    /// Clears the eventfd and allows signals again. A `flush` must follow: completions until now
    /// did not signal.
    pub(crate) fn enable_event_fd(&mut self) {
        if let Engine::Uring(uring) = self {
            uring.enable_event_fd();
        }
    }

    /// Swaps the list of completed operations with `other`, which is empty.
    pub(crate) fn swap_completed(&mut self, other: &mut Vec<Completed>) {
        if let Engine::Uring(uring) = self {
            uring.swap_completed(other);
        }
    }

    /// Asks the kernel to cancel the operations that a future waits for; those that it cancels go
    /// to a thread.
    pub(crate) fn cancel_awaited(&mut self) {
        if let Engine::Uring(uring) = self {
            uring.cancel_awaited();
        }
    }

    /// True if an operation is in flight that only its own thread can reap and that a future waits
    /// for.
    pub(crate) fn has_awaited(&self) -> bool {
        match self {
            Engine::Uring(uring) => uring.has_awaited(),
            Engine::Pool => false,
        }
    }

    /// Number of operations in flight that only its own thread can reap.
    pub(crate) fn in_flight(&self) -> usize {
        match self {
            Engine::Uring(uring) => uring.in_flight(),
            Engine::Pool => 0,
        }
    }
}

/// A completed operation whose result is not delivered yet.
#[derive(Debug)]
pub(crate) struct Completed {
    op: Op,
    completion: Arc<Completion<OpResult>>,
    result: OpResult,
}

impl Completed {
    /// Releases file and memory, then stores the result and wakes the task. Both may run foreign
    /// code (the drop of an anchor, an executor's waker), so nothing may be borrowed here.
    pub(crate) fn deliver(self) {
        let Completed { op, completion, result } = self;
        // First: code that saw the result may rely on file and memory being released.
        drop(op);
        completion.complete(result);
    }
}

/// Executes an operation on a thread of the I/O pool. Without a thread it is executed here, and
/// returned.
fn run_on_worker(op: Op, completion: Arc<Completion<OpResult>>) -> Option<Completed> {
    let mut parts = Some((op, completion));
    let run = |(op, completion): (Op, Arc<Completion<OpResult>>)| {
        let result = op.run();
        Completed { op, completion, result }
    };
    let is_taken = workers::io().submit(|| {
        let parts = parts.take();
        Box::new(move || {
            if let Some(parts) = parts {
                run(parts).deliver();
            }
        })
    });
    if is_taken { None } else { parts.map(run) }
}

/// Waits until `fd` is readable. Rounds up to whole milliseconds, so that a timer is due when it
/// returns.
fn wait_readable(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<bool> {
    let timeout = match timeout {
        None => PollTimeout::NONE,
        Some(timeout) => {
            let ms = timeout.as_nanos().div_ceil(1_000_000);
            PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
        Ok(count) => Ok(count > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

//! Who carries operations out: the kernel's ring, or threads that block.
//!
//! An engine belongs to one thread's Context. It owns every operation from `submit` to its completion and
//! puts the answer in the operation's cell, which wakes the task.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cell::AnswerCell;
use crate::context::{ContextOptions, EngineKind};
use crate::op::{Answer, Op};
use crate::sys;
use crate::workers;

mod uring;

use uring::Uring;

/// An engine, by kind.
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

    /// Takes the operation over. It may reach the kernel only with the next `flush` or `wait`. One that is over already,
    /// because no thread could be had for it, is returned: to be told when nothing is borrowed.
    pub(crate) fn submit(&mut self, op: Op, cell: Arc<AnswerCell<Answer>>) -> Option<Landed> {
        match self {
            Engine::Uring(uring) => uring.submit(op, cell),
            Engine::Pool => run_on_worker(op, cell),
        }
    }

    /// Hands over what is queued and reaps what is done, without waiting.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.flush(),
            Engine::Pool => Ok(()),
        }
    }

    /// Reaps what is done. What is queued stays so until the next `flush` or `wait`, which the caller owes.
    pub(crate) fn reap_done(&mut self) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.reap_done(),
            Engine::Pool => Ok(()),
        }
    }

    /// As `flush`, but waits up to `timeout` (None: forever) for a completion or a signal on the eventfd.
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

    /// What becomes readable when `flush` would reap something; None: only the Context's eventfd does.
    pub(crate) fn bell(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        match self {
            Engine::Uring(uring) => uring.bell().map(Some),
            Engine::Pool => Ok(None),
        }
    }

    /// Silences the bell, or clears it and lets it ring again. Whoever lets it ring must flush afterwards:
    /// what came meanwhile did not ring.
    pub(crate) fn set_bell(&mut self, is_on: bool) {
        if let Engine::Uring(uring) = self {
            uring.set_bell(is_on);
        }
    }

    /// Exchanges the list of finished operations for an empty one.
    pub(crate) fn swap_landed(&mut self, other: &mut Vec<Landed>) {
        if let Engine::Uring(uring) = self {
            uring.swap_landed(other);
        }
    }

    /// Asks the kernel to give up what a future waits for; what it gives up goes to a thread.
    pub(crate) fn withdraw_awaited(&mut self) {
        if let Engine::Uring(uring) = self {
            uring.withdraw_awaited();
        }
    }

    /// Is an operation in flight that only its own thread can reap and that a future waits for?
    pub(crate) fn has_awaited(&self) -> bool {
        match self {
            Engine::Uring(uring) => uring.has_awaited(),
            Engine::Pool => false,
        }
    }

    /// Operations that this engine has not finished and that only its own thread can reap.
    pub(crate) fn in_flight(&self) -> usize {
        match self {
            Engine::Uring(uring) => uring.in_flight(),
            Engine::Pool => 0,
        }
    }
}

/// A finished operation, not yet told.
#[derive(Debug)]
pub(crate) struct Landed {
    op: Op,
    cell: Arc<AnswerCell<Answer>>,
    answer: Answer,
}

impl Landed {
    /// Lets go of file and memory, then wakes the waiter. Both may run foreign code (the drop of an anchor,
    /// an executor's waker), so nothing may be borrowed here.
    pub(crate) fn tell(self) {
        let Landed { op, cell, answer } = self;
        // First: whoever saw the end may rely on file and memory being let go.
        drop(op);
        cell.complete(answer);
    }
}

/// Lets a thread of the I/O pool do a blocking operation. Without a thread it is done here and now, and returned.
fn run_on_worker(op: Op, cell: Arc<AnswerCell<Answer>>) -> Option<Landed> {
    let mut parts = Some((op, cell));
    let run = |(op, cell): (Op, Arc<AnswerCell<Answer>>)| {
        let answer = op.run();
        Landed { op, cell, answer }
    };
    let is_taken = workers::io().submit(|| {
        let parts = parts.take();
        Box::new(move || {
            if let Some(parts) = parts {
                run(parts).tell();
            }
        })
    });
    if is_taken { None } else { parts.map(run) }
}

/// Waits until `fd` is readable. Rounds up to whole milliseconds, so that a timer is due when it returns.
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

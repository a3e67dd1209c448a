//! Executor of one thread: run queue, timers and engine, and the inbox for other threads.
//!
//! `Local` is used by its thread alone, `Shared` by all. A wake-up on the own thread costs a push
//! to a queue; one from another thread goes through the inbox, and a signal on the eventfd only if
//! the thread sleeps.
//!
//! Sleep and wake-up: the sleeper stores `SLEEPING` and then checks the inbox; the waker pushes to
//! the inbox and then checks for `SLEEPING`. With a sequentially consistent fence between the two
//! steps on both sides, at least one sees the other. A Context that is not driven any more
//! (`UNDRIVEN`: it was dropped, or it is a plain thread's between two calls of `block_on`) works
//! the same way: what is sent to it goes to the background one.
//!
//! Invariant: no `RefCell` here is borrowed while foreign code runs (tasks, wakers, drops of
//! anchors).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering, fence};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use crossbeam::queue::SegQueue;

use crate::clock::{self, Timer, Timers};
use crate::completion::Completion;
use crate::context::{ContextOptions, background};
use crate::current::{self, Current};
use crate::engine::{Completed, Engine};
use crate::inline;
use crate::long_write::LongWrites;
use crate::op::{Op, OpResult};
use crate::sys;
use crate::task::{self, Runnable, Task};

/// Tasks that run before the engine is polled again.
const TURN_TASKS_MAX: usize = 256;

const AWAKE: u8 = 0;
const SLEEPING: u8 = 1;
const UNDRIVEN: u8 = 2;

/// A message from another thread to a Context.
#[derive(Debug)]
enum Message {
    Run(Runnable),
    Submit(Op, Arc<Completion<OpResult>>),
    Timer(Duration, Arc<Completion<()>>),
}

impl Message {
    /// Executes it on this thread. Blocks for an operation and for a timer.
    fn run(self) {
        inline::run(Box::new(move || match self {
            Message::Run(runnable) => drop(runnable.run()),
            Message::Submit(op, completion) => {
                let result = op.run();
                drop(op);
                completion.complete(result);
            }
            Message::Timer(deadline, completion) => {
                thread::sleep(deadline.saturating_sub(clock::now()));
                completion.complete(());
            }
        }));
    }
}

/// Sends to the background Context. If no thread can be started for that, the message is executed
/// here: a task is then polled by the threads that wake it.
fn send_to_background(message: Message) {
    match background() {
        Ok(background) => background.shared.send(message),
        Err(_) => message.run(),
    }
}

/// Schedules a task that was spawned without a Context.
pub(crate) fn schedule_anywhere(runnable: Runnable) {
    send_to_background(Message::Run(runnable));
}

/// The part of a Context that every thread may use.
#[derive(Debug)]
pub(crate) struct Shared {
    inbox: SegQueue<Message>,
    state: AtomicU8,
    /// Eventfd that wakes the sleeping thread.
    wake_fd: Arc<OwnedFd>,
}

impl Shared {
    pub(crate) fn spawn<T: Send + 'static>(
        self: &Arc<Shared>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let shared = self.clone();
        let (runnable, task) = task::create(future, move |runnable| shared.schedule(runnable));
        runnable.schedule();
        task
    }

    /// As [`Shared::spawn`], but polls it once before it returns, on this thread.
    pub(crate) fn spawn_now<T: Send + 'static>(
        self: &Arc<Shared>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let shared = self.clone();
        let (runnable, task) =
            task::create_dropped_with_handle(future, move |runnable| shared.schedule(runnable));
        runnable.run();
        task
    }

    fn schedule(&self, runnable: Runnable) {
        let rest = current::with(|current| match current {
            Current::Host(local) if std::ptr::eq(&raw const *local.shared, self) => {
                local.queue.borrow_mut().push_back(runnable);
                None
            }
            _ => Some(runnable),
        });
        if let Some(runnable) = rest {
            self.send(Message::Run(runnable));
        }
    }

    pub(crate) fn submit(&self, op: Op, completion: Arc<Completion<OpResult>>) {
        self.send(Message::Submit(op, completion));
    }

    pub(crate) fn add_timer(&self, deadline: Duration, completion: Arc<Completion<()>>) {
        self.send(Message::Timer(deadline, completion));
    }

    fn send(&self, message: Message) {
        self.inbox.push(message);
        self.notify();
    }

    /// Wakes the thread if it sleeps. Call it after the push.
    fn notify(&self) {
        fence(Ordering::SeqCst);
        match self.state.load(Ordering::Relaxed) {
            AWAKE => {}
            UNDRIVEN => self.forward_to_background(),
            _ => {
                let woken = self.state.compare_exchange(
                    SLEEPING,
                    AWAKE,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                match woken {
                    Ok(_) => sys::signal(&self.wake_fd),
                    Err(UNDRIVEN) => self.forward_to_background(),
                    Err(_) => {}
                }
            }
        }
    }

    /// Moves the inbox to the background Context, because this one is not driven.
    fn forward_to_background(&self) {
        while let Some(message) = self.inbox.pop() {
            send_to_background(message);
        }
    }
}

/// Waker of the future that `block_on` polls.
#[derive(Debug)]
struct MainWaker {
    is_ready: AtomicBool,
    shared: Arc<Shared>,
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_ready.store(true, Ordering::Release);
        let is_own_thread = current::with(
            |current| matches!(current, Current::Host(local) if Arc::ptr_eq(&local.shared, &self.shared)),
        );
        if !is_own_thread {
            self.shared.notify();
        }
    }
}

/// For foreign event loops: one epoll descriptor over everything that may wake the Context.
#[derive(Debug)]
struct Pollable {
    epoll: nix::sys::epoll::Epoll,
    timer: nix::sys::timerfd::TimerFd,
}

/// The part of a Context that only its thread uses.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) shared: Arc<Shared>,
    queue: RefCell<VecDeque<Runnable>>,
    timers: RefCell<Timers>,
    engine: RefCell<Engine>,
    completed: RefCell<Vec<Completed>>,
    /// BlockOps executed by `submit`, because no thread could be started for them; not delivered
    /// yet.
    completed_at_submit: RefCell<Vec<Completed>>,
    main: RefCell<Option<Arc<MainWaker>>>,
    pollable: RefCell<Option<Pollable>>,
    /// Nested calls that drive this Context.
    depth: Cell<u32>,
    pub(crate) long_writes: LongWrites,
}

impl Local {
    pub(crate) fn new(options: &ContextOptions) -> io::Result<Local> {
        let wake_fd = Arc::new(sys::eventfd()?);
        let engine = RefCell::new(Engine::new(options, &wake_fd)?);
        let shared = Shared { inbox: SegQueue::new(), state: AtomicU8::new(AWAKE), wake_fd };
        Ok(Local {
            shared: Arc::new(shared),
            queue: RefCell::default(),
            timers: RefCell::default(),
            engine,
            completed: RefCell::default(),
            completed_at_submit: RefCell::default(),
            main: RefCell::default(),
            pollable: RefCell::default(),
            depth: Cell::new(0),
            long_writes: LongWrites::default(),
        })
    }

    pub(crate) fn engine(&self) -> &RefCell<Engine> {
        &self.engine
    }

    pub(crate) fn submit(&self, op: Op, completion: Arc<Completion<OpResult>>) {
        let completed = self.engine.borrow_mut().submit(op, completion);
        self.completed_at_submit.borrow_mut().extend(completed);
    }

    /// Adds a timer; the caller drops what is returned, with nothing borrowed.
    pub(crate) fn add_timer(
        &self,
        deadline: Duration,
        completion: Arc<Completion<()>>,
    ) -> Vec<Timer> {
        self.timers.borrow_mut().add(deadline, completion)
    }

    /// Runs `future` to completion, and the tasks of this Context meanwhile. The Context must be
    /// entered.
    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let main = self.main.take().unwrap_or_else(|| {
            let is_ready = AtomicBool::new(true);
            Arc::new(MainWaker { is_ready, shared: self.shared.clone() })
        });
        main.is_ready.store(true, Ordering::Relaxed);
        let waker = Waker::from(main.clone());
        let mut cx = Context::from_waker(&waker);
        let driving = self.drive();
        // A turn that is followed by another at once leaves its submissions to that one: most often
        // the next turn waits, and one system call does both. Never twice in a row, so that busy
        // tasks do not keep operations from the kernel.
        let mut was_deferred = false;
        let output = loop {
            if main.is_ready.swap(false, Ordering::Acquire)
                && let Poll::Ready(output) = future.as_mut().poll(&mut cx)
            {
                break output;
            }
            self.run_ready();
            let is_busy = main.is_ready.load(Ordering::Relaxed) || self.has_ready();
            was_deferred = is_busy && !was_deferred;
            let step = if was_deferred {
                self.reap_done()
            } else if is_busy {
                self.flush()
            } else {
                self.sleep(None, || main.is_ready.load(Ordering::Relaxed))
            };
            step.expect("the ring takes operations; its descriptor is ours and open");
        };
        if was_deferred {
            self.flush().expect("the ring takes operations; its descriptor is ours and open");
        }
        drop(driving);
        drop(waker);
        // Kept for the next call. A clone of the waker that is still held can only cause a spurious
        // wake-up.
        self.main.replace(Some(main));
        output
    }

    /// One turn for a foreign event loop. True if a task ran or an operation or timer completed.
    pub(crate) fn turn(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let _driving = self.drive();
        let mut did = self.run_ready();
        if did || self.has_ready() {
            // The flush below submits what is queued.
            did |= self.reap_done()?;
        } else {
            did |= self.sleep(timeout, || false)?;
        }
        did |= self.run_ready();
        did |= self.flush()?;
        Ok(did)
    }

    /// Marks the thread as awake until the guard is dropped.
    fn drive(&self) -> Driving<'_> {
        self.depth.set(self.depth.get() + 1);
        if self.pollable.borrow().is_some() {
            self.engine.borrow_mut().disable_event_fd();
        }
        self.shared.state.store(AWAKE, Ordering::Relaxed);
        Driving(self)
    }

    fn has_ready(&self) -> bool {
        !self.queue.borrow().is_empty() || !self.shared.inbox.is_empty()
    }

    /// Takes the inbox, fires timers, runs the tasks that are ready now (not those that become
    /// ready meanwhile).
    pub(crate) fn run_ready(&self) -> bool {
        let mut did = self.take_inbox();
        did |= self.fire_timers();
        let count = self.queue.borrow().len().min(TURN_TASKS_MAX);
        for _ in 0..count {
            let runnable = self.queue.borrow_mut().pop_front();
            let Some(runnable) = runnable else { break };
            runnable.run();
            did = true;
        }
        did
    }

    fn take_inbox(&self) -> bool {
        // What arrives meanwhile waits for the next turn, so that a flood cannot prolong this one.
        let count = self.shared.inbox.len();
        for _ in 0..count {
            match self.shared.inbox.pop() {
                Some(Message::Run(runnable)) => self.queue.borrow_mut().push_back(runnable),
                Some(Message::Submit(op, completion)) => self.submit(op, completion),
                Some(Message::Timer(deadline, completion)) => {
                    drop(self.add_timer(deadline, completion))
                }
                None => break,
            }
        }
        count > 0
    }

    fn fire_timers(&self) -> bool {
        if self.timers.borrow().next().is_none() {
            return false;
        }
        let now = clock::now();
        let mut did = false;
        loop {
            let due = self.timers.borrow_mut().take_due(now);
            let Some(completion) = due else { return did };
            completion.complete(());
            did = true;
        }
    }

    /// Submits and reaps without waiting. True if an operation completed.
    fn flush(&self) -> io::Result<bool> {
        self.engine.borrow_mut().flush()?;
        Ok(self.deliver_completed())
    }

    /// Reaps only: a `flush` or `sleep` must follow, to submit what is queued.
    fn reap_done(&self) -> io::Result<bool> {
        self.engine.borrow_mut().reap_done()?;
        Ok(self.deliver_completed())
    }

    /// Waits for a completion, a timer, another thread, or `timeout`. `is_woken` is checked once
    /// more after `SLEEPING` is stored. True if an operation completed.
    fn sleep(&self, timeout: Option<Duration>, is_woken: impl Fn() -> bool) -> io::Result<bool> {
        let timer = self.timers.borrow().next().map(|due| due.saturating_sub(clock::now()));
        let timeout = match (timeout, timer) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if timeout == Some(Duration::ZERO) {
            return self.flush();
        }
        self.shared.state.store(SLEEPING, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let is_idle = self.shared.inbox.is_empty() && self.completed_at_submit.borrow().is_empty();
        let waited = if is_idle && !is_woken() {
            self.engine.borrow_mut().wait(timeout, &self.shared.wake_fd)
        } else {
            self.engine.borrow_mut().flush()
        };
        self.shared.state.store(AWAKE, Ordering::Relaxed);
        waited?;
        Ok(self.deliver_completed())
    }

    fn deliver_completed(&self) -> bool {
        let mut completed = self.completed.take();
        self.engine.borrow_mut().swap_completed(&mut completed);
        let completed_at_submit = self.completed_at_submit.take();
        let did = !completed.is_empty() || !completed_at_submit.is_empty();
        completed.drain(..).for_each(Completed::deliver);
        self.completed.replace(completed);
        completed_at_submit.into_iter().for_each(Completed::deliver);
        did
    }

    /// For a Context that is not driven for a while, or never again: moves its tasks and timers to
    /// the background Context, and those that are sent or woken from now on.
    pub(crate) fn move_to_background(&self) {
        self.deliver_completed();
        self.shared.state.store(UNDRIVEN, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for runnable in self.queue.take() {
            self.shared.inbox.push(Message::Run(runnable));
        }
        self.move_timers();
        self.shared.forward_to_background();
    }

    /// After [`Local::move_to_background`]: waits for operations in flight, up to `timeout`. Those
    /// that a task still waits for cannot stay, because nothing would reap them: the kernel is
    /// asked to cancel them, they go to a thread then, and those that it cannot cancel are waited
    /// for.
    pub(crate) fn wait_in_flight(&self, timeout: Duration) {
        if self.engine.borrow().in_flight() == 0 {
            return;
        }
        let until = clock::now() + timeout;
        while self.engine.borrow().in_flight() > 0 && clock::now() < until {
            let left = until.saturating_sub(clock::now());
            if self.wait_completed(Some(left)).is_err() {
                return;
            }
        }
        self.engine.borrow_mut().cancel_awaited();
        while self.engine.borrow().has_awaited() {
            // With a timeout: the future may be dropped meanwhile.
            if self.wait_completed(Some(timeout)).is_err() {
                return;
            }
        }
    }

    fn wait_completed(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.engine.borrow_mut().wait(timeout, &self.shared.wake_fd)?;
        self.deliver_completed();
        Ok(())
    }

    fn move_timers(&self) {
        if self.timers.borrow().next().is_none() {
            return;
        }
        let all = self.timers.borrow_mut().take_all();
        // A completion that only we hold belongs to a sleep that was dropped.
        for (deadline, completion) in
            all.into_iter().filter(|(_, completion)| Arc::strong_count(completion) > 1)
        {
            match background() {
                Ok(background) => background.add_timer(deadline, completion),
                // Without a thread that waits, too early is better than never.
                Err(_) => completion.complete(()),
            }
        }
    }

    /// A descriptor that is readable when `turn` has something to do.
    pub(crate) fn fd(&self) -> io::Result<RawFd> {
        if self.pollable.borrow().is_none() {
            let pollable = self.make_pollable()?;
            self.pollable.replace(Some(pollable));
            if self.depth.get() == 0 {
                self.arm_pollable()?;
            }
        }
        let pollable = self.pollable.borrow();
        Ok(pollable.as_ref().expect("made above").epoll.0.as_raw_fd())
    }

    fn make_pollable(&self) -> io::Result<Pollable> {
        use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
        use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
        )?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(timer.as_fd(), readable)?;
        epoll.add(self.shared.wake_fd.as_fd(), readable)?;
        if let Some(event_fd) = self.engine.borrow_mut().event_fd()? {
            epoll.add(event_fd, readable)?;
        }
        Ok(Pollable { epoll, timer })
    }

    /// Before control returns to a foreign event loop: makes everything that may happen from now on
    /// visible on the descriptor.
    fn arm_pollable(&self) -> io::Result<()> {
        use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
        let pollable = self.pollable.borrow();
        let Some(Pollable { timer, .. }) = pollable.as_ref() else { return Ok(()) };
        sys::clear(timer.as_fd());
        sys::clear(&self.shared.wake_fd);
        {
            let mut engine = self.engine.borrow_mut();
            engine.enable_event_fd();
            engine.flush()?;
        }
        match self.timers.borrow().next() {
            Some(due) => {
                // Zero would disarm it.
                let left = due.saturating_sub(clock::now()).max(Duration::from_nanos(1));
                timer.set(Expiration::OneShot(left.into()), TimerSetTimeFlags::empty())?;
            }
            None => timer.unset()?,
        }
        self.shared.state.store(SLEEPING, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let did = self.deliver_completed();
        if did || self.has_ready() {
            self.shared.notify();
        }
        Ok(())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // Tasks and timers continue in the background Context. BlockOps end here: dropping the
        // engine waits for them, and their completions wake the tasks, wherever those are by then.
        self.move_to_background();
    }
}

/// Marks the Context as driven by its thread until dropped.
struct Driving<'a>(&'a Local);

impl Drop for Driving<'_> {
    fn drop(&mut self) {
        let local = self.0;
        local.depth.set(local.depth.get() - 1);
        if local.depth.get() == 0 && local.pollable.borrow().is_some() {
            // Fails only if the ring or the timer descriptor is broken; the next turn fails and
            // reports it.
            let _ = local.arm_pollable();
        }
    }
}

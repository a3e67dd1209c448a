//! The run queue of one thread, and the door through which other threads reach it.
//!
//! `Local` is touched by its thread alone, `Shared` by everyone. Work from the own thread costs a push to a
//! queue; work from elsewhere goes through the inbox, and a signal on the eventfd only if the thread sleeps.
//!
//! Who sleeps and who wakes: the sleeper says `SLEEPING` and then looks at the inbox; the waker puts into the
//! inbox and then looks for `SLEEPING`. With a sequentially consistent fence between the two steps on both
//! sides, at least one sees the other. A Context that is not driven any more (`AWAY`: it was dropped, or it is a plain
//! thread's between two calls of `block_on`) works the same way: what is sent to it goes to the background one.
//!
//! Invariant: no `RefCell` here is borrowed while foreign code runs (tasks, wakers, drops of anchors).

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

use crate::cell::AnswerCell;
use crate::clock::{self, Timer, Timers};
use crate::context::{ContextOptions, background};
use crate::current::{self, Current};
use crate::engine::{Engine, Landed};
use crate::inline;
use crate::op::{Answer, Op};
use crate::sys;
use crate::task::{self, Runnable, Task};

/// Tasks that run between two looks at the engine.
const TURN_TASKS_MAX: usize = 256;

const AWAKE: u8 = 0;
const SLEEPING: u8 = 1;
const AWAY: u8 = 2;

/// What other threads may ask of a Context.
#[derive(Debug)]
enum Message {
    Run(Runnable),
    Submit(Op, Arc<AnswerCell<Answer>>),
    Timer(Duration, Arc<AnswerCell<()>>),
}

impl Message {
    /// Does it on this thread. Blocks for an operation and for a timer.
    fn carry_out(self) {
        inline::run(Box::new(move || match self {
            Message::Run(runnable) => drop(runnable.run()),
            Message::Submit(op, cell) => {
                let answer = op.run();
                drop(op);
                cell.complete(answer);
            }
            Message::Timer(deadline, cell) => {
                thread::sleep(deadline.saturating_sub(clock::now()));
                cell.complete(());
            }
        }));
    }
}

/// Sends to the background Context. If the machine gives no thread for that, the message is carried out here and now:
/// a task is then polled by the threads that wake it.
fn send_to_background(message: Message) {
    match background() {
        Ok(background) => background.shared.send(message),
        Err(_) => message.carry_out(),
    }
}

/// Schedules a task whose spawner found no Context.
pub(crate) fn schedule_anywhere(runnable: Runnable) {
    send_to_background(Message::Run(runnable));
}

/// The side of a Context that every thread may use.
#[derive(Debug)]
pub(crate) struct Shared {
    inbox: SegQueue<Message>,
    state: AtomicU8,
    event: Arc<OwnedFd>,
}

impl Shared {
    pub(crate) fn spawn<T: Send + 'static>(
        self: &Arc<Shared>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let home = self.clone();
        let (runnable, task) = task::create(future, move |runnable| home.schedule(runnable));
        runnable.schedule();
        task
    }

    /// As [`Shared::spawn`], but polls it once before it returns, on this thread.
    pub(crate) fn spawn_now<T: Send + 'static>(
        self: &Arc<Shared>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let home = self.clone();
        let (runnable, task) =
            task::create_gripped(future, move |runnable| home.schedule(runnable));
        runnable.run();
        task
    }

    fn schedule(&self, runnable: Runnable) {
        let rest = current::with(|world| match world {
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

    pub(crate) fn submit(&self, op: Op, cell: Arc<AnswerCell<Answer>>) {
        self.send(Message::Submit(op, cell));
    }

    pub(crate) fn add_timer(&self, deadline: Duration, cell: Arc<AnswerCell<()>>) {
        self.send(Message::Timer(deadline, cell));
    }

    fn send(&self, message: Message) {
        self.inbox.push(message);
        self.notify();
    }

    /// To be called after something was put where the thread will look.
    fn notify(&self) {
        fence(Ordering::SeqCst);
        match self.state.load(Ordering::Relaxed) {
            AWAKE => {}
            AWAY => self.forward(),
            _ => {
                let woken = self.state.compare_exchange(
                    SLEEPING,
                    AWAKE,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                match woken {
                    Ok(_) => sys::signal(&self.event),
                    Err(AWAY) => self.forward(),
                    Err(_) => {}
                }
            }
        }
    }

    /// Nothing drives the Context: what arrives goes to the background one.
    fn forward(&self) {
        while let Some(message) = self.inbox.pop() {
            send_to_background(message);
        }
    }
}

/// Wakes the future that `block_on` polls.
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
            |world| matches!(world, Current::Host(local) if Arc::ptr_eq(&local.shared, &self.shared)),
        );
        if !is_own_thread {
            self.shared.notify();
        }
    }
}

/// For foreign loops: one descriptor over everything that may wake the Context.
#[derive(Debug)]
struct Pollable {
    epoll: nix::sys::epoll::Epoll,
    timer: nix::sys::timerfd::TimerFd,
}

/// The side of a Context that only its thread uses.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) shared: Arc<Shared>,
    queue: RefCell<VecDeque<Runnable>>,
    timers: RefCell<Timers>,
    engine: RefCell<Engine>,
    landed: RefCell<Vec<Landed>>,
    /// Operations that are over since they were submitted, because no thread could be had for them. Not told yet.
    stranded: RefCell<Vec<Landed>>,
    main: RefCell<Option<Arc<MainWaker>>>,
    pollable: RefCell<Option<Pollable>>,
    depth: Cell<u32>,
}

impl Local {
    pub(crate) fn new(options: &ContextOptions) -> io::Result<Local> {
        let event = Arc::new(sys::event()?);
        let engine = RefCell::new(Engine::new(options, &event)?);
        let shared = Shared { inbox: SegQueue::new(), state: AtomicU8::new(AWAKE), event };
        Ok(Local {
            shared: Arc::new(shared),
            queue: RefCell::default(),
            timers: RefCell::default(),
            engine,
            landed: RefCell::default(),
            stranded: RefCell::default(),
            main: RefCell::default(),
            pollable: RefCell::default(),
            depth: Cell::new(0),
        })
    }

    pub(crate) fn engine(&self) -> &RefCell<Engine> {
        &self.engine
    }

    pub(crate) fn submit(&self, op: Op, cell: Arc<AnswerCell<Answer>>) {
        let landed = self.engine.borrow_mut().submit(op, cell);
        self.stranded.borrow_mut().extend(landed);
    }

    /// Adds a timer; what is returned is for the caller to drop, with nothing borrowed.
    pub(crate) fn add_timer(&self, deadline: Duration, cell: Arc<AnswerCell<()>>) -> Vec<Timer> {
        self.timers.borrow_mut().add(deadline, cell)
    }

    /// Runs `future` to its end, and everything else of this Context meanwhile. The Context must be entered.
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
        // A turn that is followed by another one at once leaves what it queued to that one: most often the next turn waits,
        // and one system call does both. Never twice in a row, so that busy tasks do not keep operations from the kernel.
        let mut was_put_off = false;
        let output = loop {
            if main.is_ready.swap(false, Ordering::Acquire)
                && let Poll::Ready(output) = future.as_mut().poll(&mut cx)
            {
                break output;
            }
            self.run_ready();
            let is_busy = main.is_ready.load(Ordering::Relaxed) || self.has_ready();
            was_put_off = is_busy && !was_put_off;
            let step = if was_put_off {
                self.reap_done()
            } else if is_busy {
                self.flush()
            } else {
                self.sleep(None, || main.is_ready.load(Ordering::Relaxed))
            };
            step.expect("the ring takes operations; its descriptor is ours and open");
        };
        if was_put_off {
            self.flush().expect("the ring takes operations; its descriptor is ours and open");
        }
        drop(driving);
        drop(waker);
        // Kept for the next time. Whoever still holds a clone of the old waker can only wake in vain.
        self.main.replace(Some(main));
        output
    }

    /// One round for a foreign loop. True if a task ran or an operation or timer ended.
    pub(crate) fn turn(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let _driving = self.drive();
        let mut did = self.run_ready();
        if did || self.has_ready() {
            // The flush below hands over what is queued.
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
            self.engine.borrow_mut().set_bell(false);
        }
        self.shared.state.store(AWAKE, Ordering::Relaxed);
        Driving(self)
    }

    fn has_ready(&self) -> bool {
        !self.queue.borrow().is_empty() || !self.shared.inbox.is_empty()
    }

    /// Takes what other threads sent, fires timers, runs tasks: those that are ready now, not those that
    /// become so meanwhile.
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
        // What arrives meanwhile waits for the next turn, so that a flood cannot hold this one.
        let count = self.shared.inbox.len();
        for _ in 0..count {
            match self.shared.inbox.pop() {
                Some(Message::Run(runnable)) => self.queue.borrow_mut().push_back(runnable),
                Some(Message::Submit(op, cell)) => self.submit(op, cell),
                Some(Message::Timer(deadline, cell)) => drop(self.add_timer(deadline, cell)),
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
            let Some(cell) = due else { return did };
            cell.complete(());
            did = true;
        }
    }

    /// Lets the engine go on without waiting. True if an operation ended.
    fn flush(&self) -> io::Result<bool> {
        self.engine.borrow_mut().flush()?;
        Ok(self.tell_landed())
    }

    /// As `flush`, but does not hand over what is queued: a `flush` or `sleep` must follow.
    fn reap_done(&self) -> io::Result<bool> {
        self.engine.borrow_mut().reap_done()?;
        Ok(self.tell_landed())
    }

    /// Waits for a completion, a timer, another thread, or `timeout`. `is_woken` is asked once more after
    /// the thread is known to sleep. True if an operation ended.
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
        let is_idle = self.shared.inbox.is_empty() && self.stranded.borrow().is_empty();
        let waited = if is_idle && !is_woken() {
            self.engine.borrow_mut().wait(timeout, &self.shared.event)
        } else {
            self.engine.borrow_mut().flush()
        };
        self.shared.state.store(AWAKE, Ordering::Relaxed);
        waited?;
        Ok(self.tell_landed())
    }

    fn tell_landed(&self) -> bool {
        let mut landed = self.landed.take();
        self.engine.borrow_mut().swap_landed(&mut landed);
        let stranded = self.stranded.take();
        let did = !landed.is_empty() || !stranded.is_empty();
        landed.drain(..).for_each(Landed::tell);
        self.landed.replace(landed);
        stranded.into_iter().for_each(Landed::tell);
        did
    }

    /// For a Context that is not driven for a while, or never again: tasks and timers go on in the background
    /// Context, also those that are sent or woken from now on.
    pub(crate) fn hand_over(&self) {
        self.tell_landed();
        self.shared.state.store(AWAY, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for runnable in self.queue.take() {
            self.shared.inbox.push(Message::Run(runnable));
        }
        self.pass_on_timers();
        self.shared.forward();
    }

    /// After [`Local::hand_over`]: waits for operations in flight, up to `patience`. Those that a task still waits
    /// for are not left behind, because nothing would reap them: the kernel is asked to give them up, they go to a
    /// thread then, and those that it cannot give up any more are waited for.
    pub(crate) fn settle(&self, patience: Duration) {
        if self.engine.borrow().in_flight() == 0 {
            return;
        }
        let until = clock::now() + patience;
        while self.engine.borrow().in_flight() > 0 && clock::now() < until {
            let left = until.saturating_sub(clock::now());
            if self.wait_landed(Some(left)).is_err() {
                return;
            }
        }
        self.engine.borrow_mut().withdraw_awaited();
        while self.engine.borrow().has_awaited() {
            // Not for ever at once: the future may be dropped meanwhile.
            if self.wait_landed(Some(patience)).is_err() {
                return;
            }
        }
    }

    fn wait_landed(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.engine.borrow_mut().wait(timeout, &self.shared.event)?;
        self.tell_landed();
        Ok(())
    }

    fn pass_on_timers(&self) {
        if self.timers.borrow().next().is_none() {
            return;
        }
        let all = self.timers.borrow_mut().take_all();
        // A cell that only we hold belongs to a sleep that was dropped.
        for (deadline, cell) in all.into_iter().filter(|(_, cell)| Arc::strong_count(cell) > 1) {
            match background() {
                Ok(background) => background.add_timer(deadline, cell),
                // Without a thread to wait for the time, too early is better than never.
                Err(_) => cell.complete(()),
            }
        }
    }

    /// A descriptor that is readable when `turn` has something to do.
    pub(crate) fn fd(&self) -> io::Result<RawFd> {
        if self.pollable.borrow().is_none() {
            let pollable = self.make_pollable()?;
            self.pollable.replace(Some(pollable));
            if self.depth.get() == 0 {
                self.rest()?;
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
        epoll.add(self.shared.event.as_fd(), readable)?;
        if let Some(bell) = self.engine.borrow_mut().bell()? {
            epoll.add(bell, readable)?;
        }
        Ok(Pollable { epoll, timer })
    }

    /// Before control goes back to a foreign loop: everything that may happen from now on must show on the
    /// descriptor.
    fn rest(&self) -> io::Result<()> {
        use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
        let pollable = self.pollable.borrow();
        let Some(Pollable { timer, .. }) = pollable.as_ref() else { return Ok(()) };
        sys::clear(timer.as_fd());
        sys::clear(&self.shared.event);
        {
            let mut engine = self.engine.borrow_mut();
            engine.set_bell(true);
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
        let did = self.tell_landed();
        if did || self.has_ready() {
            self.shared.notify();
        }
        Ok(())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // Tasks and timers outlive their Context: they go on in the background one. Ops end here: dropping
        // the engine waits for them, and their completions wake tasks, wherever those are by then.
        self.hand_over();
    }
}

/// The thread drives the Context.
struct Driving<'a>(&'a Local);

impl Drop for Driving<'_> {
    fn drop(&mut self) {
        let local = self.0;
        local.depth.set(local.depth.get() - 1);
        if local.depth.get() == 0 && local.pollable.borrow().is_some() {
            // Fails only if the ring or the timer descriptor is broken; the next turn meets and tells it.
            let _ = local.rest();
        }
    }
}

//! Scheduler of a simulated world: runs tasks, the caller's future and events in seeded order.
//!
//! A world is idle when no task is ready and no event is to come. If the caller's future is not
//! done then, it never will be: a deadlock, which panics with the seed, the unfinished tasks and
//! the last operations.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use super::Sim;
use super::op::Deferred;
use super::world::World;
use crate::current::{self, Current};

/// Virtual time after which [`Sim::run_until_idle`] stops although periodic tasks never end.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Waker of the caller's future.
struct MainWaker(AtomicBool);

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Result of one turn of the loop.
enum Turn {
    /// The caller's future is to be polled.
    Main,
    /// A task was polled.
    Task,
    /// An event came.
    Event,
    /// Nothing is left to do.
    Idle,
    /// The power is off.
    Cut,
}

/// End of a run.
enum End<T> {
    Done(T),
    /// The future and the tasks were polled the allowed number of times.
    Stopped,
    Cut,
}

/// Prints seed and last operations when a test panics inside the world.
struct PrintSeedOnPanic<'a>(&'a Sim);

impl Drop for PrintSeedOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            #[expect(clippy::print_stderr, reason = "a failing test must name its seed")]
            {
                eprintln!("in the simulated world of seed {}; last operations:", self.0.seed());
                let lines = self.0.trace();
                for line in lines.iter().skip(lines.len().saturating_sub(24)) {
                    eprintln!("  {line}");
                }
            }
        }
    }
}

impl World {
    /// True if the next event comes before ready tasks run: those are slow, but not by more than a
    /// latency, or else every timeout would fire.
    fn overtakes(&mut self) -> bool {
        let Some(at_ns) = self.clock.next_ns() else { return false };
        let wait_ns = u128::from(at_ns - self.clock.now_ns());
        wait_ns <= self.config.latency_max.as_nanos() && self.rng.hit(self.config.overtake_rate)
    }
}

impl Sim {
    /// Runs a future to completion under the virtual clock and seeded scheduler, with the spawned
    /// tasks; unfinished tasks continue in the next call. May be called from inside itself.
    ///
    /// # Panics
    /// If nothing can ever run again (deadlock, naming the seed), or if the power is cut: a future
    /// that may be cut is for [`Sim::run_until_cut`].
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        match self.run_until_cut(future) {
            Some(output) => output,
            None => panic!("seed {}: the power was cut inside block_on", self.seed()),
        }
    }

    /// As [`Sim::block_on`], but `None` when the power is cut: the future and all tasks are
    /// dropped, unfinished.
    pub fn run_until_cut<F: Future>(&self, future: F) -> Option<F::Output> {
        let _entered = current::enter(Current::Sim(self.clone()));
        let _print_seed = PrintSeedOnPanic(self);
        let end = {
            // Dropped before the tasks that its destructors may schedule.
            let future = pin!(future);
            self.run(future, usize::MAX)
        };
        match end {
            End::Done(output) => Some(output),
            End::Stopped | End::Cut => {
                self.drop_tasks();
                None
            }
        }
    }

    /// Runs `future` until it, and the tasks of the world with it, have been polled `n` times in
    /// all (0: it is never polled), drops it, and runs the world until idle. False if it finished
    /// before: the end of a cancel sweep.
    ///
    /// Polls of tasks count because tasks do work that the future waits for: at each of their
    /// awaits the future may be dropped.
    pub fn drop_at<F: Future>(&self, future: F, n: usize) -> bool {
        self.abandon_at(future, n, drop)
    }

    /// As [`Sim::drop_at`], but the future is forgotten: its memory leaks and no destructor runs.
    pub fn forget_at<F: Future>(&self, future: F, n: usize) -> bool {
        self.abandon_at(future, n, std::mem::forget)
    }

    /// As [`Sim::drop_at`], but returns the future, which was not polled any more. `None` if it
    /// finished before.
    pub fn keep_at<F: Future>(&self, future: F, n: usize) -> Option<Pin<Box<F>>> {
        let kept = self.stop_at(future, n)?;
        self.run_until_idle();
        Some(kept)
    }

    fn abandon_at<F: Future>(&self, future: F, n: usize, abandon: fn(Pin<Box<F>>)) -> bool {
        let Some(future) = self.stop_at(future, n) else { return false };
        let entered = current::enter(Current::Sim(self.clone()));
        abandon(future);
        drop(entered);
        self.run_until_idle();
        true
    }

    fn stop_at<F: Future>(&self, future: F, n: usize) -> Option<Pin<Box<F>>> {
        let _entered = current::enter(Current::Sim(self.clone()));
        let _print_seed = PrintSeedOnPanic(self);
        let mut future = Box::pin(future);
        let end = if n == 0 { End::Stopped } else { self.run(future.as_mut(), n) };
        match end {
            End::Done(_) => None,
            End::Stopped | End::Cut => Some(future),
        }
    }

    /// Runs tasks and events until the world is idle, the power is cut, or an hour of virtual time
    /// has passed with no task ready.
    pub fn run_until_idle(&self) {
        let _entered = current::enter(Current::Sim(self.clone()));
        let _print_seed = PrintSeedOnPanic(self);
        let deadline = self.now() + IDLE_TIMEOUT;
        for _ in 0..self.max_turns() {
            match self.turn(false, Some(deadline)) {
                Turn::Main | Turn::Task | Turn::Event => {}
                Turn::Idle => return,
                Turn::Cut => return self.drop_tasks(),
            }
        }
        self.panic_with_trace("livelock");
    }

    fn run<F: Future>(&self, mut future: Pin<&mut F>, polls: usize) -> End<F::Output> {
        let main = Arc::new(MainWaker(AtomicBool::new(true)));
        let waker = Waker::from(main.clone());
        let mut polled = 0;
        for _ in 0..self.max_turns() {
            match self.turn(main.0.load(Ordering::Relaxed), None) {
                Turn::Main => {
                    main.0.store(false, Ordering::Relaxed);
                    if let Poll::Ready(output) =
                        future.as_mut().poll(&mut Context::from_waker(&waker))
                    {
                        return End::Done(output);
                    }
                    polled += 1;
                }
                Turn::Task => polled += 1,
                Turn::Event => {}
                Turn::Idle => self.panic_with_trace("deadlock: nothing can ever run again"),
                Turn::Cut => {
                    self.drop_tasks();
                    return End::Cut;
                }
            }
            if polled == polls {
                return End::Stopped;
            }
        }
        self.panic_with_trace("livelock")
    }

    fn max_turns(&self) -> u64 {
        self.world().config.max_turns
    }

    /// Runs one task or takes one event, or says that it is the main future's turn.
    fn turn(&self, is_main_ready: bool, until: Option<Duration>) -> Turn {
        let ready = self.tasks().ready.len();
        let choices = ready + usize::from(is_main_ready);
        let mut deferred = Deferred::default();
        let pick = {
            let mut world = self.world();
            if world.is_cut {
                return Turn::Cut;
            }
            let is_event = choices == 0 || world.overtakes();
            if is_event {
                let until_ns = until.map_or(u128::MAX, |until| until.as_nanos());
                let is_due =
                    world.clock.next_ns().is_some_and(|at_ns| u128::from(at_ns) <= until_ns);
                if choices == 0 && !is_due {
                    return Turn::Idle;
                }
                world.fire(&mut deferred);
                None
            } else {
                Some(world.rng.index(choices))
            }
        };
        match pick {
            None => {
                deferred.finish();
                Turn::Event
            }
            Some(task) if task < ready => {
                let runnable = self.tasks().ready.swap_remove(task);
                runnable.run();
                Turn::Task
            }
            Some(_) => Turn::Main,
        }
    }

    fn panic_with_trace(&self, why: &str) -> ! {
        let tasks: Vec<String> =
            self.tasks().active.iter().map(|(_, task)| task.spawned_at.to_string()).collect();
        panic!(
            "seed {}: {why}; unfinished tasks, by where they were spawned: [{}]; last operations:\n{}",
            self.seed(),
            tasks.join(", "),
            self.trace().join("\n")
        );
    }
}

//! Spawned tasks of a world: the queue of ready tasks, and the list of unfinished ones.
//!
//! The list lets a world name the waiting tasks in a deadlock, and drop its tasks at a power cut,
//! which would otherwise keep each other alive. The choice of the next task is in
//! [`super::executor`].

use std::future::poll_fn;
use std::panic::Location;
use std::sync::{Arc, Weak};
use std::task::{Poll, Waker};
use std::time::Duration;

use crate::sync::oneshot;
use slab::Slab;

use super::clock::Sleep;
use super::{Shared, Sim};
use crate::Task;
use crate::current::{self, Current};
use crate::task::{self, Runnable};

/// The spawned tasks of a world.
#[derive(Default)]
pub(super) struct Tasks {
    pub ready: Vec<Runnable>,
    pub active: Slab<Active>,
    is_dead: bool,
    /// Tasks of a dead world, to be dropped when no destructor of another one is running.
    doomed: Vec<Runnable>,
}

/// A task that has not finished.
pub(super) struct Active {
    /// `None` only while the task is made.
    waker: Option<Waker>,
    pub spawned_at: &'static Location<'static>,
}

/// Removes a task from the list when its future is dropped, finished or not.
struct RemoveFromActive {
    shared: Weak<Shared>,
    key: usize,
}

impl Drop for RemoveFromActive {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            let removed = Sim(shared).tasks().active.try_remove(self.key);
            drop(removed);
        }
    }
}

impl Sim {
    /// Drops all tasks, unfinished.
    pub(super) fn drop_tasks(&self) {
        // Tasks that destructors spawn are spawned here, and dropped too.
        let _entered = current::enter(Current::Sim(self.clone()));
        let (ready, wakers) = {
            let mut tasks = self.tasks();
            tasks.is_dead = true;
            let wakers: Vec<Waker> =
                tasks.active.iter().filter_map(|(_, task)| task.waker.clone()).collect();
            (std::mem::take(&mut tasks.ready), wakers)
        };
        drop(ready);
        // A woken task is scheduled, and a dead world drops what is scheduled: here, one after the
        // other. A destructor that wakes another task may run inside of that one's destructor.
        wakers.into_iter().for_each(Waker::wake);
        loop {
            let doomed = self.tasks().doomed.pop();
            match doomed {
                Some(task) => drop(task),
                None => return,
            }
        }
    }

    /// Spawns onto this world's seeded scheduler.
    #[track_caller]
    pub fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let (future, key) = self.register(future, Location::caller());
        let (runnable, task) = task::create(future, self.schedule_here());
        self.tasks().active[key].waker = Some(runnable.waker());
        runnable.schedule();
        task
    }

    /// As [`Sim::spawn`], but polls it once before it returns.
    #[track_caller]
    pub(crate) fn spawn_now<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let (future, key) = self.register(future, Location::caller());
        let (runnable, task) = task::create_dropped_with_handle(future, self.schedule_here());
        self.tasks().active[key].waker = Some(runnable.waker());
        runnable.run();
        task
    }

    /// Adds a task to the list; it is removed when its future is dropped.
    fn register<T>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
        spawned_at: &'static Location<'static>,
    ) -> (impl Future<Output = T> + Send + 'static, usize) {
        let key = self.tasks().active.insert(Active { waker: None, spawned_at });
        let remove = RemoveFromActive { shared: Arc::downgrade(&self.0), key };
        let future = async move {
            let _remove = remove;
            future.await
        };
        (future, key)
    }

    fn schedule_here(&self) -> impl Fn(Runnable) + Send + Sync + 'static {
        let shared = Arc::downgrade(&self.0);
        move |runnable| {
            if let Some(shared) = shared.upgrade() {
                Sim(shared).schedule(runnable);
            }
        }
    }

    fn schedule(&self, runnable: Runnable) {
        let mut tasks = self.tasks();
        let list = if tasks.is_dead { &mut tasks.doomed } else { &mut tasks.ready };
        list.push(runnable);
    }

    /// Virtual time since the world began.
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.world().clock.now_ns())
    }

    /// See [`crate::random_id`].
    pub(crate) fn random_id(&self) -> [u64; 2] {
        let mut world = self.world();
        [world.rng.any(), world.rng.any()]
    }

    /// Waits in virtual time.
    pub async fn sleep(&self, how_long: Duration) {
        Sleep::new(self.clone(), how_long).await;
    }

    /// Runs `work` at a seeded moment and completes at a later one. It runs even if the future is
    /// dropped, as work on a thread does.
    pub async fn spawn_cpu<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let (before, after) = {
            let mut world = self.world();
            let longest = u64::try_from(world.config.latency_max.as_nanos()).unwrap_or(u64::MAX);
            (world.rng.between(0, longest), world.rng.between(0, longest))
        };
        let (sender, receiver) = oneshot::channel();
        let sim = self.clone();
        let work = async move {
            sim.sleep(Duration::from_nanos(before)).await;
            let result = work();
            sim.sleep(Duration::from_nanos(after)).await;
            // Fails if the future was dropped.
            let _ = sender.send(result);
        };
        self.spawn(work).detach();
        match receiver.await {
            Ok(result) => result,
            // Only a power cut drops the task, and nothing completes after it.
            Err(_) => std::future::pending().await,
        }
    }

    /// Lets other ready tasks run once.
    pub async fn yield_now(&self) {
        let mut is_yielded = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut is_yielded, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }
}

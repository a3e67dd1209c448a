//! `spawn_now`: tasks polled first by the spawning thread, whose handle may be kept, forgotten or
//! dropped.
#![expect(clippy::async_yields_async, reason = "the tasks are awaited, kept or dropped later")]

use std::future::{pending, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use bds_io::sync::{Notify, Semaphore};
use bds_io::{
    Context, ContextOptions, EngineKind, File, OpenOptions, Sim, SimConfig, Task, block_on, sleep,
    spawn, spawn_now, yield_now,
};

use crate::support::{on_every_engine, pattern, scratch_with};

/// Against hangs only.
const HANG_TIMEOUT: Duration = Duration::from_secs(60);

/// Runs `test` in the simulated world, on every engine's Context, and on a plain thread.
fn everywhere<F: Future<Output = ()>>(test: impl Fn() -> F) {
    for seed in 0..20 {
        Sim::new(seed, SimConfig::default()).block_on(test());
    }
    on_every_engine(|context| context.block_on(test()));
    block_on(test());
}

async fn poll_once<T>(task: &mut Task<T>) -> Poll<T> {
    poll_fn(|cx| Poll::Ready(Pin::new(&mut *task).poll(cx))).await
}

#[test]
fn the_first_poll_is_on_this_thread_and_a_ready_result_needs_no_turn() {
    everywhere(|| async {
        let here = thread::current().id();
        let mut task = spawn_now(async move { thread::current().id() == here });
        assert_eq!(poll_once(&mut task).await, Poll::Ready(true));
    });
}

#[test]
fn a_kept_or_forgotten_handle_delays_nothing() {
    everywhere(|| async {
        let (steps, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let work = || {
            let (steps, ended) = (steps.clone(), ended.clone());
            async move {
                for _ in 0..3 {
                    sleep(Duration::from_micros(10)).await;
                    steps.fetch_add(1, Ordering::Relaxed);
                }
                ended.add_permits(1);
                7
            }
        };
        let mut kept = spawn_now(work());
        assert!(poll_once(&mut kept).await.is_pending());
        std::mem::forget(spawn_now(work()));
        ended.acquire_many(2).await.unwrap().forget();
        assert_eq!(steps.load(Ordering::Relaxed), 6);
        assert_eq!(kept.await, 7);
    });
}

/// Sets its flag when dropped.
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn dropping_the_handle_drops_the_future_before_it_returns() {
    everywhere(|| async {
        let gone = Arc::new(AtomicBool::new(false));
        let set_on_drop = SetOnDrop(gone.clone());
        let task = spawn_now(async move {
            let _set_on_drop = set_on_drop;
            pending::<()>().await;
        });
        yield_now().await;
        assert!(!gone.load(Ordering::Relaxed));
        drop(task);
        assert!(gone.load(Ordering::Relaxed));
    });
}

#[test]
fn dropping_the_handle_of_a_queued_task_drops_the_future() {
    everywhere(|| async {
        let (gone, ran) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (set_on_drop, flag) = (SetOnDrop(gone.clone()), ran.clone());
        let task = spawn_now(async move {
            let _set_on_drop = set_on_drop;
            yield_now().await;
            flag.store(true, Ordering::Relaxed);
        });
        drop(task);
        assert!(gone.load(Ordering::Relaxed));
        for _ in 0..10 {
            yield_now().await;
        }
        assert!(!ran.load(Ordering::Relaxed));
    });
}

#[test]
fn dropping_a_handle_waits_for_a_poll_on_another_thread() {
    let gate = Arc::new(Notify::new());
    let (gone, polled) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (begins, begun) = mpsc::channel();
    let (set_on_drop, opened, flag) = (SetOnDrop(gone.clone()), gate.clone(), polled.clone());
    let tokio = tokio::runtime::Builder::new_current_thread().build().unwrap();
    // Its executor is the background thread: this one has no Context.
    let task = tokio.block_on(async move {
        spawn_now(async move {
            let _set_on_drop = set_on_drop;
            opened.notified().await;
            begins.send(()).unwrap();
            thread::sleep(Duration::from_millis(50));
            flag.store(true, Ordering::Relaxed);
            pending::<()>().await;
        })
    });
    gate.notify_one();
    begun.recv_timeout(HANG_TIMEOUT).unwrap();
    drop(task);
    assert!(polled.load(Ordering::Relaxed) && gone.load(Ordering::Relaxed));
}

#[test]
fn a_task_may_drop_its_own_handle() {
    everywhere(|| async {
        let own: Arc<Mutex<Option<Task<()>>>> = Arc::default();
        let gone = Arc::new(AtomicBool::new(false));
        let (set_on_drop, slot) = (SetOnDrop(gone.clone()), own.clone());
        let task = spawn_now(async move {
            let _set_on_drop = set_on_drop;
            yield_now().await;
            drop(slot.lock().unwrap().take());
            pending::<()>().await;
        });
        *own.lock().unwrap() = Some(task);
        while !gone.load(Ordering::Relaxed) {
            yield_now().await;
        }
        assert!(own.lock().unwrap().is_none());
    });
}

#[test]
fn a_panic_is_passed_to_the_awaiting_task() {
    everywhere(|| async {
        let task = spawn_now(async {
            yield_now().await;
            panic!("on purpose")
        });
        let caught = futures_util::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(task));
        let panic = caught.await.map(|(): ()| "no panic").unwrap_err();
        assert_eq!(*panic.downcast_ref::<&str>().unwrap(), "on purpose");
    });
}

#[test]
fn a_plain_thread_in_block_on_runs_its_tasks_itself() {
    block_on(async {
        let here = thread::current().id();
        let is_here = move || thread::current().id() == here;
        let spawned = spawn(async move { is_here() });
        let later = spawn_now(async move {
            sleep(Duration::from_millis(1)).await;
            is_here()
        });
        assert_eq!((spawned.await, later.await), (true, true));
    });
}

#[test]
fn tasks_left_by_block_on_continue_in_the_background() {
    let options = OpenOptions { inline_write_max_bytes: Some(0), ..OpenOptions::default() };
    let (_dir, file) = scratch_with(&options);
    let (sender, receiver) = mpsc::channel();
    let gate = Arc::new(Notify::new());
    let (gate_sender, opened) = (sender.clone(), gate.clone());
    // One waits for operations and timers, one is ready, one is woken from elsewhere later.
    let kept = block_on(async move {
        let ready_sender = sender.clone();
        let work = spawn_now(async move {
            for round in 0..3 {
                file.write(round << 16, pattern(65_536, 1).into(), true).await.unwrap();
                sleep(Duration::from_millis(2)).await;
            }
            sender.send("operations").unwrap();
        });
        spawn(async move { ready_sender.send("ready").unwrap() }).detach();
        spawn_now(async move {
            opened.notified().await;
            gate_sender.send("woken").unwrap();
        })
        .detach();
        work
    });
    gate.notify_one();
    let mut received: Vec<&str> =
        (0..3).map(|_| receiver.recv_timeout(HANG_TIMEOUT).unwrap()).collect();
    received.sort_unstable();
    assert_eq!(received, ["operations", "ready", "woken"]);
    block_on(kept);
}

#[test]
fn tasks_left_by_a_block_on_that_panics_continue_too() {
    let (sender, receiver) = mpsc::channel();
    let caught = std::panic::catch_unwind(|| {
        block_on(async move {
            spawn_now(async move {
                sleep(Duration::from_millis(1)).await;
                sender.send(()).unwrap();
            })
            .detach();
            panic!("on purpose")
        })
    });
    assert!(caught.is_err());
    receiver.recv_timeout(HANG_TIMEOUT).unwrap();
}

/// A read of a pipe that is empty until `writer` writes; the task sends whether it succeeded.
fn read_of_a_pipe(
    sender: mpsc::Sender<bool>,
) -> (impl Future<Output = ()> + Send, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let file = File::from_fd(reader.into(), &OpenOptions::default()).unwrap();
    let read = async move {
        // Pipes have no offsets: a thread gets ESPIPE, the ring waits for data. What counts is that
        // it ends.
        let answer = file.read(0, vec![0u8; 16].into()).await;
        sender.send(answer.is_ok()).unwrap();
    };
    (read, writer)
}

#[test]
fn an_awaited_operation_does_not_stay_in_an_undriven_ring() {
    let (sender, receiver) = mpsc::channel();
    let (read, _writer) = read_of_a_pipe(sender);
    // The call returns although the operation never completes by itself, and the task still gets
    // its result.
    block_on(async move { spawn_now(read).detach() });
    receiver.recv_timeout(HANG_TIMEOUT).unwrap();
}

#[test]
fn a_dropped_context_leaves_no_awaited_operation() {
    let options = ContextOptions { engine: EngineKind::Uring, ..ContextOptions::default() };
    let context = match Context::new(options) {
        Ok(context) => context,
        Err(error) => return println!("skipped: no io_uring here: {error}"),
    };
    let (sender, receiver) = mpsc::channel();
    let (read, _writer) = read_of_a_pipe(sender);
    context.block_on(async { spawn_now(read).detach() });
    drop(context);
    receiver.recv_timeout(HANG_TIMEOUT).unwrap();
}

#[test]
fn a_spawned_task_runs_without_polls_of_a_foreign_executor() {
    let options = OpenOptions { inline_write_max_bytes: Some(0), ..OpenOptions::default() };
    let (_dir, file) = scratch_with(&options);
    let tokio = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (sender, receiver) = mpsc::channel();
    let kept = tokio.block_on(async move {
        let mut task = spawn_now(async move {
            file.write(0, pattern(4096, 1).into(), true).await.unwrap();
            file.sync_data().await.unwrap();
            sender.send(()).unwrap();
        });
        assert!(poll_once(&mut task).await.is_pending());
        task
    });
    receiver.recv_timeout(HANG_TIMEOUT).unwrap();
    tokio.block_on(kept);
}

#[test]
fn one_seed_replays_a_run_with_spawn_now() {
    let run = |seed| {
        let sim = Sim::new(seed, SimConfig::default());
        let file = sim.fs().open(
            "disk".as_ref(),
            &OpenOptions { write: true, create: true, ..OpenOptions::default() },
        );
        let file = file.unwrap();
        sim.block_on(async {
            let tasks: Vec<_> = (0..20u8)
                .map(|seed| {
                    let file = file.clone();
                    spawn_now(async move {
                        file.write(u64::from(seed) * 100, pattern(4096, seed).into(), false).await
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
        });
        sim.fingerprint()
    };
    for seed in 0..10 {
        assert_eq!(run(seed), run(seed));
    }
    assert_ne!(run(0), run(1));
}

#[test]
fn a_cancel_sweep_stops_at_polls_of_tasks_too() {
    let work = |sim: &Sim| {
        let sim = sim.clone();
        async move {
            spawn_now(async move {
                for _ in 0..5 {
                    sim.yield_now().await
                }
            })
            .await
        }
    };
    let sim = Sim::new(3, SimConfig::calm());
    let points = (0..).take_while(|n| sim.drop_at(work(&sim), *n)).count();
    assert!(points > 5, "{points}: a task that yields five times is polled six times");
    let kept = sim.keep_at(work(&sim), 2).expect("it is not done after two polls");
    let mut kept = pin!(kept);
    // It went on while what was kept was not polled.
    sim.block_on(poll_fn(|cx| {
        assert!(kept.as_mut().poll(cx).is_ready());
        Poll::Ready(())
    }));
}

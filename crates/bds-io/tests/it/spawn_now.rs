//! Tasks that are polled first where they are spawned, and whose handle may be kept, forgotten or dropped.
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
const AGES: Duration = Duration::from_secs(60);

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
fn the_first_poll_happens_here_and_an_answer_at_once_needs_no_turn() {
    everywhere(|| async {
        let here = thread::current().id();
        let mut task = spawn_now(async move { thread::current().id() == here });
        assert_eq!(poll_once(&mut task).await, Poll::Ready(true));
    });
}

#[test]
fn a_kept_handle_and_a_forgotten_one_hold_nothing_up() {
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

/// Tells of its end.
struct Tell(Arc<AtomicBool>);

impl Drop for Tell {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn dropping_the_handle_drops_the_future_before_it_returns() {
    everywhere(|| async {
        let gone = Arc::new(AtomicBool::new(false));
        let tell = Tell(gone.clone());
        let task = spawn_now(async move {
            let _tell = tell;
            pending::<()>().await;
        });
        yield_now().await;
        assert!(!gone.load(Ordering::Relaxed));
        drop(task);
        assert!(gone.load(Ordering::Relaxed));
    });
}

#[test]
fn a_handle_dropped_while_its_task_is_queued_drops_the_future_too() {
    everywhere(|| async {
        let (gone, ran) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (tell, told) = (Tell(gone.clone()), ran.clone());
        let task = spawn_now(async move {
            let _tell = tell;
            yield_now().await;
            told.store(true, Ordering::Relaxed);
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
fn a_handle_dropped_while_another_thread_polls_waits_for_the_end_of_that_poll() {
    let gate = Arc::new(Notify::new());
    let (gone, polled) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (begins, begun) = mpsc::channel();
    let (tell, opened, told) = (Tell(gone.clone()), gate.clone(), polled.clone());
    let tokio = tokio::runtime::Builder::new_current_thread().build().unwrap();
    // Its executor is the background thread: this one has no Context.
    let task = tokio.block_on(async move {
        spawn_now(async move {
            let _tell = tell;
            opened.notified().await;
            begins.send(()).unwrap();
            thread::sleep(Duration::from_millis(50));
            told.store(true, Ordering::Relaxed);
            pending::<()>().await;
        })
    });
    gate.notify_one();
    begun.recv_timeout(AGES).unwrap();
    drop(task);
    assert!(polled.load(Ordering::Relaxed) && gone.load(Ordering::Relaxed));
}

#[test]
fn a_task_may_drop_its_own_handle() {
    everywhere(|| async {
        let own: Arc<Mutex<Option<Task<()>>>> = Arc::default();
        let gone = Arc::new(AtomicBool::new(false));
        let (tell, slot) = (Tell(gone.clone()), own.clone());
        let task = spawn_now(async move {
            let _tell = tell;
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
fn a_panic_reaches_the_one_who_awaits_it() {
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
fn a_plain_thread_runs_its_tasks_itself_while_it_is_driven() {
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
fn what_a_plain_thread_leaves_goes_on_without_it() {
    let options = OpenOptions { inline_write_max_bytes: Some(0), ..OpenOptions::default() };
    let (_dir, file) = scratch_with(&options);
    let (tell, hear) = mpsc::channel();
    let gate = Arc::new(Notify::new());
    let (tell_of_gate, opened) = (tell.clone(), gate.clone());
    // One waits for operations and timers, one is ready, one is woken from elsewhere later.
    let kept = block_on(async move {
        let tell_ready = tell.clone();
        let work = spawn_now(async move {
            for round in 0..3 {
                file.write(round << 16, pattern(65_536, 1).into(), true).await.unwrap();
                sleep(Duration::from_millis(2)).await;
            }
            tell.send("operations").unwrap();
        });
        spawn(async move { tell_ready.send("ready").unwrap() }).detach();
        spawn_now(async move {
            opened.notified().await;
            tell_of_gate.send("woken").unwrap();
        })
        .detach();
        work
    });
    gate.notify_one();
    let mut heard: Vec<&str> = (0..3).map(|_| hear.recv_timeout(AGES).unwrap()).collect();
    heard.sort_unstable();
    assert_eq!(heard, ["operations", "ready", "woken"]);
    block_on(kept);
}

#[test]
fn what_is_left_by_a_block_on_that_panics_goes_on_too() {
    let (tell, hear) = mpsc::channel();
    let caught = std::panic::catch_unwind(|| {
        block_on(async move {
            spawn_now(async move {
                sleep(Duration::from_millis(1)).await;
                tell.send(()).unwrap();
            })
            .detach();
            panic!("on purpose")
        })
    });
    assert!(caught.is_err());
    hear.recv_timeout(AGES).unwrap();
}

/// A read of a pipe that is silent until `writer` writes; the task tells what it got.
fn read_of_a_pipe(
    tell: mpsc::Sender<bool>,
) -> (impl Future<Output = ()> + Send, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let file = File::from_fd(reader.into(), &OpenOptions::default()).unwrap();
    let read = async move {
        // Pipes have no offsets: a thread gets ESPIPE, the ring waits for data. What counts is that it ends.
        let answer = file.read(0, vec![0u8; 16].into()).await;
        tell.send(answer.is_ok()).unwrap();
    };
    (read, writer)
}

#[test]
fn an_operation_that_a_task_waits_for_does_not_stay_in_a_ring_that_is_not_driven() {
    let (tell, hear) = mpsc::channel();
    let (read, _writer) = read_of_a_pipe(tell);
    // The call returns although the operation never ends by itself, and the task learns of its end all the same.
    block_on(async move { spawn_now(read).detach() });
    hear.recv_timeout(AGES).unwrap();
}

#[test]
fn a_dropped_context_leaves_no_operation_behind_that_a_task_waits_for() {
    let options = ContextOptions { engine: EngineKind::Uring, ..ContextOptions::default() };
    let context = match Context::new(options) {
        Ok(context) => context,
        Err(error) => return println!("skipped: no io_uring here: {error}"),
    };
    let (tell, hear) = mpsc::channel();
    let (read, _writer) = read_of_a_pipe(tell);
    context.block_on(async { spawn_now(read).detach() });
    drop(context);
    hear.recv_timeout(AGES).unwrap();
}

#[test]
fn a_foreign_executor_need_not_poll_again() {
    let options = OpenOptions { inline_write_max_bytes: Some(0), ..OpenOptions::default() };
    let (_dir, file) = scratch_with(&options);
    let tokio = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (tell, hear) = mpsc::channel();
    let kept = tokio.block_on(async move {
        let mut task = spawn_now(async move {
            file.write(0, pattern(4096, 1).into(), true).await.unwrap();
            file.sync_data().await.unwrap();
            tell.send(()).unwrap();
        });
        assert!(poll_once(&mut task).await.is_pending());
        task
    });
    hear.recv_timeout(AGES).unwrap();
    tokio.block_on(kept);
}

#[test]
fn one_seed_is_one_run_with_tasks_that_are_polled_here() {
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
fn a_cancel_sweep_stops_at_every_poll_of_the_tasks_too() {
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

//! Tasks: spawn, wake, cancel and detach, within a thread and across threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bds_io::sync::{Notify, Semaphore};
use bds_io::{Buf, Context, ContextOptions, EngineKind, block_on, spawn, spawn_cpu, yield_now};

use crate::support::{bytes, on_every_engine, pattern, scratch};

#[test]
fn tasks_run_in_turns_and_return_values() {
    on_every_engine(|context| {
        let sum = context.block_on(async {
            let tasks: Vec<_> = (0..100u64)
                .map(|number| {
                    spawn(async move {
                        yield_now().await;
                        number
                    })
                })
                .collect();
            let mut sum = 0;
            for task in tasks {
                sum += task.await;
            }
            sum
        });
        assert_eq!(sum, 4950);
    });
}

#[test]
fn a_dropped_task_is_cancelled_and_a_detached_one_continues() {
    on_every_engine(|context| {
        let ran = Arc::new(AtomicUsize::new(0));
        context.block_on(async {
            let (a, b) = (ran.clone(), ran.clone());
            let gate = Arc::new(Notify::new());
            let opened = gate.clone();
            drop(spawn(async move {
                yield_now().await;
                a.fetch_add(1, Ordering::Relaxed);
            }));
            spawn(async move {
                yield_now().await;
                b.fetch_add(10, Ordering::Relaxed);
                opened.notify_one();
            })
            .detach();
            gate.notified().await;
        });
        assert_eq!(ran.load(Ordering::Relaxed), 10);
    });
}

#[test]
fn a_panic_of_a_task_is_passed_to_the_awaiting_task() {
    on_every_engine(|context| {
        let task = context.spawn(async { panic!("on purpose") });
        let caught =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| context.block_on(task)));
        assert_eq!(*caught.unwrap_err().downcast_ref::<&str>().unwrap(), "on purpose");
        assert_eq!(context.block_on(async { 1 }), 1, "the Context lives on");
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            context.block_on(spawn_cpu(|| panic!("of the work")))
        }));
        assert_eq!(*caught.unwrap_err().downcast_ref::<&str>().unwrap(), "of the work");
    });
}

/// Many threads spawn onto one Context and wake its tasks while it falls asleep again and again.
#[test]
fn no_wake_from_another_thread_is_lost() {
    on_every_engine(|context| {
        const THREADS: usize = 4;
        const ROUNDS: usize = 500;
        let handle = context.handle();
        let done = Arc::new(Semaphore::new(0));
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let (handle, done) = (handle.clone(), done.clone());
                std::thread::spawn(move || {
                    for round in 0..ROUNDS {
                        let gate = Arc::new(Notify::new());
                        let (opened, done) = (gate.clone(), done.clone());
                        let task = handle.spawn(async move {
                            opened.notified().await;
                            done.add_permits(1);
                        });
                        if round % 3 == 0 {
                            std::thread::yield_now();
                        }
                        gate.notify_one();
                        task.detach();
                    }
                })
            })
            .collect();
        let all = u32::try_from(THREADS * ROUNDS).unwrap();
        context.block_on(async { done.acquire_many(all).await.unwrap().forget() });
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// Two Contexts wake each other in turns; each wake-up must reach a sleeping thread.
#[test]
fn contexts_wake_each_other() {
    let (ping, pong) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (their_ping, their_pong) = (ping.clone(), pong.clone());
    let other = std::thread::spawn(move || {
        let context = Context::new(ContextOptions::default()).unwrap();
        context.block_on(async {
            for _ in 0..1000 {
                their_ping.notified().await;
                their_pong.notify_one();
            }
        });
    });
    let context = Context::new(ContextOptions::default()).unwrap();
    context.block_on(async {
        for _ in 0..1000 {
            ping.notify_one();
            pong.notified().await;
        }
    });
    other.join().unwrap();
}

#[test]
fn block_on_inside_a_task_drives_the_same_context() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        let read = context.block_on(async move {
            spawn(async move {
                block_on(async {
                    file.write(0, pattern(8192, 1).into(), true).await.unwrap();
                    let helper = spawn(async { 5 });
                    let buf = Buf::zeroed(8192, 1);
                    file.read(0, buf.iov()).await.unwrap();
                    helper.await + buf.len()
                })
            })
            .await
        });
        assert_eq!(read, 8197);
    });
}

#[test]
fn tasks_outlive_their_context() {
    on_every_engine(|context| {
        let options = ContextOptions { engine: context.engine(), ..ContextOptions::default() };
        let short_lived = Context::new(options).unwrap();
        let (_dir, file) = scratch();
        let never_polled = short_lived.spawn(async { 1 });
        let waiting = short_lived.spawn(async move {
            file.write(0, pattern(100_000, 2).into(), true).await.unwrap();
            bds_io::sleep(Duration::from_millis(1)).await;
            let buf = Buf::zeroed(100_000, 1);
            file.read(0, buf.iov()).await.unwrap();
            bytes(&buf.iov())
        });
        let asleep = short_lived.spawn(bds_io::sleep(Duration::from_millis(20)));
        short_lived.turn(Some(Duration::ZERO)).unwrap();
        drop(short_lived);
        context.block_on(async {
            assert_eq!(waiting.await, pattern(100_000, 2));
            assert_eq!(never_polled.await, 1);
            asleep.await;
        });
    });
}

#[test]
fn more_operations_than_ring_entries_all_complete() {
    on_every_engine(|context| {
        let options = ContextOptions { engine: context.engine(), ring_entries: 8 };
        let small = Context::new(options).unwrap();
        let (_dir, file) = scratch();
        small.block_on(async {
            file.write(0, pattern(1 << 20, 3).into(), false).await.unwrap();
            let tasks: Vec<_> = (0..1000usize)
                .map(|at| {
                    let file = file.clone();
                    spawn(async move {
                        let buf = Buf::zeroed(1000, 1);
                        assert_eq!(file.read(at as u64 * 1000, buf.iov()).await.unwrap(), 1000);
                        (at, bytes(&buf.iov()))
                    })
                })
                .collect();
            let expected = pattern(1 << 20, 3);
            for task in tasks {
                let (at, read) = task.await;
                assert_eq!(read, &expected[at * 1000..][..1000]);
            }
        });
    });
}

#[test]
fn a_busy_task_does_not_starve_operations() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        context.block_on(async {
            let busy = spawn(async {
                loop {
                    yield_now().await;
                }
            });
            file.write(0, pattern(4096, 1).into(), true).await.unwrap();
            file.sync_data().await.unwrap();
            drop::<bds_io::Task<()>>(busy);
        });
    });
}

#[test]
fn the_environment_variable_chooses_the_engine_of_auto() {
    let context = Context::new(ContextOptions::default()).unwrap();
    match std::env::var("BDS_ENGINE").as_deref() {
        Ok("pool") => assert_eq!(context.engine(), EngineKind::Pool),
        Ok("uring") => assert_eq!(context.engine(), EngineKind::Uring),
        _ => assert_ne!(context.engine(), EngineKind::Auto),
    }
}

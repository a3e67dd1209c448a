//! Tests overlapping requests over thousands of schedules: no byte is lost, no request hangs or
//! stays registered.

use std::sync::Arc;

use bds_io::{Sim, SimConfig};
use futures_util::future::join_all;

use crate::driver::{Limits, Prealloc, Truncate, WriteFlags, ZeroFlags};
use crate::error::ErrorKind;
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph, On, Op, State};
use crate::test_kit::{iov, run};

fn slow(align: u32) -> Config {
    Config {
        limits: Limits { request_alignment: align, ..Limits::default() },
        turns: 2,
        ..Config::default()
    }
}

/// Each of 16 tasks writes its own byte of one or two blocks, which all must be read and written
/// back.
#[test]
fn overlapping_widened_writes_never_lose_bytes() {
    for seed in 0..1000 {
        run(seed, async {
            let (disk, state) = DiskGraph::new().disk(vec![0; 1024], slow(512)).await;
            let disk = Arc::new(disk);
            let writes = (0..16u8).map(|i| {
                let disk = Arc::clone(&disk);
                bds_io::spawn(async move {
                    let at = u64::from(i) * 60 + 8;
                    match i % 4 {
                        0 => {
                            let zeroed = disk.write_zeroes(at, 3, ZeroFlags::empty()).await;
                            let _done = zeroed.unwrap();
                            disk.write(at, iov(&[i + 1], 1), WriteFlags::empty()).await.unwrap();
                        }
                        1 => {
                            disk.read(at, iov(&[0; 100], 1)).await.unwrap();
                            disk.write(at, iov(&[i + 1], 1), WriteFlags::empty()).await.unwrap();
                        }
                        _ => disk.write(at, iov(&[i + 1], 1), WriteFlags::empty()).await.unwrap(),
                    }
                })
            });
            join_all(writes).await;
            let bytes = state.bytes();
            for i in 0..16u8 {
                assert_eq!(bytes[usize::from(i) * 60 + 8], i + 1, "seed {seed}, writer {i}");
            }
        });
    }
}

/// Some of the requests are dropped half-way; the others complete.
#[test]
fn dropped_requests_unblock_others() {
    for seed in 0..500 {
        run(seed, async {
            let (disk, state) = DiskGraph::new().disk(vec![0; 512], slow(512)).await;
            let disk = Arc::new(disk);
            let mut kept = Vec::new();
            for i in 0..12u8 {
                let writer = Arc::clone(&disk);
                let task = bds_io::spawn(async move {
                    writer
                        .write(u64::from(i), iov(&[i + 1], 1), WriteFlags::empty())
                        .await
                        .unwrap();
                });
                if (u64::from(i) + seed) % 3 == 0 {
                    for _ in 0..seed % 7 {
                        bds_io::yield_now().await;
                    }
                    drop(task);
                } else {
                    kept.push((i, task));
                }
            }
            for (i, task) in kept {
                task.await;
                assert_eq!(state.bytes()[usize::from(i)], i + 1);
            }
            disk.flush().await.unwrap();
        });
    }
}

/// Dropped at the n-th poll, for all n: nothing stays registered.
#[test]
fn a_request_dropped_at_any_await_is_unregistered() {
    type Request = fn(Arc<Backend>) -> crate::driver::BoxFuture<'static, ()>;
    let requests: [Request; 5] = [
        |disk| Box::pin(async move { drop(disk.read(3, iov(&[0; 600], 1)).await) }),
        |disk| {
            Box::pin(async move { drop(disk.write(3, iov(&[1; 600], 1), WriteFlags::FUA).await) })
        },
        |disk| Box::pin(async move { drop(disk.write_zeroes(3, 600, ZeroFlags::FUA).await) }),
        |disk| Box::pin(async move { drop(disk.flush().await) }),
        |disk| {
            let len = 1536;
            let grow = Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: false };
            Box::pin(async move { drop(disk.truncate(grow).await) })
        },
    ];
    for (which, request) in requests.iter().enumerate() {
        for n in 0..200 {
            let sim = Sim::new(7, SimConfig::calm());
            let (disk, _state) = sim.block_on(DiskGraph::new().disk(vec![0; 1024], slow(512)));
            let disk = Arc::new(disk);
            let dropped = sim.drop_at(request(Arc::clone(&disk)), n);
            sim.run_until_idle();
            assert_eq!(
                disk.node().unwrap().tracker().in_flight(),
                0,
                "request {which} dropped at {n}"
            );
            assert_eq!(disk.in_flight(), 0);
            sim.block_on(async {
                disk.write(5, iov(&[9], 1), WriteFlags::empty()).await.unwrap();
                disk.flush().await.unwrap();
            });
            sim.block_on(async { drop(disk) });
            if !dropped {
                break;
            }
            assert!(n < 199, "request {which} never ends");
        }
    }
}

#[test]
fn no_wait_fails_rather_than_wait() {
    run(3, async {
        let (disk, state) = DiskGraph::new().disk(vec![0; 1024], slow(512)).await;
        let mut widened = Box::pin(disk.write(1, iov(&[1], 1), WriteFlags::empty()));
        futures_util::future::select(&mut widened, Box::pin(bds_io::yield_now())).await;
        let error = disk.write(0, iov(&[2; 512], 1), WriteFlags::NO_WAIT).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldWait);
        disk.write(512, iov(&[2; 512], 1), WriteFlags::NO_WAIT).await.unwrap();
        widened.await.unwrap();
        assert_eq!(state.bytes()[..2], [0, 1]);
    });
}

/// While a widened write is in flight, inline requests of its node are declined.
#[test]
fn inline_requests_wait_for_a_widened_write() {
    for seed in 0..300 {
        run(seed, async {
            let config = Config { inline: true, ..slow(512) };
            let (disk, state) = DiskGraph::new().disk(vec![0; 1024], config).await;
            let disk = Arc::new(disk);
            let widened = bds_io::spawn({
                let disk = Arc::clone(&disk);
                async move { disk.write(1, iov(&[1], 1), WriteFlags::empty()).await.unwrap() }
            });
            let aligned = bds_io::spawn({
                let disk = Arc::clone(&disk);
                async move {
                    for _ in 0..seed % 9 {
                        bds_io::yield_now().await;
                    }
                    disk.write(0, iov(&[2; 512], 1), WriteFlags::empty()).await.unwrap();
                }
            });
            widened.await;
            aligned.await;
            let bytes = state.bytes();
            // One after the other, in either order; never the old bytes around the widened one.
            assert_eq!(bytes[0], 2, "seed {seed}");
            assert!(bytes[1] == 1 || bytes[1] == 2);
            assert_eq!(bytes[2..512], [2; 510]);
        });
    }
}

#[test]
fn a_write_that_ends_during_a_flush_is_not_covered() {
    run(5, async {
        let (disk, state) = DiskGraph::new().disk(vec![0; 1024], slow(1)).await;
        disk.write(0, iov(&[1], 1), WriteFlags::empty()).await.unwrap();
        let mut flush = Box::pin(disk.flush());
        // The medium is being flushed…
        while !state_has(&state, &Op::FlushToDisk) {
            futures_util::future::select(&mut flush, Box::pin(bds_io::yield_now())).await;
        }
        // … when another write completes.
        let other_write = disk.write(1, iov(&[2], 1), WriteFlags::empty());
        other_write.await.unwrap();
        flush.await.unwrap();
        state.take_log();
        disk.flush().await.unwrap();
        assert!(state.take_log().contains(&Op::FlushToDisk));
    });
}

fn state_has(state: &Arc<State>, wanted: &Op) -> bool {
    let log = state.peek_log();
    log.contains(wanted)
}

#[test]
fn a_failed_write_leaves_the_node_usable_and_dirty() {
    run(6, async {
        let (disk, state) = DiskGraph::new().disk(vec![0; 1024], slow(512)).await;
        state.fail_once(On::Write, None);
        let error = disk.write(1, iov(&[1], 1), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        state.take_log();
        disk.flush().await.unwrap();
        assert!(state.take_log().contains(&Op::FlushToDisk), "it may have written a part");
        disk.write(1, iov(&[1], 1), WriteFlags::empty()).await.unwrap();
    });
}

/// Drives one future on this thread, parked between wake-ups.
fn park_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::task::Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        let mut cx = std::task::Context::from_waker(&waker);
        match future.as_mut().poll(&mut cx) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

/// Real threads: widened writes, inline and waiting ones, and reads of one block, each thread with
/// its own bytes.
#[test]
fn threads_never_lose_bytes_to_each_other() {
    const THREADS: u8 = 4;
    const ROUNDS: u8 = 250;
    let config = Config { inline: true, ..slow(512) };
    let config = Config { turns: 0, ..config };
    let (disk, _state) = run(1, DiskGraph::new().disk(vec![0; 2048], config));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let disk = &disk;
            scope.spawn(move || {
                let own = u64::from(thread);
                for round in 1..=ROUNDS {
                    // One byte in a block that all share, then an own block, inline if possible.
                    park_on(disk.write(own, iov(&[round], 1), WriteFlags::empty())).unwrap();
                    let block = 512 + 512 * (own % 3);
                    let buffer = iov(&[0; 512], 1);
                    park_on(disk.read(block, buffer)).unwrap();
                    let mine = iov(&[0; 1], 1);
                    park_on(disk.read(own, mine.clone())).unwrap();
                    assert_eq!(mine.to_vec(0..1), [round], "thread {thread} lost a byte");
                    if round % 16 == 0 {
                        park_on(disk.flush()).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(disk.node().unwrap().tracker().in_flight(), 0);
    run(2, async { drop(disk) });
}

//! Replay by seed: scheduling, time, cancellation, deadlock.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_io::{Buf, File, IoVec, OpenOptions, Sim, SimConfig};

fn open(sim: &Sim, path: &str) -> File {
    let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    sim.fs().open(Path::new(path), &options).expect("no fault is armed")
}

fn bytes(byte: u8, len: usize) -> IoVec {
    IoVec::from(vec![byte; len])
}

/// Eight tasks that overwrite each other, sync and read back; the seed decides which byte stays.
async fn racing_writes(sim: Sim) -> Vec<u8> {
    let file = open(&sim, "ring");
    let tasks: Vec<_> = (0..8u8)
        .map(|number| {
            let file = file.clone();
            bds_io::spawn(async move {
                for round in 0..4u64 {
                    let _ = file.write(round * 300, bytes(number + 1, 700), false).await;
                    bds_io::yield_now().await;
                    if number % 3 == 0 {
                        file.sync_data().await.expect("no fault is armed");
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    let buf = Buf::zeroed(2000, 512);
    let mut done = 0;
    while done < 1600 {
        let got = file.read(done as u64, buf.slice(done..2000)).await.expect("no fault is armed");
        assert!(got > 0, "the file is 1600 bytes long");
        done += got;
    }
    let mut out = vec![0; 1600];
    buf.iov().copy_to(0, &mut out);
    out
}

fn run(seed: u64) -> (Vec<u8>, u64, Vec<String>, Duration) {
    let sim = Sim::new(seed, SimConfig::default());
    let content = sim.block_on(racing_writes(sim.clone()));
    (content, sim.fingerprint(), sim.trace(), sim.now())
}

#[test]
fn one_seed_replays_a_run() {
    for seed in 0..50 {
        assert_eq!(run(seed), run(seed), "seed {seed}");
    }
}

#[test]
fn seeds_differ_in_order_and_in_outcome() {
    let runs: Vec<_> = (0..50).map(run).collect();
    let orders: BTreeSet<u64> = runs.iter().map(|run| run.1).collect();
    let outcomes: BTreeSet<&Vec<u8>> = runs.iter().map(|run| &run.0).collect();
    assert_eq!(orders.len(), 50);
    assert!(outcomes.len() > 25, "only {} outcomes of the race", outcomes.len());
}

#[test]
fn racing_writes_take_effect_in_any_order_and_reads_see_either() {
    let (mut winners, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for seed in 0..400 {
        let sim = Sim::new(seed, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
        sim.put_file("a", &[9; 1024]);
        let file = open(&sim, "a");
        let buf = Buf::zeroed(1024, 512);
        sim.block_on(async {
            let (one, two, read) = futures_util::join!(
                file.write(0, bytes(1, 1024), false),
                file.write(0, bytes(2, 1024), false),
                file.read(0, buf.iov()),
            );
            assert!(one.is_ok() && two.is_ok() && read.is_ok());
        });
        let content = sim.snapshot_file("a");
        winners.insert((content[0], content[1023]));
        let mut out = [0; 1024];
        buf.iov().copy_to(0, &mut out);
        seen.insert((out[0], out[1023]));
    }
    assert_eq!(winners, BTreeSet::from([(1, 1), (1, 2), (2, 1), (2, 2)]), "also torn");
    assert!(
        seen.is_superset(&BTreeSet::from([(9, 9), (1, 1), (2, 2), (1, 9), (9, 1)])),
        "{seen:?}"
    );
}

#[test]
fn run_until_idle_ends_although_a_task_never_does() {
    let sim = Sim::new(2, SimConfig::default());
    sim.spawn(async {
        loop {
            bds_io::sleep(Duration::from_secs(60)).await;
        }
    })
    .detach();
    sim.run_until_idle();
    assert_eq!(sim.now(), Duration::from_secs(3600));
    sim.power_cut();
    sim.run_until_idle();
}

#[test]
fn sleepers_wake_in_the_order_of_their_moments() {
    for seed in 0..50 {
        let sim = Sim::new(seed, SimConfig::default());
        let log = Arc::new(Mutex::new(Vec::new()));
        sim.block_on(async {
            let tasks: Vec<_> = [30u64, 10, 20, 40]
                .into_iter()
                .map(|hours| {
                    let log = log.clone();
                    bds_io::spawn(async move {
                        bds_io::sleep(Duration::from_secs(hours * 3600)).await;
                        log.lock()
                            .expect("no holder panicked")
                            .push((hours, bds_io::now().as_secs()));
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
        });
        let hours = |hours: u64| (hours, hours * 3600);
        let expected = [hours(10), hours(20), hours(30), hours(40)];
        assert_eq!(*log.lock().expect("no holder panicked"), expected, "seed {seed}");
    }
}

#[test]
fn sleepers_of_one_moment_wake_in_an_order_of_the_seed() {
    let first = |seed| {
        // Nothing is chosen among ready tasks: each is run before the next event comes.
        let sim = Sim::new(seed, SimConfig { overtake_rate: 0.0, ..SimConfig::default() });
        sim.block_on(async {
            let sleep = async |number: u8| {
                bds_io::sleep(Duration::from_secs(1)).await;
                number
            };
            futures_util::select_biased! {
                number = std::pin::pin!(futures_util::FutureExt::fuse(sleep(1))) => number,
                number = std::pin::pin!(futures_util::FutureExt::fuse(sleep(2))) => number,
            }
        })
    };
    let firsts: BTreeSet<u8> = (0..50).map(first).collect();
    assert_eq!(firsts, BTreeSet::from([1, 2]));
}

#[test]
fn ready_tasks_run_in_an_order_of_the_seed() {
    let order = |seed| {
        let sim = Sim::new(seed, SimConfig::default());
        let log = Arc::new(Mutex::new(Vec::new()));
        sim.block_on(async {
            let task = |number: u8| {
                let log = log.clone();
                bds_io::spawn(async move { log.lock().expect("no holder panicked").push(number) })
            };
            for task in (0..4).map(task).collect::<Vec<_>>() {
                task.await;
            }
        });
        Arc::into_inner(log).expect("all tasks are gone").into_inner().expect("no holder panicked")
    };
    let orders: BTreeSet<Vec<u8>> = (0..500).map(order).collect();
    assert_eq!(orders.len(), 24, "every order of four tasks occurs");
}

#[test]
fn a_deadlock_is_named_with_its_seed_and_the_waiting_task() {
    let sim = Sim::new(77, SimConfig::default());
    let panic = catch_unwind(AssertUnwindSafe(|| {
        sim.block_on(async {
            let never = bds_io::sync::Notify::new();
            let task = bds_io::spawn(async move { never.notified().await });
            task.await;
        });
    }))
    .expect_err("nothing can ever run");
    let text = panic.downcast_ref::<String>().expect("a formatted panic");
    assert!(text.contains("seed 77") && text.contains("deadlock"), "{text}");
    assert!(text.contains("sim_replay.rs"), "{text}");
}

#[test]
fn a_livelock_is_named() {
    let config = SimConfig { max_turns: 1000, ..SimConfig::default() };
    let sim = Sim::new(5, config);
    let panic = catch_unwind(AssertUnwindSafe(|| {
        sim.block_on(async {
            loop {
                bds_io::yield_now().await;
            }
        })
    }))
    .expect_err("it never ends");
    let text = panic.downcast_ref::<String>().expect("a formatted panic");
    assert!(text.contains("seed 5") && text.contains("livelock"), "{text}");
}

#[test]
fn a_block_on_inside_drives_the_same_world() {
    let sim = Sim::new(3, SimConfig::default());
    let file = open(&sim, "a");
    let len = sim.block_on(async {
        let background = bds_io::spawn(async { bds_io::sleep(Duration::from_millis(1)).await });
        sim.block_on(async { file.set_len(9000).await.expect("no fault is armed") });
        background.await;
        file.len().expect("regular file")
    });
    assert_eq!(len, 9000);
}

#[test]
fn cpu_work_is_done_even_if_its_future_is_dropped() {
    let sim = Sim::new(4, SimConfig::default());
    assert_eq!(sim.block_on(bds_io::spawn_cpu(|| 6 * 7)), 42);
    let done = Arc::new(AtomicUsize::new(0));
    let work = done.clone();
    let spawn_cpu = bds_io::spawn_cpu(move || work.fetch_add(1, Ordering::Relaxed));
    assert!(sim.drop_at(spawn_cpu, 1), "an answer takes time");
    assert_eq!(done.load(Ordering::Relaxed), 1);
}

/// Three writes in order; a dropped future stops the ones not yet begun, and only these.
async fn three(file: File, finished: Arc<AtomicUsize>) {
    for number in 0..3u8 {
        let offset = u64::from(number) * 4096;
        file.write(offset, bytes(number + 1, 4096), false).await.expect("no fault is armed");
        finished.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_dropped_or_forgotten_future_leaves_its_operation_running() {
    for is_forgotten in [false, true] {
        let mut n = 0;
        loop {
            let sim = Sim::new(9, SimConfig::calm());
            let file = open(&sim, "a");
            let finished = Arc::new(AtomicUsize::new(0));
            let future = three(file.clone(), finished.clone());
            let was_cut_off =
                if is_forgotten { sim.forget_at(future, n) } else { sim.drop_at(future, n) };
            let finished = finished.load(Ordering::Relaxed);
            if !was_cut_off {
                assert_eq!((finished, n), (3, 4));
                break;
            }
            // Dropped in the n-th wait: n - 1 writes were answered, the n-th is on the disk too.
            assert_eq!(finished, n.saturating_sub(1));
            assert_eq!(file.len().expect("regular file"), n as u64 * 4096);
            let content = sim.snapshot_file("a");
            assert!(
                content.chunks(4096).zip(1..).all(|(page, byte)| page.iter().all(|b| *b == byte))
            );
            n += 1;
        }
    }
}

#[test]
fn a_dropped_write_may_be_cancelled_but_never_in_part() {
    let mut lens = BTreeSet::new();
    for seed in 0..100 {
        let config = SimConfig { cancel_rate: 0.5, ..SimConfig::calm() };
        let sim = Sim::new(seed, config);
        let file = open(&sim, "a");
        assert!(sim.drop_at(file.write(0, bytes(1, 4096), false), 1));
        lens.insert(file.len().expect("regular file"));
    }
    assert_eq!(lens, BTreeSet::from([0, 4096]));
}

#[test]
fn an_operation_in_flight_keeps_its_buffer() {
    let sim = Sim::new(10, SimConfig::calm());
    sim.put_file("a", &[7; 8192]);
    let file = open(&sim, "a");
    let mut buf = Buf::zeroed(8192, 512);
    let iov = buf.iov();
    // Forgotten in its first wait: the future, with its IoVec, is never dropped.
    let read = Box::pin({
        let file = file.clone();
        async move { file.read(0, iov).await }
    });
    sim.block_on(async {
        let mut read = read;
        assert!(futures_util::poll!(read.as_mut()).is_pending());
        assert!(buf.get_mut().is_none(), "the operation can reach the bytes");
        std::mem::forget(read);
    });
    sim.run_until_idle();
    let bytes = buf.get_mut().expect("completed: the operation let go of its memory");
    assert!(bytes.iter().all(|byte| *byte == 7));
}

#[test]
fn a_cut_drops_the_tasks_of_a_world() {
    let sim = Sim::new(11, SimConfig::default());
    let witness = Arc::new(());
    let file = open(&sim, "a");
    sim.cut_after_writes(Some(3));
    let end = sim.run_until_cut(async {
        for _ in 0..4 {
            let (witness, file) = (witness.clone(), file.clone());
            bds_io::spawn(async move {
                bds_io::sync::Notify::new().notified().await;
                drop((witness, file));
            })
            .detach();
        }
        loop {
            let _ = file.write(0, bytes(1, 512), false).await;
        }
    });
    assert!(end.is_none() && sim.is_cut());
    assert_eq!(Arc::strong_count(&witness), 1, "tasks of a dead world are dropped");
}

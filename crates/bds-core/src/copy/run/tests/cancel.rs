//! Copies dropped at every await, and forgotten: no range is lost, and a late write of a dropped
//! copy does not land on top of a later one.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Control, Fake, GRANULE, pattern};
use crate::copy::{CopyMap, ErrorVerdict, RunOptions, run, run_in_task};
use crate::test_kit::disk::{Config, DiskGraph, backend};
use crate::test_kit::{let_tasks_run, run as simulate, yield_times};

/// Polls a future this many times, then drops it. `None`: it was dropped.
async fn polled<T>(times: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    for _ in 0..times {
        if let std::task::Poll::Ready(value) = futures_util::poll!(future.as_mut()) {
            return Some(value);
        }
        bds_io::yield_now().await;
    }
    None
}

fn options() -> RunOptions {
    RunOptions { max_requests: 3, max_chunk: 2 * GRANULE, ..RunOptions::default() }
}

#[test]
fn dropped_at_every_await_nothing_is_lost() {
    let len = 9 * GRANULE + 700;
    let mut was_ready = false;
    for polls in 0..400 {
        was_ready |= simulate(polls as u64, async {
            let source = Fake::new("source", pattern(len, 8), polls as u64);
            let target = Fake::new("target", vec![0; len as usize], 3);
            source.fails.store(7, Ordering::SeqCst);
            let map = CopyMap::new(len, 4096).unwrap();
            map.mark_all();
            let control = Control::new(&source, &target, ErrorVerdict::Retry, 9);
            let options = options();
            let copy = run(&map, &*source, &*target, &options, &*control);
            let is_ready = polled(polls, copy).await.is_some();
            assert_eq!(map.in_flight_bytes(), 0);
            assert!(map.is_idle(&(0..len)));
            // Each granule is dirty, or equal.
            for at in (0..len).step_by(GRANULE as usize) {
                let is_equal = source.bytes()[at as usize] == target.bytes()[at as usize];
                assert!(is_equal || map.bitmap().is_dirty(at), "{at} was lost");
            }
            run(&map, &*source, &*target, &options, &*control).await.unwrap();
            assert_eq!(source.bytes(), target.bytes());
            is_ready
        });
    }
    assert!(was_ready, "the sweep reached the end of the copy");
}

/// On nodes: the driver works on after the drop. The guest writes, the copy is begun anew, and the
/// late write of the dropped one must not win.
#[test]
fn a_late_write_of_a_dropped_copy_does_not_land_on_a_later_one() {
    let len = 6 * GRANULE;
    for polls in 0..60 {
        simulate(polls as u64, async {
            let disks = DiskGraph::new();
            let slow = |turns| Config { turns, ..Config::default() };
            let (source_node, source) = disks.node("source", pattern(len, 8), slow(1)).await;
            let zeros = vec![0; len as usize];
            let (target_node, target) = disks.node("target", zeros, slow(7)).await;
            let (from, to) = (backend(&source_node), backend(&target_node));
            let map = CopyMap::new(len, 4096).unwrap();
            map.mark_all();
            let options = options();
            drop(polled(polls, run(&map, &from, &to, &options, &())).await);
            assert_eq!(map.in_flight_bytes(), 0);
            from.write(0, crate::test_kit::iov(&pattern(len, 99), 1), Default::default())
                .await
                .unwrap();
            map.mark_all();
            run(&map, &from, &to, &options, &()).await.unwrap();
            let_tasks_run().await;
            assert_eq!(target.bytes(), source.bytes(), "after {polls} polls");
        });
    }
}

#[test]
fn a_forgotten_copy_in_a_task_runs_to_its_end() {
    let len = 9 * GRANULE;
    for polls in 1..40_usize {
        simulate(polls as u64, async {
            let source = Fake::new("source", pattern(len, 8), 1);
            let target = Fake::new("target", vec![0; len as usize], 3);
            let map = Arc::new(CopyMap::new(len, 4096).unwrap());
            map.mark_all();
            let control = Control::new(&source, &target, ErrorVerdict::Retry, 5);
            let copy = run_in_task(map.clone(), source.clone(), target.clone(), options(), control);
            let mut copy = Box::pin(copy);
            let mut is_ready = false;
            for _ in 0..polls {
                is_ready = is_ready || futures_util::poll!(copy.as_mut()).is_ready();
                yield_times(1).await;
            }
            std::mem::forget(copy);
            map.wait_idle(0..len).await;
            let_tasks_run().await;
            assert!(map.is_clean());
            assert_eq!(source.bytes(), target.bytes());
        });
    }
}

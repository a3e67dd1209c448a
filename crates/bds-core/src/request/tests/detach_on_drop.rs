//! Tests requests that are dropped while their driver works.

use bds_io::yield_now;
use futures_util::poll;

use crate::driver::{Prealloc, Truncate, WriteFlags};
use crate::test_kit::disk::{Config, DiskGraph, Op};
use crate::test_kit::{iov, run};

fn slow(turns: usize) -> Config {
    Config { turns, ..Config::default() }
}

#[test]
fn a_dropped_write_completes_if_its_driver_was_polled() {
    for seed in 0..200 {
        run(seed, async {
            let (disk, state) = DiskGraph::new().disk(vec![0; 512], slow(5)).await;
            drop(disk.write(0, iov(&[1; 512], 1), WriteFlags::empty()));
            assert_eq!(disk.node().unwrap().in_flight(), 0);
            let mut write = Box::pin(disk.write(0, iov(&[2; 512], 1), WriteFlags::empty()));
            assert!(poll!(write.as_mut()).is_pending());
            drop(write);
            assert_eq!(disk.node().unwrap().in_flight(), 1, "its driver works");
            disk.write(256, iov(&[3; 256], 1), WriteFlags::empty()).await.unwrap();
            assert_eq!(disk.node().unwrap().in_flight(), 0, "it was waited for");
            assert_eq!(state.bytes(), [[2; 256], [3; 256]].concat());
            let writes =
                [Op::Write(0..512, WriteFlags::empty()), Op::Write(256..512, WriteFlags::empty())];
            assert_eq!(state.take_log(), writes);
        });
    }
}

#[test]
fn a_stuck_write_does_not_block_a_poisoned_node() {
    for seed in 0..10 {
        run(seed, async {
            let (disk, _state) = DiskGraph::new().disk(vec![0; 512], slow(5000)).await;
            let node = disk.node().unwrap();
            let mut write = Box::pin(disk.write(0, iov(&[2; 512], 1), WriteFlags::empty()));
            assert!(poll!(write.as_mut()).is_pending());
            drop(write);
            for _ in 0..20 {
                yield_now().await;
            }
            assert_eq!(node.in_flight(), 1);
            node.poison();
            drop(disk);
            for _ in 0..20 {
                yield_now().await;
            }
            assert_eq!(node.in_flight(), 0);
            let _report = node.close().await.expect("no other holder");
        });
    }
}

#[test]
fn a_dropped_resize_blocks_requests_past_the_new_end() {
    for seed in 0..200 {
        run(seed, async {
            let (disk, state) = DiskGraph::new().disk(vec![1; 1024], slow(5)).await;
            let change =
                Truncate { len: 512, exact: true, prealloc: Prealloc::Off, zero_new: false };
            let mut cut = Box::pin(disk.truncate(change));
            let has_ended = poll!(cut.as_mut()).is_ready();
            drop(cut);
            let back = Truncate { len: 1024, ..change };
            disk.truncate(back).await.unwrap();
            disk.write(512, iov(&[3; 512], 1), WriteFlags::empty()).await.unwrap();
            for _ in 0..50 {
                yield_now().await;
            }
            assert_eq!(state.bytes()[512..], [3; 512], "{has_ended} seed {seed}");
        });
    }
}

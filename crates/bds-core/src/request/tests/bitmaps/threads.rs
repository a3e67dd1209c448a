//! Writers on real threads beside bitmaps that come, split, end and go: no write is lost.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::fine;
use crate::bitmap::HBitmap;
use crate::graph::{BitmapOptions, NodeRef};
use crate::test_kit::disk::{Config, DiskGraph, State, backend};
use crate::test_kit::lock;

const BLOCKS: u64 = 64;
const ROUNDS: u64 = 3000;

/// Copies the dirty blocks, which are claimed before they are read.
fn copy(state: &State, target: &Mutex<Vec<u8>>, bits: &HBitmap) {
    while let Some(area) = bits.claim(0..u64::MAX, 512) {
        let range = usize::try_from(area.start).unwrap()..usize::try_from(area.end).unwrap();
        let bytes = lock(&state.bytes)[range.clone()].to_vec();
        lock(target)[range].copy_from_slice(&bytes);
    }
}

/// A backup by a bitmap that is made for it, and then incremental ones.
fn backups(node: &NodeRef, state: &State, target: &Mutex<Vec<u8>>, round: u64) {
    bds_io::block_on(async {
        node.add_bitmap(fine("b")).await.unwrap();
        let all = HBitmap::new(node.len(), 512).unwrap();
        all.set_all();
        copy(state, target, &all);
        for n in 0..round % 4 {
            incremental(node, state, target, n % 2 == 0);
        }
        if round.is_multiple_of(5) {
            // A rotation: the new one records before the old one stops.
            node.add_bitmap(fine("c")).await.unwrap();
            node.disable_bitmap("b").await.unwrap();
            node.merge_bitmaps("c", &[(node, "b")]).await.unwrap();
            node.remove_bitmap("b").await.unwrap();
            let lease = node.lease_bitmap("c", "a backup").unwrap();
            lease.split().unwrap();
            copy(state, target, &lease.bits());
            lease.abdicate().unwrap();
            node.remove_bitmap("c").await.unwrap();
        } else {
            node.remove_bitmap("b").await.unwrap();
        }
    });
}

fn incremental(node: &NodeRef, state: &State, target: &Mutex<Vec<u8>>, succeeds: bool) {
    let lease = node.lease_bitmap("b", "a backup").unwrap();
    lease.split().unwrap();
    if succeeds {
        copy(state, target, &lease.bits());
        lease.abdicate().unwrap();
    } else {
        lease.reclaim();
    }
}

#[test]
fn no_write_is_lost_between_threads() {
    let disks = DiskGraph::new();
    let len = usize::try_from(BLOCKS * 512).unwrap();
    let config = Config { inline: true, ..Config::default() };
    let (node, state): (NodeRef, Arc<State>) =
        bds_io::block_on(disks.node("disk", vec![0; len], config));
    let target = Mutex::new(vec![0; len]);
    let left = AtomicU64::new(3);
    std::thread::scope(|scope| {
        for writer in 0..3 {
            let (disk, left) = (backend(&node), &left);
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    let block = (round * 7 + writer * 31) % BLOCKS * 512;
                    let byte = u8::try_from(round % 251).unwrap();
                    disk.write_at(block, &[byte; 512]).unwrap();
                }
                left.fetch_sub(1, Ordering::Release);
            });
        }
        let mut round = 0;
        while left.load(Ordering::Acquire) > 0 {
            backups(&node, &state, &target, round);
            round += 1;
        }
    });
    backups(&node, &state, &target, 0);
    assert_eq!(*lock(&target), state.bytes());
}

/// One bitmap through all backups: what is written between two of them is in the next one.
#[test]
fn incremental_backups_between_threads_lose_nothing() {
    let disks = DiskGraph::new();
    let len = usize::try_from(BLOCKS * 512).unwrap();
    let config = Config { inline: true, ..Config::default() };
    let (node, state) = bds_io::block_on(disks.node("disk", vec![0; len], config));
    bds_io::block_on(node.add_bitmap(fine("b"))).unwrap();
    let noise = BitmapOptions { disabled: true, ..fine("noise") };
    bds_io::block_on(node.add_bitmap(noise)).unwrap();
    let target = Mutex::new(vec![0; len]);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let disk = backend(&node);
                scope.spawn(move || {
                    for round in 1..=2 * ROUNDS {
                        let block = (round * 11 + writer * 5) % BLOCKS * 512;
                        disk.write_at(block, &[u8::try_from(round % 251).unwrap(); 512]).unwrap();
                    }
                })
            })
            .collect();
        let (node, over) = (&node, &is_over);
        scope.spawn(move || {
            // Lists change all the time.
            while !over.load(Ordering::Acquire) {
                bds_io::block_on(node.enable_bitmap("noise")).unwrap();
                bds_io::block_on(node.disable_bitmap("noise")).unwrap();
            }
        });
        let mut round = 0_u64;
        while writers.iter().any(|writer| !writer.is_finished()) {
            incremental(node, &state, &target, !round.is_multiple_of(3));
            round += 1;
        }
        is_over.store(true, Ordering::Release);
    });
    incremental(&node, &state, &target, true);
    assert_eq!(*lock(&target), state.bytes());
}

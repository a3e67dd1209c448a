//! Searches schedules: writers, and incremental backups of what a bitmap has recorded. A backup
//! succeeds, fails, or is dropped; in the end the copy is the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::fine;
use crate::bitmap::HBitmap;
use crate::driver::WriteFlags;
use crate::graph::NodeRef;
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph, State};
use crate::test_kit::{iov, run, yield_times};

const BLOCKS: u64 = 16;
const LEN: usize = 512 * 16;

/// What a backup and its source share.
struct World {
    node: NodeRef,
    state: Arc<State>,
    copy: std::sync::Mutex<Vec<u8>>,
    is_over: AtomicBool,
}

impl World {
    /// Copies what is dirty in `bits`, block by block, and yields in between; stops after `most`.
    async fn copy(&self, bits: &HBitmap, most: usize) -> bool {
        for _ in 0..most {
            let Some(area) = bits.claim(0..u64::MAX, 512) else { return true };
            let range = usize::try_from(area.start).unwrap()..usize::try_from(area.end).unwrap();
            let bytes = self.state.bytes()[range.clone()].to_vec();
            crate::test_kit::lock(&self.copy)[range].copy_from_slice(&bytes);
            bds_io::yield_now().await;
        }
        bits.next_dirty(0..u64::MAX).is_none()
    }

    /// One incremental backup, which succeeds if it may copy enough.
    async fn backup(&self, round: u64) {
        let lease = self.node.lease_bitmap("b", "a backup").unwrap();
        match round % 2 {
            0 => lease.split().unwrap(),
            _ => {
                let change = self.node.graph().change().split_bitmap(&lease);
                change.commit().await.unwrap();
            }
        }
        // The frozen bits are copied, so that a failed backup has them all still.
        let work = lease.bits().resized(lease.bits().len()).unwrap();
        let done = self.copy(&work, usize::try_from(round % 7 * 3).unwrap()).await;
        match (done, round % 3) {
            (true, _) => lease.abdicate().unwrap(),
            (false, 0) => lease.abdicate_keeping(&work).unwrap(),
            (false, _) => lease.reclaim(),
        }
    }

    async fn load(&self, disk: Backend, seed: u64) {
        for n in 0..40_u64 {
            let random = (seed + n).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let block = random % BLOCKS * 512;
            let byte = u8::try_from(n + 1).unwrap();
            let write = disk.write(block, iov(&[byte; 512], 1), WriteFlags::empty());
            match random % 5 {
                // Dropped on the way: the driver may go on.
                0 => {
                    let mut write = Box::pin(write);
                    let _done = futures_util::poll!(write.as_mut());
                    yield_times(usize::try_from(random % 3).unwrap()).await;
                }
                _ => write.await.unwrap(),
            }
        }
    }
}

#[test]
fn no_schedule_loses_a_write() {
    for seed in 0..150 {
        run(seed, async {
            let config = Config { turns: 2, inline: seed % 2 == 0, ..Config::default() };
            let (disk, state) = DiskGraph::new().disk(vec![0; LEN], config).await;
            let node = disk.node().unwrap();
            let world = Arc::new(World {
                node: node.clone(),
                state: state.clone(),
                copy: std::sync::Mutex::new(vec![0; LEN]),
                is_over: AtomicBool::new(false),
            });
            let (loaded, writer) = (world.clone(), disk.clone());
            let load = bds_io::spawn(async move {
                loaded.load(writer, seed).await;
                loaded.is_over.store(true, Ordering::Relaxed);
            });
            yield_times(usize::try_from(seed % 20).unwrap()).await;
            // Writes are under way while the bitmap is added; what they did is copied in full.
            node.add_bitmap(fine("b")).await.unwrap();
            let all = HBitmap::new(LEN as u64, 512).unwrap();
            all.set_all();
            assert!(world.copy(&all, usize::MAX).await);
            let mut round = seed;
            while !world.is_over.load(Ordering::Relaxed) {
                world.backup(round).await;
                yield_times(3).await;
                round += 1;
            }
            load.await;
            drop(node.graph().drain(&node).await); // dropped writes end
            world.backup(6).await; // copies at most 18 blocks: all
            assert_eq!(*crate::test_kit::lock(&world.copy), state.bytes(), "seed {seed}");
        });
    }
}

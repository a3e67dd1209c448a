//! Writers on threads of their own beside checkpoints: whenever none is at work, the file has every
//! block that the bitmap in memory has.

use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::bitmap::intent_log::Found;
use bds_core::driver::WriteFlags;
use bds_io::{Buf, Fs, OpenOptions};
use bds_testkit::{Chance, Scratch};

use super::{Disk, LEN, options, persistent};

const WRITERS: u64 = 3;
const ROUNDS: u64 = 8;
const WRITES: u64 = 60;

/// The dirty granules of 'daily' as a crash would leave them.
async fn after_a_crash(log: &Path) -> Vec<u64> {
    let file = Fs::Host.open(log, &OpenOptions::default()).unwrap();
    let found = Found::read(&file).await.unwrap().unwrap();
    let daily = found.bitmaps(LEN, false).unwrap().into_iter().find(|it| &*it.name == "daily");
    let bits = daily.unwrap().bits;
    (0..LEN / 65536).filter(|granule| bits.is_dirty(granule * 65536)).collect()
}

fn write(disk: &Disk, chance: &mut Chance) {
    let at = chance.below(LEN / 4096) * 4096;
    let iov = Buf::zeroed(4096, 4096).iov();
    bds_io::block_on(disk.guest.write(at, iov, WriteFlags::empty())).unwrap();
}

#[test]
fn the_log_has_what_threads_have_written_beside_checkpoints() {
    for format in ["raw", "qcow2"] {
        let scratch = Scratch::new();
        let (path, log) = (scratch.path("disk"), scratch.path("disk.bds-cbt"));
        let graph = super::graph(Fs::Host);
        let image = bds_core::graph::NewImage {
            format: format.into(),
            path: path.clone(),
            options: bds_core::Options::new().with("size", LEN),
            skip_backing: false,
        };
        bds_io::block_on(graph.create_image(image)).unwrap();
        let disk = bds_io::block_on(Disk::open(Fs::Host, options(format, &path))).unwrap();
        bds_io::block_on(disk.node.add_bitmap(persistent("daily"))).unwrap();
        let (turn, is_over) = (Barrier::new(WRITERS as usize + 1), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (disk, turn, is_over) = (&disk, &turn, &is_over);
                scope.spawn(move || {
                    let mut chance = Chance::new(writer + 1);
                    loop {
                        turn.wait();
                        if is_over.load(Ordering::SeqCst) {
                            return;
                        }
                        (0..WRITES).for_each(|_| write(disk, &mut chance));
                        turn.wait();
                    }
                });
            }
            for round in 0..ROUNDS {
                turn.wait();
                bds_io::block_on(async {
                    // Each edit makes a checkpoint.
                    for _ in 0..3 {
                        disk.node.add_bitmap(persistent("other")).await.unwrap();
                        disk.node.remove_bitmap("other").await.unwrap();
                    }
                });
                turn.wait();
                let stored = bds_io::block_on(after_a_crash(&log));
                let bits = disk.node.copy_bitmap("daily").unwrap();
                let dirty = (0..LEN / 65536).filter(|granule| bits.is_dirty(granule * 65536));
                let missing: Vec<u64> = dirty.filter(|it| !stored.contains(it)).collect();
                assert!(missing.is_empty(), "{format} round {round}: {missing:?}");
                if round % 2 == 1 {
                    bds_io::block_on(disk.node.clear_bitmap("daily")).unwrap();
                }
            }
            is_over.store(true, Ordering::SeqCst);
            turn.wait();
        });
        bds_io::block_on(disk.close()).unwrap();
    }
}

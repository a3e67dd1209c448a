//! A raw data file reads like the disk at every quiet moment, whatever requests overlapped before.

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::options::Options;
use bds_core::request::Backend;
use bds_io::{Buf, Sim, SimConfig};
use bds_testkit::Chance;

use super::harness::{DATA, Shape, close, graph, make, open, options, read};

const CLUSTER: u64 = 4096;
const SIZE: u64 = 8 * CLUSTER;

fn discarding() -> Options {
    let data = serde_json::json!({"driver": "file", "filename": DATA, "discard": "unmap"});
    options().with("data-file", data)
}

/// A request of whole clusters, or of sectors, at a random place.
async fn request(disk: Backend, mut chance: Chance) {
    for _ in 0..4 {
        let unit = if chance.one_in(2) { CLUSTER } else { 512 };
        let at = chance.below(SIZE / unit) * unit;
        let len = (unit * chance.between(1, 3)).min(SIZE - at);
        match chance.below(5) {
            0 | 1 => {
                let byte = u8::try_from(chance.between(1, 255)).unwrap();
                let bytes = vec![byte; usize::try_from(len).unwrap()];
                disk.write(at, Buf::from_slice(&bytes).iov(), WriteFlags::empty()).await.unwrap();
            }
            2 => disk.discard(at, len).await.unwrap(),
            kind => {
                let unmaps = kind == 3;
                let flags = if unmaps { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                let _done = disk.write_zeroes(at, len, flags).await.unwrap();
            }
        }
    }
}

fn overlapping_requests(extended_l2: bool, seed: u64) {
    let sim = Sim::new(seed, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
    let cluster = if extended_l2 { 16384 } else { CLUSTER };
    let shape = Shape {
        size: SIZE,
        cluster,
        extended_l2,
        data_file: true,
        data_file_raw: true,
        ..Shape::default()
    };
    make(&sim, &shape);
    let graph = graph(&sim);
    sim.block_on(async {
        let (node, disk) = open(&graph, discarding()).await;
        let mut chance = Chance::new(seed);
        for round in 0..3 {
            let tasks: Vec<_> = (0..4)
                .map(|_| bds_io::spawn(request(disk.clone(), Chance::new(chance.draw()))))
                .collect();
            for task in tasks {
                task.await;
            }
            let shown = read(&disk, 0, usize::try_from(SIZE).unwrap()).await.unwrap();
            let mut file = sim.snapshot_file(DATA);
            file.resize(shown.len(), 0);
            let differs = (0..shown.len()).find(|at| shown[*at] != file[*at]);
            if let Some(at) = differs {
                panic!(
                    "extended {extended_l2}, seed {seed}, round {round}: byte {at:#x} of the disk \
                     is {:#x}, of the data file {:#x}",
                    shown[at], file[at]
                );
            }
        }
        close(&graph, node, disk).await;
    });
}

/// Zeros and discards that overlap writes in flight: the file and the entries get the same order.
#[test]
fn zeros_and_writes_that_overlap_leave_the_data_file_like_the_disk() {
    for seed in 0..150 {
        overlapping_requests(false, seed);
        overlapping_requests(true, seed);
    }
}

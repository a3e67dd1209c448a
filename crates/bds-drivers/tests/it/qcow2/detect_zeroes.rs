//! `detect-zeroes=unmap`: zeros of one request deallocate nothing that another one has written.

use bds_core::driver::WriteFlags;
use bds_core::request::Backend;
use bds_io::{Buf, Sim, SimConfig};
use bds_testkit::Chance;

use super::harness::{Shape, close, graph, make, open, options, read};

const SIZE: u64 = 96 << 10;
/// Users of the disk, each with every fourth cell.
const USERS: u64 = 4;

/// Writes zeros and data into the cells of one user, and reads each back at once. Returns the bytes
/// of the disk as far as they are this user's.
async fn user(disk: Backend, number: u64, cell: u64, mut chance: Chance) -> Vec<u8> {
    let mut expected = vec![0; usize::try_from(SIZE).unwrap()];
    for _ in 0..30 {
        let cells = SIZE / cell / USERS;
        let start = (chance.below(cells) * USERS + number) * cell;
        // A part of the cell, or all of it.
        let (skip, rest) = if chance.one_in(2) { (0, 0) } else { (cell / 4, cell / 8) };
        let (at, len) = (start + skip, cell - skip - rest);
        let byte = if chance.one_in(2) { 0 } else { u8::try_from(chance.between(1, 255)).unwrap() };
        let bytes = vec![byte; usize::try_from(len).unwrap()];
        disk.write(at, Buf::from_slice(&bytes).iov(), WriteFlags::empty()).await.unwrap();
        let index = usize::try_from(at).unwrap();
        expected[index..index + bytes.len()].copy_from_slice(&bytes);
        let found = read(&disk, start, usize::try_from(cell).unwrap()).await.unwrap();
        let start = usize::try_from(start).unwrap();
        assert!(found == expected[start..start + found.len()], "user {number}, cell at {start:#x}");
    }
    expected
}

fn users_side_by_side(shape: &Shape, cell: u64, seed: u64) {
    let sim = Sim::new(seed, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
    make(&sim, shape);
    let graph = graph(&sim);
    sim.block_on(async {
        let (node, disk) = open(&graph, options().with("detect-zeroes", "unmap")).await;
        let mut chance = Chance::new(seed);
        let users: Vec<_> = (0..USERS)
            .map(|n| bds_io::spawn(user(disk.clone(), n, cell, Chance::new(chance.draw()))))
            .collect();
        for (number, user) in users.into_iter().enumerate() {
            let expected = user.await;
            let shown = read(&disk, 0, expected.len()).await.unwrap();
            let cell = usize::try_from(cell).unwrap();
            for (n, (shown, expected)) in shown.chunks(cell).zip(expected.chunks(cell)).enumerate()
            {
                let is_own = n % 4 == number && shown.len() == cell;
                assert!(!is_own || shown == expected, "seed {seed}, user {number}, cell {n}");
            }
        }
        close(&graph, node, disk).await;
    });
}

/// Cells of several users lie in one cluster, and are no multiples of sectors: a write of zeros is
/// padded to sectors with the bytes of the neighbours, and must not take them along.
#[test]
fn detected_zeros_beside_writes_in_flight_lose_nothing() {
    let plain = Shape { size: SIZE, cluster: 4096, ..Shape::default() };
    let shapes = [
        plain,
        Shape { cluster: 16384, extended_l2: true, ..plain },
        Shape { compat: "v2", ..plain },
        Shape { data_file: true, data_file_raw: true, ..plain },
    ];
    for seed in 0..25 {
        for shape in &shapes {
            for cell in [700, 1024, 4096, 6000] {
                users_side_by_side(shape, cell, seed);
            }
        }
    }
}

//! Copy on read: what is copied, in which pieces, and what keeps its place meanwhile.

use std::sync::Arc;

use bds_io::{Buf, Sim, SimConfig};

use super::fake::{Config, House, On, Op, State, backend};
use super::run;
use crate::driver::{Limits, StatusFlags, WriteFlags, ZeroFlags};
use crate::error::ErrorKind;
use crate::graph::NodeRef;
use crate::options::Options;
use crate::request::Backend;

const KIB: u64 = 1024;

/// 64 KiB in units of 4 KiB; of 8 to 40 KiB nothing is held. The last 8 KiB of them are zeros.
async fn disk(house: &House, config: Config) -> (NodeRef, Arc<State>) {
    let read_only = Options::new().with("read-only", true);
    let base = Config { options: read_only, ..Config::default() };
    let (_base, _) = house.node("base", vec![1; 65536], base).await;
    let limits = Limits { zero_alignment: 4096, request_alignment: 512, ..Limits::default() };
    let config = Config {
        backs: true,
        limits,
        write_flags: WriteFlags::UNCHANGED,
        zero_flags: Some(ZeroFlags::UNCHANGED),
        statuses: vec![(8 * KIB..40 * KIB, StatusFlags::empty(), None)],
        options: config.options.clone().with("backing", "base"),
        ..config
    };
    let mut bytes: Vec<u8> = (0..65536_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    bytes[32 << 10..40 << 10].fill(0);
    house.node("disk", bytes, config).await
}

async fn read(disk: &Backend, offset: u64, len: usize) -> crate::Result<Vec<u8>> {
    let iov = Buf::zeroed(len, 1).iov();
    disk.read(offset, iov.clone()).await?;
    Ok(iov.to_vec(0..len))
}

/// What a read writes, and with which flags.
fn writes(state: &State) -> Vec<Op> {
    let log = state.take_log();
    log.into_iter().filter(|op| matches!(op, Op::Write(..) | Op::Zero(..))).collect()
}

#[test]
fn whole_units_that_are_not_held_are_copied() {
    let unchanged = |range| Op::Write(range, WriteFlags::UNCHANGED);
    let zero = |range| Op::Zero(range, ZeroFlags::UNCHANGED);
    // offset, length: what is written
    let table = [
        (0, 8 * KIB, vec![]),
        (0, 1, vec![]),
        (40 * KIB, 24 * KIB, vec![]),
        (8 * KIB, 1, vec![unchanged(8 * KIB..12 * KIB)]),
        (11 * KIB + 1000, 2 * KIB, vec![unchanged(8 * KIB..16 * KIB)]),
        (4 * KIB, 6 * KIB, vec![unchanged(8 * KIB..12 * KIB)]),
        (33 * KIB, 100, vec![zero(32 * KIB..36 * KIB)]),
        (0, 64 * KIB, vec![unchanged(8 * KIB..40 * KIB)]),
    ];
    for (offset, len, expected) in table {
        run(1, async {
            let house = House::new();
            let (node, state) = disk(&house, Config::default()).await;
            let disk = backend(&node);
            let guard = node.enable_copy_on_read().unwrap();
            let (from, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
            let before = state.bytes();
            assert_eq!(read(&disk, offset, len).await.unwrap(), before[from..from + len]);
            assert_eq!(writes(&state), expected, "{offset}+{len}");
            assert_eq!(state.bytes(), before, "{offset}+{len}");
            // Without the guard nothing is copied, and by hand no data comes back.
            drop(guard);
            read(&disk, offset, len).await.unwrap();
            assert_eq!(writes(&state), []);
            disk.copy_up(offset, len as u64).await.unwrap();
            assert_eq!(writes(&state), expected, "{offset}+{len}");
        });
    }
}

#[test]
fn a_long_read_is_copied_in_bounded_pieces() {
    run(1, async {
        let house = House::new();
        let (_base, _) = house.node("base", vec![], Config::default()).await;
        let len = 40 << 20;
        let config = Config {
            backs: true,
            // However large its units.
            limits: Limits { zero_alignment: 1 << 30, ..Limits::default() },
            statuses: vec![(0..len, StatusFlags::empty(), None)],
            options: Options::new().with("backing", "base"),
            ..Config::default()
        };
        let (disk, state) = house.disk(vec![5; 40 << 20], config).await;
        disk.copy_up(0, len).await.unwrap();
        let piece = 16 << 20;
        let expected = [0..piece, piece..2 * piece, 2 * piece..len];
        assert_eq!(writes(&state), expected.map(|range| Op::Write(range, WriteFlags::empty())));
    });
}

#[test]
fn the_inline_way_declines_while_reads_copy() {
    run(1, async {
        let house = House::new();
        let (node, _) = disk(&house, Config { inline: true, ..Config::default() }).await;
        let disk = backend(&node);
        let iov = Buf::zeroed(512, 1).iov();
        assert!(disk.try_read(0, &iov).is_some());
        let (one, two) = (node.enable_copy_on_read().unwrap(), node.enable_copy_on_read().unwrap());
        assert!(disk.try_read(0, &iov).is_none());
        drop(one);
        assert!(disk.try_read(0, &iov).is_none() && node.copies_on_read());
        drop(two);
        assert!(disk.try_read(0, &iov).is_some() && !node.copies_on_read());
    });
}

#[test]
fn a_read_only_node_cannot_copy() {
    run(1, async {
        let house = House::new();
        let options = Options::new().with("read-only", true);
        let (node, _) = disk(&house, Config { options, ..Config::default() }).await;
        let error = node.enable_copy_on_read().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert!(error.to_string().contains("'disk'"), "{error}");
        assert_eq!(backend(&node).copy_up(0, 512).await.unwrap_err().kind(), ErrorKind::ReadOnly);
    });
}

#[test]
fn a_read_whose_copy_cannot_be_kept_fails() {
    run(1, async {
        let house = House::new();
        let (node, state) = disk(&house, Config::default()).await;
        let disk = backend(&node);
        let _guard = node.enable_copy_on_read().unwrap();
        state.fail_once(On::Write, None);
        let error = read(&disk, 10 * KIB, 512).await.unwrap_err();
        assert!(error.to_string().contains("cannot keep"), "{error}");
        // What is held does not depend on it.
        state.fail_always(On::Write, None);
        read(&disk, 0, 4096).await.unwrap();
        assert!(read(&disk, 10 * KIB, 512).await.is_err());
    });
}

/// The guest writes what is being copied; whether the reader waits or is gone, its old bytes never come back.
#[test]
fn a_write_beside_a_copy_wins() {
    for seed in 0..200 {
        let sim = Sim::new(seed, SimConfig::calm());
        let house = House::new();
        let config = Config { turns: 3, ..Config::default() };
        let (node, state) = sim.block_on(disk(&house, config));
        let disk = Arc::new(backend(&node));
        let guard = sim.block_on(async { node.enable_copy_on_read().unwrap() });
        let before = state.bytes();
        let polls = usize::try_from(seed % 20).unwrap();
        sim.block_on(async {
            let mut reading = Box::pin(read(&disk, 10 * KIB, 8192));
            let mut seen = None;
            for _ in 0..polls {
                if let std::task::Poll::Ready(bytes) = futures_util::poll!(reading.as_mut()) {
                    seen = Some(bytes.unwrap());
                    break;
                }
                bds_io::yield_now().await;
            }
            let write = disk.write(12 * KIB, vec![0xff; 4096].into(), WriteFlags::empty());
            if seed % 2 == 0 {
                drop(reading);
                write.await.unwrap();
            } else if seen.is_none() {
                let (bytes, written) = futures_util::join!(reading, write);
                written.unwrap();
                seen = Some(bytes.unwrap());
            } else {
                write.await.unwrap();
            }
            if let Some(seen) = seen {
                let old = &before[10 << 10..18 << 10];
                let mut new = old.to_vec();
                new[2 << 10..6 << 10].fill(0xff);
                assert!(seen == old || seen == new, "seed {seed}: torn");
            }
        });
        sim.run_until_idle();
        let mut expected = before;
        expected[12 << 10..16 << 10].fill(0xff);
        assert!(state.bytes() == expected, "seed {seed}: the copy came last");
        drop((guard, disk));
    }
}

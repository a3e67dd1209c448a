//! Tests copy on read: what is copied, in which pieces, and which requests it excludes.

use std::sync::Arc;

use bds_io::{Buf, Sim, SimConfig};

use crate::driver::{Limits, StatusFlags, WriteFlags, ZeroFlags};
use crate::error::ErrorKind;
use crate::graph::NodeRef;
use crate::options::Options;
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph, On, Op, State, backend};
use crate::test_kit::run;

const KIB: u64 = 1024;

/// 64 KiB in units of 4 KiB; 8 to 40 KiB are unallocated, and the last 8 KiB of them are zeros.
async fn disk(disks: &DiskGraph, config: Config) -> (NodeRef, Arc<State>) {
    let read_only = Options::new().with("read-only", true);
    let base = Config { options: read_only, ..Config::default() };
    let (_base, _) = disks.node("base", vec![1; 65536], base).await;
    let limits = Limits { zero_alignment: 4096, request_alignment: 512, ..Limits::default() };
    let config = Config {
        supports_backing: true,
        limits,
        write_flags: WriteFlags::UNCHANGED,
        zero_flags: Some(ZeroFlags::UNCHANGED),
        statuses: vec![(8 * KIB..40 * KIB, StatusFlags::empty(), None)],
        options: config.options.clone().with("backing", "base"),
        ..config
    };
    let mut bytes: Vec<u8> = (0..65536_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    bytes[32 << 10..40 << 10].fill(0);
    disks.node("disk", bytes, config).await
}

async fn read(disk: &Backend, offset: u64, len: usize) -> crate::Result<Vec<u8>> {
    let iov = Buf::zeroed(len, 1).iov();
    disk.read(offset, iov.clone()).await?;
    Ok(iov.to_vec(0..len))
}

/// The writes of a read, with their flags.
fn writes(state: &State) -> Vec<Op> {
    let log = state.take_log();
    log.into_iter().filter(|op| matches!(op, Op::Write(..) | Op::Zero(..))).collect()
}

#[test]
fn unallocated_units_are_copied_whole() {
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
            let disks = DiskGraph::new();
            let (node, state) = disk(&disks, Config::default()).await;
            let disk = backend(&node);
            let guard = node.enable_copy_on_read().unwrap();
            let (from, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
            let before = state.bytes();
            assert_eq!(read(&disk, offset, len).await.unwrap(), before[from..from + len]);
            assert_eq!(writes(&state), expected, "{offset}+{len}");
            assert_eq!(state.bytes(), before, "{offset}+{len}");
            // Without the guard nothing is copied; `copy_up` copies without returning data.
            drop(guard);
            read(&disk, offset, len).await.unwrap();
            assert_eq!(writes(&state), []);
            disk.copy_up(offset, len as u64).await.unwrap();
            assert_eq!(writes(&state), expected, "{offset}+{len}");
            // The memory's content and alignment do not matter.
            for at in [0, 1] {
                let memory = Buf::zeroed(len + at, 4096).iov().slice(at..len + at);
                memory.fill(0..len, 0xee);
                disk.copy_up_in(offset, memory).await.unwrap();
                assert_eq!(writes(&state), expected, "{offset}+{len}");
                assert_eq!(state.bytes(), before, "{offset}+{len}");
            }
        });
    }
}

/// Whole units are copied through the caller's memory, a copy of more than was asked for is not.
#[test]
fn a_copy_uses_the_memory_it_is_given() {
    run(1, async {
        let disks = DiskGraph::new();
        let (node, state) = disk(&disks, Config::default()).await;
        let disk = backend(&node);
        let bytes = state.bytes();
        for (range, used) in [(8..40, 8..40), (8..16, 8..16), (9..40, 0..0), (0..64, 8..40)] {
            let [from, to, used_from, used_to] =
                [range.start, range.end, used.start, used.end].map(|n| n * 1024);
            let memory = Buf::zeroed(to - from, 4096).iov();
            memory.fill(0..to - from, 0xee);
            disk.copy_up_in(from as u64, memory.clone()).await.unwrap();
            let mut expected = vec![0xee; to - from];
            if !used.is_empty() {
                expected[used_from - from..used_to - from]
                    .copy_from_slice(&bytes[used_from..used_to]);
            }
            assert!(memory.to_vec(0..to - from) == expected, "{range:?}");
        }
    });
}

#[test]
fn a_long_read_is_copied_in_bounded_pieces() {
    run(1, async {
        let disks = DiskGraph::new();
        let (_base, _) = disks.node("base", vec![], Config::default()).await;
        let len = 40 << 20;
        let config = Config {
            supports_backing: true,
            // However large its units.
            limits: Limits { zero_alignment: 1 << 30, ..Limits::default() },
            statuses: vec![(0..len, StatusFlags::empty(), None)],
            options: Options::new().with("backing", "base"),
            ..Config::default()
        };
        let (disk, state) = disks.disk(vec![5; 40 << 20], config).await;
        disk.copy_up(0, len).await.unwrap();
        let piece = 16 << 20;
        let expected = [0..piece, piece..2 * piece, 2 * piece..len];
        assert_eq!(writes(&state), expected.map(|range| Op::Write(range, WriteFlags::empty())));
    });
}

#[test]
fn inline_reads_decline_while_copy_on_read_is_on() {
    run(1, async {
        let disks = DiskGraph::new();
        let (node, _) = disk(&disks, Config { inline: true, ..Config::default() }).await;
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
        let disks = DiskGraph::new();
        let options = Options::new().with("read-only", true);
        let (node, _) = disk(&disks, Config { options, ..Config::default() }).await;
        let error = node.enable_copy_on_read().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert!(error.to_string().contains("'disk'"), "{error}");
        assert_eq!(backend(&node).copy_up(0, 512).await.unwrap_err().kind(), ErrorKind::ReadOnly);
    });
}

#[test]
fn a_read_fails_if_its_copy_cannot_be_written() {
    run(1, async {
        let disks = DiskGraph::new();
        let (node, state) = disk(&disks, Config::default()).await;
        let disk = backend(&node);
        let _guard = node.enable_copy_on_read().unwrap();
        state.fail_once(On::Write, None);
        let error = read(&disk, 10 * KIB, 512).await.unwrap_err();
        assert!(error.to_string().contains("cannot keep"), "{error}");
        // Allocated data is read all the same.
        state.fail_always(On::Write, None);
        read(&disk, 0, 4096).await.unwrap();
        assert!(read(&disk, 10 * KIB, 512).await.is_err());
    });
}

/// The guest writes what is being copied; whether the reader waits or was dropped, the old bytes
/// never come back.
#[test]
fn a_concurrent_write_is_not_overwritten_by_the_copy() {
    for seed in 0..200 {
        let sim = Sim::new(seed, SimConfig::calm());
        let disks = DiskGraph::new();
        let config = Config { turns: 3, ..Config::default() };
        let (node, state) = sim.block_on(disk(&disks, config));
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

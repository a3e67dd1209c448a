//! Tests, by table, which operations reach the driver: durability, zero writes, discards, refusals.

use bds_io::IoVec;

use crate::driver::{Attempt, Limits, Prealloc, Truncate, WriteFlags, ZeroFlags};
use crate::error::ErrorKind;
use crate::options::Options;
use crate::test_kit::disk::{Config, DiskGraph, On, Op, backend};
use crate::test_kit::{iov, run};

fn aligned(align: u32) -> Config {
    Config { limits: Limits { request_alignment: align, ..Limits::default() }, ..Config::default() }
}

#[test]
fn failed_rmw_read_fails_the_write() {
    for zero in [false, true] {
        run(1, async {
            let disks = DiskGraph::new();
            let (disk, state) = disks.disk(vec![0x55; 16384], aligned(4096)).await;
            for bad in [0..4096, 12288..16384] {
                state.fail_once(On::Read, Some(bad));
                let error = if zero {
                    disk.write_zeroes(100, 16000, ZeroFlags::empty()).await.unwrap_err()
                } else {
                    disk.write(100, iov(&[1; 16000], 1), WriteFlags::empty()).await.unwrap_err()
                };
                assert_eq!(error.kind(), ErrorKind::Io);
                assert_eq!(error.node_name(), Some("disk"));
                assert_eq!(state.bytes(), vec![0x55; 16384], "nothing was written");
                assert!(!state.take_log().iter().any(|op| matches!(op, Op::Write(..))));
            }
        });
    }
}

#[test]
fn durable_writes_are_flushed_once_after_the_last_fragment() {
    let write = |range, flags| Op::Write(range, flags);
    let (none, fua) = (WriteFlags::empty(), WriteFlags::FUA);
    // the driver's own flags: the operations
    let table = [
        (none, vec![write(0..512, none), write(512..1024, none), Op::FlushToOs, Op::FlushToDisk]),
        (fua, vec![write(0..512, fua), write(512..1024, fua)]),
    ];
    for (native, expected) in table {
        run(2, async {
            let limits = Limits { max_transfer: 512, ..Limits::default() };
            let config = Config { limits, write_flags: native, ..Config::default() };
            let (disk, state) = DiskGraph::new().disk(vec![0; 4096], config).await;
            disk.write(0, iov(&[1; 1024], 1), WriteFlags::FUA).await.unwrap();
            assert_eq!(state.take_log(), expected, "{native:?}");
        });
    }
}

#[test]
fn a_flush_is_skipped_only_when_nothing_was_written() {
    run(3, async {
        let (disk, state) = DiskGraph::new().disk(vec![0; 4096], Config::default()).await;
        disk.flush().await.unwrap();
        assert_eq!(state.take_log(), [Op::FlushToOs]);
        disk.write(0, iov(&[1], 1), WriteFlags::empty()).await.unwrap();
        state.take_log();
        disk.flush().await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(state.take_log(), [Op::FlushToOs, Op::FlushToDisk, Op::FlushToOs]);
    });
}

#[test]
fn an_inline_write_makes_the_node_dirty() {
    run(3, async {
        let config = Config { inline: true, ..Config::default() };
        let (disk, state) = DiskGraph::new().disk(vec![0; 4096], config).await;
        assert!(disk.try_write(0, &iov(&[1; 512], 1)).unwrap().is_ok());
        assert_eq!(state.take_log(), []);
        disk.flush().await.unwrap();
        assert_eq!(state.take_log(), [Op::FlushToOs, Op::FlushToDisk]);
    });
}

#[test]
fn a_failed_flush_fails_all_later_flushes() {
    run(4, async {
        let (disk, state) = DiskGraph::new().disk(vec![0; 4096], Config::default()).await;
        disk.write(0, iov(&[1], 1), WriteFlags::empty()).await.unwrap();
        state.fail_once(On::FlushToDisk, None);
        assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::Io);
        for _ in 0..2 {
            let error = disk.flush().await.unwrap_err();
            assert!(error.to_string().contains("an earlier flush failed"), "{error}");
        }
        assert!(disk.write(0, iov(&[1], 1), WriteFlags::FUA).await.is_err());
    });
}

#[test]
fn a_cancelled_flush_still_reports_its_failure_to_the_next() {
    for n in 0..24 {
        let config = Config { turns: 2, ..Config::default() };
        let sim = bds_io::Sim::new(n, bds_io::SimConfig::calm());
        let (disk, state) = sim.block_on(async {
            let (disk, state) = DiskGraph::new().disk(vec![0; 64], config).await;
            disk.write(0, iov(&[1], 1), WriteFlags::empty()).await.unwrap();
            state.fail_always(On::FlushToDisk, None);
            (disk, state)
        });
        let _dropped = sim.drop_at(disk.flush(), usize::try_from(n).unwrap());
        sim.run_until_idle();
        let began = state.take_log().contains(&Op::FlushToDisk);
        let error = sim.block_on(disk.flush()).unwrap_err();
        assert_eq!(error.to_string().contains("earlier"), began, "dropped at {n}: {error}");
        sim.block_on(async { drop(disk) });
    }
}

#[test]
fn no_flush_and_writethrough_modes() {
    run(5, async {
        let disks = DiskGraph::new();
        let cache = Options::new().with("no-flush", true);
        let options = Options::new().with("cache", cache.into_json());
        let (disk, state) = disks.disk(vec![0; 64], Config { options, ..Config::default() }).await;
        disk.write(0, iov(&[1], 1), WriteFlags::FUA).await.unwrap();
        disk.flush().await.unwrap();
        let none = WriteFlags::empty();
        assert_eq!(state.take_log(), [Op::Write(0..1, none), Op::FlushToOs]);

        disk.set_writethrough(true);
        let (node, state) = disks.node("other", vec![0; 64], Config::default()).await;
        let disk = backend(&node);
        disk.set_writethrough(true);
        disk.write(0, iov(&[1], 1), none).await.unwrap();
        assert_eq!(state.take_log(), [Op::Write(0..1, none), Op::FlushToOs, Op::FlushToDisk]);
    });
}

fn zeroing(zero_alignment: u32, max_zero: u64, flags: ZeroFlags) -> Config {
    let limits = Limits { request_alignment: 512, zero_alignment, max_zero, ..Limits::default() };
    let options = Options::new().with("discard", "unmap");
    Config { limits, zero_flags: Some(flags), options, ..Config::default() }
}

#[test]
fn zero_writes_are_cut_at_units() {
    run(6, async {
        let config = zeroing(4096, 8192, ZeroFlags::MAY_UNMAP);
        let (disk, state) = DiskGraph::new().disk(vec![7; 1 << 16], config).await;
        let done = disk.write_zeroes(512, 30208, ZeroFlags::MAY_UNMAP).await.unwrap();
        assert_eq!(done, Attempt::Done);
        let unmap = ZeroFlags::MAY_UNMAP;
        let zero = |range| Op::Zero(range, unmap);
        let expected = [
            zero(512..4096),
            zero(4096..12288),
            zero(12288..20480),
            zero(20480..28672),
            zero(28672..30720),
        ];
        assert_eq!(state.take_log(), expected);
    });
}

#[test]
fn zero_writes_fall_back_to_bounded_buffers() {
    run(7, async {
        let limits = Limits { max_transfer: 1 << 20, max_iov: 8, ..Limits::default() };
        let config = Config { limits, ..Config::default() };
        let len = (3 << 20) + 17;
        let (disk, state) = DiskGraph::new().disk(vec![7; len], config).await;
        let flags = ZeroFlags::NO_FALLBACK;
        let answer = disk.write_zeroes(0, len as u64, flags).await.unwrap();
        assert_eq!(answer, Attempt::Unsupported);
        assert_eq!(state.take_log(), []);
        let _ = disk.write_zeroes(0, len as u64, ZeroFlags::FUA).await.unwrap();
        assert!(state.bytes().iter().all(|byte| *byte == 0));
        let log = state.take_log();
        assert_eq!(log.len(), 6, "four writes, one flush: {log:?}");
        assert_eq!(log.last(), Some(&Op::FlushToDisk));
    });
}

#[test]
fn no_fallback_needs_a_fast_aligned_zero_write() {
    // the driver's flags, range: answer
    let fast = ZeroFlags::NO_FALLBACK;
    let table = [
        (ZeroFlags::empty(), 0..512, Attempt::Unsupported),
        (fast, 0..512, Attempt::Done),
        (fast, 1..512, Attempt::Unsupported),
    ];
    for (flags, range, expected) in table {
        run(8, async {
            let (disk, state) = DiskGraph::new().disk(vec![7; 4096], zeroing(512, 0, flags)).await;
            let len = range.end - range.start;
            let answer = disk.write_zeroes(range.start, len, ZeroFlags::NO_FALLBACK).await;
            assert_eq!(answer.unwrap(), expected, "{flags:?} {range:?}");
            assert_eq!(state.bytes()[0] == 0, expected == Attempt::Done);
        });
    }
}

#[test]
fn unmapping_needs_discard_unmap() {
    for discard in ["ignore", "unmap"] {
        run(9, async {
            let mut config = zeroing(512, 0, ZeroFlags::MAY_UNMAP);
            config.options = Options::new().with("discard", discard);
            let (disk, state) = DiskGraph::new().disk(vec![7; 4096], config).await;
            let _ = disk.write_zeroes(0, 512, ZeroFlags::MAY_UNMAP).await.unwrap();
            disk.discard(0, 1024).await.unwrap();
            let is_on = discard == "unmap";
            let flags = if is_on { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
            let mut expected = vec![Op::Zero(0..512, flags)];
            expected.extend(is_on.then_some(Op::Discard(0..1024)));
            assert_eq!(state.take_log(), expected);
        });
    }
}

#[test]
fn discards_stay_inside_the_range() {
    run(10, async {
        let limits = Limits {
            request_alignment: 512,
            discard_alignment: 4096,
            max_discard: 8192,
            ..Limits::default()
        };
        let options = Options::new().with("discard", "unmap");
        let config = Config { limits, options, ..Config::default() };
        let (disk, state) = DiskGraph::new().disk(vec![7; 20100], config).await;
        disk.discard(100, 20000).await.unwrap();
        let expected =
            [512..4096, 4096..12288, 12288..16384, 16384..20100].map(Op::Discard).to_vec();
        assert_eq!(state.take_log(), expected);
        disk.discard(100, 300).await.unwrap();
        assert_eq!(state.take_log(), []);
    });
}

#[test]
fn detected_zeroes_become_zero_writes() {
    // the option: the operation
    let unmap = ZeroFlags::MAY_UNMAP;
    let table = [
        ("off", Op::Write(0..512, WriteFlags::empty())),
        ("on", Op::Zero(0..512, ZeroFlags::empty())),
        ("unmap", Op::Zero(0..512, unmap)),
    ];
    for (word, expected) in table {
        run(11, async {
            let mut config = zeroing(512, 0, unmap);
            config.options.set("detect-zeroes", word);
            let (disk, state) = DiskGraph::new().disk(vec![7; 4096], config).await;
            disk.write(0, iov(&[0; 512], 2), WriteFlags::empty()).await.unwrap();
            assert_eq!(state.take_log(), [expected], "{word}");
            let mut almost = [0; 512];
            almost[511] = 1;
            disk.write(0, iov(&almost, 2), WriteFlags::empty()).await.unwrap();
            assert_eq!(state.take_log(), [Op::Write(0..512, WriteFlags::empty())]);
        });
    }
}

#[test]
fn requests_past_the_end_or_on_read_only_nodes_fail() {
    run(12, async {
        let disks = DiskGraph::new();
        let (disk, state) = disks.disk(vec![7; 1000], Config::default()).await;
        let none = WriteFlags::empty();
        for (offset, len) in [(999, 2), (1000, 1), (u64::MAX, 2), (1 << 63, 1)] {
            let buffer = iov(&vec![0; len], 1);
            let kinds = [
                disk.read(offset, buffer.clone()).await.unwrap_err().kind(),
                disk.write(offset, buffer, none).await.unwrap_err().kind(),
                disk.discard(offset, len as u64).await.unwrap_err().kind(),
            ];
            assert_eq!(kinds, [ErrorKind::OutOfRange; 3], "{offset}+{len}");
        }
        disk.write(1000, IoVec::default(), none).await.unwrap();
        assert_eq!(state.take_log(), []);
        assert_eq!(disk.stats().totals(crate::stats::Operation::Read).invalid, 4);

        let options = Options::new().with("read-only", true);
        let (node, _) =
            disks.node("ro", vec![7; 1000], Config { options, ..Config::default() }).await;
        let disk = backend(&node);
        let error = disk.write(0, iov(&[1], 1), none).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        disk.flush().await.unwrap();
    });
}

#[test]
fn growing_over_a_longer_backing_node_zeroes() {
    run(13, async {
        let disks = DiskGraph::new();
        let options = Options::new().with("read-only", true);
        let (_base, _) =
            disks.node("base", vec![7; 2000], Config { options, ..Config::default() }).await;
        let options = Options::new().with("backing", "base");
        let config = Config { supports_backing: true, options, ..Config::default() };
        let (disk, state) = disks.disk(vec![0; 1000], config).await;
        let grow = |len| Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: false };
        disk.truncate(grow(1500)).await.unwrap();
        disk.truncate(grow(2000)).await.unwrap();
        disk.truncate(grow(3000)).await.unwrap();
        disk.truncate(grow(10)).await.unwrap();
        let expected = [(1500, true), (2000, true), (3000, false), (10, false)]
            .map(|(l, z)| Op::Truncate(l, z));
        assert_eq!(state.take_log(), expected);
        assert_eq!(disk.len(), 10);
    });
}

//! Tests of the file protocol on a simulated disk, which can refuse every call of a file system.

use std::io;
use std::path::Path;

use bds_core::driver::{
    Attempt, BoxFuture, CacheMode, Child, ChildOpener, ChildRequest, Driver, DriverType,
    OpenContext, OpenFlags, Prealloc, Precision, ReadFlags, Role, StatusFlags, Truncate,
    WriteFlags, ZeroFlags,
};
use bds_core::{ErrorKind, Options, Result};
use bds_io::sim::{Fault, ForeignLock, LockKind, OpMask};
use bds_io::{Buf, ByteLock, IoVec, Sim, SimConfig};

use super::{FileProtocol, HostDevice};

pub(super) const NAME: &str = "/disk";

/// A protocol has no children.
pub(super) struct NoChildren;

impl ChildOpener for NoChildren {
    fn open_child<'a>(&'a mut self, _: ChildRequest) -> BoxFuture<'a, Result<Option<Child>>> {
        Box::pin(async { Ok(None) })
    }
}

pub(super) fn open_as(
    sim: &Sim,
    driver: &dyn DriverType,
    flags: OpenFlags,
    options: Options,
) -> Result<Box<dyn Driver>> {
    let fs = sim.fs();
    let mut opener = NoChildren;
    let options = options.with("filename", NAME);
    let mut context = OpenContext::new("node", options, flags, &fs, &mut opener);
    sim.block_on(driver.open(&mut context))
}

pub(super) fn open(sim: &Sim, flags: OpenFlags) -> Result<Box<dyn Driver>> {
    open_as(sim, &FileProtocol, flags, Options::new())
}

pub(super) fn calm(bytes: &[u8]) -> Sim {
    with_config(SimConfig::calm(), bytes)
}

pub(super) fn with_config(config: SimConfig, bytes: &[u8]) -> Sim {
    let sim = Sim::new(1, config);
    sim.put_file(NAME, bytes);
    sim
}

pub(super) fn metadata() -> OpenFlags {
    OpenFlags { role: Role::METADATA | Role::DATA | Role::PRIMARY, ..OpenFlags::default() }
}

pub(super) fn direct() -> OpenFlags {
    let cache = CacheMode { direct: true, ..CacheMode::default() };
    OpenFlags { cache, ..OpenFlags::default() }
}

pub(super) fn read(sim: &Sim, node: &dyn Driver, offset: u64, len: usize) -> Result<Vec<u8>> {
    let buf = Buf::zeroed(len, 4096);
    buf.iov().fill(0..len, 0xee);
    sim.block_on(node.read(offset, buf.iov(), ReadFlags::empty()))?;
    let mut out = vec![0; len];
    buf.iov().copy_to(0, &mut out);
    Ok(out)
}

pub(super) fn write(
    sim: &Sim,
    node: &dyn Driver,
    offset: u64,
    bytes: &[u8],
    flags: WriteFlags,
) -> Result<()> {
    sim.block_on(node.write(offset, Buf::from_slice(bytes).iov(), flags))
}

/// The image-lock bytes that are held.
pub(super) fn held(sim: &Sim) -> Vec<u64> {
    let is_held = |byte: &u64| {
        let lock = ByteLock { offset: *byte, len: 1 };
        sim.lock_elsewhere(NAME, lock, LockKind::Exclusive).is_err()
    };
    (100..105).chain(200..205).filter(is_held).collect()
}

pub(super) fn foreign(sim: &Sim, byte: u64) -> ForeignLock {
    let lock = ByteLock { offset: byte, len: 1 };
    sim.lock_elsewhere(NAME, lock, LockKind::Shared).unwrap()
}

#[test]
fn each_user_locks_its_bytes() {
    let raw = OpenFlags::default();
    for (what, flags, bytes) in [
        ("image rw", metadata(), vec![100, 101, 103, 201, 203]),
        ("image ro", OpenFlags { read_only: true, ..metadata() }, vec![100, 201, 203]),
        ("raw rw", raw, vec![100, 101, 201, 203]),
        ("raw ro", OpenFlags { read_only: true, ..raw }, vec![100]),
        ("shared", OpenFlags { read_only: true, force_share: true, ..metadata() }, vec![100]),
        ("info", OpenFlags { info_only: true, ..metadata() }, vec![]),
    ] {
        let sim = calm(&[0; 512]);
        let node = open(&sim, flags).unwrap();
        assert_eq!(held(&sim), bytes, "{what}");
        sim.block_on(node.close()).unwrap();
        assert_eq!(held(&sim), Vec::<u64>::new(), "{what} after close");
    }
}

#[test]
fn conflicting_locks_refuse_an_open() {
    let ro = OpenFlags { read_only: true, ..metadata() };
    let shared = OpenFlags { force_share: true, ..ro };
    for (what, flags, byte, lock_name) in [
        ("a reader may read", ro, 100, None),
        ("image writer beside a reader", metadata(), 100, None),
        ("image writer, others must not write", metadata(), 201, Some("\"write\"")),
        ("image writer beside a writer", metadata(), 101, Some("shared \"write\"")),
        ("image reader beside a writer", ro, 101, Some("shared \"write\"")),
        ("image reader beside a resizer", ro, 103, Some("shared \"resize\"")),
        ("image reader, others must not read", ro, 200, Some("\"consistent read\"")),
        ("shared reader beside a writer", shared, 101, None),
        ("shared reader, others must not read", shared, 200, None),
        ("raw writer beside a writer", OpenFlags::default(), 101, Some("shared \"write\"")),
    ] {
        let sim = calm(&[0; 512]);
        let other = foreign(&sim, byte);
        let outcome = open(&sim, flags);
        match (outcome, lock_name) {
            (Ok(_), None) => {}
            (Err(e), Some(name)) => {
                assert_eq!(e.kind(), ErrorKind::InUse, "{what}");
                assert!(e.to_string().contains(&format!("get {name} lock")), "{what}: {e}");
                assert_eq!(held(&sim), [byte], "{what}: nothing of ours stays");
            }
            (outcome, _) => panic!("{what}: {:?}", outcome.err()),
        }
        drop(other);
    }
}

#[test]
fn missing_locks_matter_only_if_locking_is_on() {
    for (word, is_fine) in [("auto", true), ("off", true), ("on", false)] {
        let sim = calm(&[0; 512]);
        sim.fail_nth(0, Fault::sticky(libc::ENOLCK).on(OpMask::LOCK));
        let options = Options::new().with("locking", word);
        let outcome = open_as(&sim, &FileProtocol, metadata(), options);
        assert_eq!(outcome.is_ok(), is_fine, "{word}: {:?}", outcome.err());
    }
}

#[test]
fn resize_lock_is_held_only_during_a_resize() {
    let change = Truncate { len: 4096, exact: true, prealloc: Prealloc::Off, zero_new: false };
    let sim = calm(&[7; 512]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    let other = foreign(&sim, 203);
    let error = sim.block_on(node.truncate(change)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert_eq!((node.len(), sim.snapshot_file(NAME).len()), (512, 512));
    drop(other);
    sim.block_on(node.truncate(change)).unwrap();
    assert_eq!((node.len(), held(&sim)), (4096, vec![100, 101, 201, 203]));
}

#[test]
fn wrong_kinds_are_refused_with_the_right_driver() {
    let sim = calm(&[0; 512]);
    let error = open_as(&sim, &HostDevice, OpenFlags::default(), Options::new()).err().unwrap();
    assert!(error.to_string().contains("'file'"), "{error}");
    sim.put_device(NAME, &[0; 4096]);
    let error = open(&sim, OpenFlags::default()).err().unwrap();
    assert!(error.to_string().contains("'host_device'"), "{error}");
    assert!(open_as(&sim, &HostDevice, OpenFlags::default(), Options::new()).is_ok());
}

#[test]
fn auto_read_only_falls_back_and_says_so() {
    for (errno, auto, kind) in [
        (libc::EACCES, true, None),
        (libc::EROFS, true, None),
        (libc::EROFS, false, Some((ErrorKind::PermissionDenied, libc::EACCES))),
        (libc::ENOENT, true, Some((ErrorKind::NotFound, libc::ENOENT))),
    ] {
        let sim = calm(&[0; 512]);
        sim.fail_nth(0, Fault::once(errno).on(OpMask::OPEN));
        let flags = OpenFlags { auto_read_only: auto, ..metadata() };
        match open(&sim, flags) {
            Ok(node) => {
                assert_eq!(kind, None);
                assert!(node.is_read_only());
                assert_eq!(held(&sim), [100, 201, 203]);
            }
            Err(e) => assert_eq!(Some((e.kind(), e.errno())), kind, "{e}"),
        }
    }
}

#[test]
fn options_are_checked_by_name() {
    for (key, value) in [("locking", "maybe"), ("aio", "posix"), ("drop-cache", "7")] {
        let sim = calm(&[0; 512]);
        let options = Options::new().with(key, value);
        let error = open_as(&sim, &FileProtocol, OpenFlags::default(), options).err().unwrap();
        assert!(error.to_string().contains(key), "{error}");
        assert_eq!(held(&sim), Vec::<u64>::new());
    }
}

#[test]
fn reads_past_the_end_are_zeros() {
    for flags in [OpenFlags::default(), direct()] {
        for seed in 0..20 {
            let sim = Sim::new(seed, SimConfig { short_io_rate: 0.5, ..SimConfig::default() });
            sim.put_file(NAME, &[7; 1000]);
            let node = open(&sim, flags).unwrap();
            let mut expected = vec![7; 1000];
            expected.resize(2048, 0);
            assert_eq!(read(&sim, &*node, 0, 2048).unwrap(), expected, "seed {seed}");
            assert_eq!(read(&sim, &*node, 4096, 512).unwrap(), [0; 512], "seed {seed}");
        }
    }
}

#[test]
fn short_transfers_go_on_until_all_is_done() {
    let bytes: Vec<u8> = (0..=255_u8).flat_map(|n| [n | 1; 64]).collect();
    for flags in [OpenFlags::default(), direct()] {
        for seed in 0..30 {
            let config = SimConfig { short_io_rate: 0.7, ..SimConfig::default() };
            let sim = Sim::new(seed, config);
            sim.put_file(NAME, &[]);
            let node = open(&sim, flags).unwrap();
            let fua = if seed % 2 == 0 { WriteFlags::FUA } else { WriteFlags::empty() };
            write(&sim, &*node, 512, &bytes, fua).unwrap();
            assert_eq!(node.len(), 512 + 16384);
            assert_eq!(read(&sim, &*node, 512, bytes.len()).unwrap(), bytes, "seed {seed}");
            if seed % 2 == 0 {
                assert_eq!(sim.durable_file(NAME)[512..], bytes, "seed {seed}");
            }
        }
    }
}

#[test]
fn a_misaligned_buffer_is_copied_for_direct_io() {
    let sim = calm(&[0; 4096]);
    let node = open(&sim, direct()).unwrap();
    let odd = Buf::zeroed(513, 512).slice(1..513);
    odd.fill(0..512, 5);
    sim.block_on(node.write(512, odd.clone(), WriteFlags::empty())).unwrap();
    odd.fill(0..512, 0);
    sim.block_on(node.read(512, odd.clone(), ReadFlags::empty())).unwrap();
    let mut back = [0; 512];
    odd.copy_to(0, &mut back);
    assert_eq!(back, [5; 512]);
}

#[test]
fn the_quick_path_answers_completely_or_not_at_all() {
    let sim = with_config(SimConfig { inline_rate: 1.0, ..SimConfig::calm() }, &[3; 1000]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    let buf = Buf::zeroed(512, 4096);
    assert!(matches!(node.try_read(0, &buf.iov()), Some(Ok(()))));
    assert!(node.try_read(512, &buf.iov()).is_none(), "past the end");
    assert!(matches!(node.try_write(1000, &buf.iov()), Some(Ok(()))));
    assert_eq!(node.len(), 1512);
}

#[test]
fn a_file_cut_by_others_is_noticed() {
    let sim = with_config(SimConfig { inline_rate: 1.0, ..SimConfig::calm() }, &[3; 1024]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    let other = sim.fs().open(Path::new(NAME), &writable()).unwrap();
    sim.block_on(other.set_len(512)).unwrap();
    let buf = Buf::zeroed(1024, 4096);
    assert!(node.try_read(0, &buf.iov()).is_none());
    for (offset, len) in [(0, 1024), (512, 512), (1000, 24)] {
        let error = read(&sim, &*node, offset, len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        let text = error.to_string();
        assert!(text.contains(NAME) && text.contains("cut short"), "{text}");
        // It does not become a hole, however often the status is queried.
        let run = sim.block_on(node.block_status(offset, len as u64, Precision::Exact)).unwrap();
        assert!(offset < 512 || run.flags.contains(StatusFlags::DATA), "{run:?}");
        assert_eq!(node.len(), 1024);
    }
    assert_eq!(read(&sim, &*node, 0, 512).unwrap(), [3; 512]);
    // It grows again: bytes behind the old end are zeros once more.
    sim.block_on(other.set_len(2048)).unwrap();
    assert_eq!(read(&sim, &*node, 1024, 1024).unwrap(), [0; 1024]);
}

/// A resize through this node is no loss.
#[test]
fn a_file_made_shorter_through_the_node_reads_zeros_behind_its_end() {
    let sim = calm(&[3; 4096]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    let to = |len| Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: false };
    sim.block_on(node.truncate(to(1000))).unwrap();
    assert_eq!(read(&sim, &*node, 512, 1024).unwrap()[488..], [0; 536]);
    assert_eq!(node.len(), 1000);
}

fn writable() -> bds_io::OpenOptions {
    bds_io::OpenOptions { write: true, ..Default::default() }
}

#[test]
fn a_failed_flush_fails_all_later_ones_unless_direct() {
    for (flags, is_sticky) in [(OpenFlags::default(), true), (direct(), false)] {
        let sim = calm(&[0; 4096]);
        let node = open(&sim, flags).unwrap();
        write(&sim, &*node, 0, &[1; 512], WriteFlags::empty()).unwrap();
        sim.fail_nth(0, Fault::once(libc::EIO).on(OpMask::SYNC));
        assert!(sim.block_on(node.flush_to_disk()).is_err());
        let again = sim.block_on(node.flush_to_disk());
        assert_eq!(again.is_err(), is_sticky);
        let durable = write(&sim, &*node, 512, &[1; 512], WriteFlags::FUA);
        assert_eq!(durable.is_err(), is_sticky);
    }
}

#[test]
fn a_failed_durable_write_breaks_the_flush_but_a_full_disk_does_not() {
    for (errno, times, later_flush_fails) in
        [(libc::EIO, 1, true), (libc::ENOSPC, 2, false), (libc::ENOSPC, 1, true)]
    {
        let sim = calm(&[0; 4096]);
        let node = open(&sim, OpenFlags::default()).unwrap();
        for n in 0..times {
            sim.fail_nth(n, Fault::once(errno).on(OpMask::WRITE));
        }
        let error = write(&sim, &*node, 0, &[1; 512], WriteFlags::FUA).unwrap_err();
        assert_eq!(error.errno(), errno);
        let flushed = sim.block_on(node.flush_to_disk());
        assert_eq!(flushed.is_err(), later_flush_fails, "{errno} {times}");
    }
}

#[test]
fn unsupported_durable_writes_become_a_write_and_a_flush() {
    let sim = calm(&[0; 4096]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    sim.fail_nth(0, Fault::once(libc::EOPNOTSUPP).on(OpMask::WRITE));
    write(&sim, &*node, 0, &[9; 512], WriteFlags::FUA).unwrap();
    assert_eq!(sim.durable_file(NAME)[..512], [9; 512]);
    let syncs = sim.ops_of(OpMask::SYNC);
    write(&sim, &*node, 512, &[9; 512], WriteFlags::FUA).unwrap();
    assert_eq!(sim.ops_of(OpMask::SYNC), syncs + 1, "remembered");
}

#[test]
fn zeroing_succeeds_or_declines_and_reads_as_zeros() {
    for unsupported in [OpMask::empty(), OpMask::ZERO] {
        for flags in [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP, ZeroFlags::all()] {
            for (offset, len) in [(512, 1024), (3584, 1024), (4096, 4096), (8192, 512)] {
                let config = SimConfig { unsupported, ..SimConfig::calm() };
                let sim = with_config(config, &[7; 4096]);
                let node = open(&sim, OpenFlags::default()).unwrap();
                let what = format!("{unsupported:?} {flags:?} {offset}+{len}");
                let attempt = sim.block_on(node.write_zeroes(offset, len, flags)).unwrap();
                let end = offset + len;
                if unsupported.is_empty() {
                    assert_eq!(attempt, Attempt::Done, "{what}");
                    assert_eq!(node.len(), end.max(4096), "{what}");
                    let file = sim.snapshot_file(NAME);
                    assert_eq!(file.len() as u64, end.max(4096), "{what}");
                    let index = |at: u64| usize::try_from(at).unwrap();
                    let (from, to) = (index(offset), index(end));
                    assert!(file[from..to].iter().all(|b| *b == 0), "{what}");
                    assert!(file[..from.min(4096)].iter().all(|b| *b == 7), "{what}");
                } else {
                    assert_eq!(attempt, Attempt::Unsupported, "{what}");
                    assert_eq!(sim.snapshot_file(NAME), [7; 4096], "{what}");
                }
            }
        }
    }
}

#[test]
fn unsupported_calls_are_tried_once() {
    let config = SimConfig { unsupported: OpMask::ZERO, ..SimConfig::calm() };
    let sim = with_config(config, &[7; 4096]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    for _ in 0..3 {
        let zero = node.write_zeroes(0, 512, ZeroFlags::MAY_UNMAP);
        assert_eq!(sim.block_on(zero).unwrap(), Attempt::Unsupported);
        assert_eq!(sim.block_on(node.discard(0, 512)).unwrap(), Attempt::Unsupported);
    }
    // Punch hole, zero range and allocation, once each.
    assert!(sim.ops_of(OpMask::ZERO) <= 3, "{:?}", sim.trace());
}

#[test]
fn a_device_error_while_zeroing_is_an_error() {
    let sim = calm(&[7; 4096]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    sim.fail_nth(0, Fault::once(libc::EIO).on(OpMask::ZERO));
    let error = sim.block_on(node.write_zeroes(0, 512, ZeroFlags::empty())).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some(0)));
}

#[test]
fn discard_gives_space_back() {
    let sim = calm(&[7; 65536]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    let before = sim.block_on(node.allocated_len()).unwrap().unwrap();
    assert_eq!(sim.block_on(node.discard(0, 32768)).unwrap(), Attempt::Done);
    let after = sim.block_on(node.allocated_len()).unwrap().unwrap();
    assert!(after < before, "{before} -> {after}");
    assert_eq!(node.len(), 65536);
}

/// Status of the whole file as text: D data, 0 zeros.
fn map(sim: &Sim, node: &dyn Driver) -> String {
    let mut text = String::new();
    let mut offset = 0;
    loop {
        let run = sim.block_on(node.block_status(offset, 1 << 20, Precision::Exact)).unwrap();
        if run.len == 0 {
            assert!(run.flags.contains(StatusFlags::EOF));
            return text;
        }
        let kind = if run.flags.contains(StatusFlags::DATA) { 'D' } else { '0' };
        text += &format!("{kind}{} ", run.len);
        offset += run.len;
    }
}

#[test]
fn status_reports_holes_and_drops_cached_data_runs() {
    let mut bytes = vec![7; 65536];
    bytes[16384..32768].fill(0);
    let sim = calm(&bytes);
    let node = open(&sim, OpenFlags::default()).unwrap();
    assert_eq!(map(&sim, &*node), "D16384 016384 D32768 ");
    assert_eq!(sim.block_on(node.discard(32768, 16384)).unwrap(), Attempt::Done);
    assert_eq!(map(&sim, &*node), "D16384 032768 D16384 ");
    let cheap = sim.block_on(node.block_status(16384, 4096, Precision::Cheap)).unwrap();
    assert_eq!((cheap.len, cheap.flags.contains(StatusFlags::DATA)), (4096, true));
    let beyond = sim.block_on(node.block_status(65536, 512, Precision::Exact)).unwrap();
    assert_eq!((beyond.len, beyond.flags), (0, StatusFlags::EOF));
}

#[test]
fn a_long_run_of_data_is_queried_once() {
    let sim = calm(&[7; 1 << 20]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    let before = sim.ops_of(OpMask::EXTENT);
    for i in 0..256 {
        sim.block_on(node.block_status(i * 4096, 4096, Precision::Exact)).unwrap();
    }
    assert!(sim.ops_of(OpMask::EXTENT) - before <= 1);
}

#[test]
fn a_file_that_cannot_grow_keeps_its_length() {
    for prealloc in [Prealloc::Falloc, Prealloc::Full] {
        let config = SimConfig { capacity_bytes: 64 << 10, ..SimConfig::calm() };
        let sim = with_config(config, &[7; 4096]);
        let node = open(&sim, OpenFlags::default()).unwrap();
        let change = Truncate { len: 1 << 20, exact: false, prealloc, zero_new: false };
        let error = sim.block_on(node.truncate(change)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{prealloc:?}");
        assert_eq!((node.len(), sim.snapshot_file(NAME)), (4096, vec![7; 4096]), "{prealloc:?}");
    }
}

#[test]
fn preallocation_fills_what_is_new() {
    for prealloc in [Prealloc::Off, Prealloc::Falloc, Prealloc::Full] {
        let sim = calm(&[7; 4096]);
        let node = open(&sim, OpenFlags::default()).unwrap();
        let change = Truncate { len: 1 << 20, exact: false, prealloc, zero_new: true };
        sim.block_on(node.truncate(change)).unwrap();
        let allocated = sim.block_on(node.allocated_len()).unwrap().unwrap();
        assert_eq!(allocated >= 1 << 20, prealloc != Prealloc::Off, "{prealloc:?}");
        assert_eq!(node.len(), 1 << 20);
        assert!(sim.snapshot_file(NAME)[4096..].iter().all(|b| *b == 0));
    }
}

#[test]
fn a_device_does_not_change_its_length() {
    let sim = Sim::new(1, SimConfig::calm());
    sim.put_device(NAME, &[7; 8192]);
    let node = open_as(&sim, &HostDevice, OpenFlags::default(), Options::new()).unwrap();
    for (len, exact, is_fine) in
        [(8192, true, true), (4096, false, true), (4096, true, false), (16384, false, false)]
    {
        let change = Truncate { len, exact, prealloc: Prealloc::Off, zero_new: false };
        let outcome = sim.block_on(node.truncate(change));
        assert_eq!(outcome.is_ok(), is_fine, "{len} {exact}: {outcome:?}");
    }
    assert_eq!(node.len(), 8192);
}

#[test]
fn a_device_zeroes_only_where_that_cannot_be_slow_or_stale() {
    for (flags, zero, attempt) in [
        (OpenFlags::default(), ZeroFlags::empty(), Attempt::Unsupported),
        (direct(), ZeroFlags::NO_FALLBACK, Attempt::Unsupported),
        (direct(), ZeroFlags::empty(), Attempt::Done),
    ] {
        let sim = Sim::new(1, SimConfig::calm());
        sim.put_device(NAME, &[7; 8192]);
        let node = open_as(&sim, &HostDevice, flags, Options::new()).unwrap();
        let outcome = sim.block_on(node.write_zeroes(0, 4096, zero)).unwrap();
        assert_eq!(outcome, attempt, "{zero:?}");
        let is_zero = sim.snapshot_file(NAME)[..4096].iter().all(|b| *b == 0);
        assert_eq!(is_zero, attempt == Attempt::Done);
    }
}

fn create(sim: &Sim, options: &mut Options) -> Result<()> {
    let fs = sim.fs();
    let claimed = FileProtocol.claim_file(&fs, Path::new(NAME), options)?;
    let made_path = claimed.made_path.clone();
    let outcome = sim.block_on(claimed.empty);
    if let (Err(_), Some(made)) = (&outcome, made_path) {
        fs.remove(&made).expect("it was made");
    }
    outcome
}

#[test]
fn create_makes_or_empties_but_refuses_a_file_in_use() {
    let sim = Sim::new(1, SimConfig::calm());
    create(&sim, &mut Options::new().with("size", "1M")).unwrap();
    assert_eq!(sim.snapshot_file(NAME).len(), 1 << 20);

    let sim = calm(&[7; 512]);
    create(&sim, &mut Options::new().with("size", 4096)).unwrap();
    assert_eq!(sim.snapshot_file(NAME), [0; 4096]);

    for byte in [101, 201, 103, 203] {
        let sim = calm(&[7; 512]);
        let _other = foreign(&sim, byte);
        let error = create(&sim, &mut Options::new().with("size", 4096)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{byte}");
        assert_eq!(sim.snapshot_file(NAME), [7; 512], "{byte}");
    }
}

#[test]
fn a_claim_that_is_dropped_leaves_the_bytes_and_the_locks() {
    let sim = calm(&[7; 512]);
    let fs = sim.fs();
    let claim = |options: Options| FileProtocol.claim_file(&fs, Path::new(NAME), &mut { options });
    let claimed = claim(Options::new().with("size", 4096)).unwrap();
    assert!(claimed.made_path.is_none());
    let error = claim(Options::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "the first claim holds the locks");
    drop(claimed);
    assert_eq!(sim.snapshot_file(NAME), [7; 512]);
    drop(claim(Options::new()).expect("the locks went with the first claim"));
}

#[test]
fn a_failed_create_removes_only_what_it_made() {
    let full = || Options::new().with("size", "1M").with("preallocation", "full");
    let config = || SimConfig { capacity_bytes: 64 << 10, ..SimConfig::calm() };
    let sim = Sim::new(1, config());
    assert_eq!(create(&sim, &mut full()).unwrap_err().kind(), ErrorKind::NoSpace);
    assert!(!sim.exists(NAME));

    let sim = with_config(config(), &[7; 512]);
    assert!(create(&sim, &mut full()).is_err());
    assert!(sim.exists(NAME));
}

#[test]
fn wrong_create_options_create_no_file() {
    for (key, value) in
        [("preallocation", "metadata"), ("size", "big"), ("nocow", "2"), ("extent_size_hint", "9G")]
    {
        let sim = Sim::new(1, SimConfig::calm());
        let error = create(&sim, &mut Options::new().with(key, value)).unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
        assert!(!sim.exists(NAME));
    }
}

#[test]
fn copy_range_is_offloaded_to_the_file_system() {
    let sim = calm(&[7; 8192]);
    let source = open(&sim, OpenFlags { read_only: true, ..OpenFlags::default() }).unwrap();
    sim.put_file("/target", &[]);
    let fs = sim.fs();
    let mut opener = NoChildren;
    let options = Options::new().with("filename", "/target");
    let flags = OpenFlags::default();
    let mut context = OpenContext::new("target", options, flags, &fs, &mut opener);
    let target = sim.block_on(FileProtocol.open(&mut context)).unwrap();
    let copy = |from, to, len| sim.block_on(target.copy_range_from(&*source, from, to, len));
    assert_eq!(copy(0, 4096, 8192).unwrap(), Attempt::Done);
    assert_eq!(target.len(), 12288);
    assert_eq!(sim.snapshot_file("/target")[4096..], [7; 8192]);
    assert_eq!(copy(4096, 0, 8192).unwrap(), Attempt::Unsupported, "past the source's end");
}

#[test]
fn an_error_names_file_node_and_offset() {
    let sim = calm(&[0; 4096]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    sim.fail_nth(0, Fault::once(libc::EIO).on(OpMask::READ));
    let text = read(&sim, &*node, 512, 512).unwrap_err().to_string();
    for word in [NAME, "node", "0x200", &io::Error::from_raw_os_error(libc::EIO).to_string()] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn an_empty_iovec_transfers_nothing() {
    let sim = calm(&[1; 512]);
    let node = open(&sim, OpenFlags::default()).unwrap();
    sim.block_on(node.write(0, IoVec::default(), WriteFlags::empty())).unwrap();
    sim.block_on(node.read(0, IoVec::default(), ReadFlags::empty())).unwrap();
    assert_eq!(sim.snapshot_file(NAME), [1; 512]);
}

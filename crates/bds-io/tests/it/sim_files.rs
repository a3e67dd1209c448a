//! Simulated files: names, content, holes, alignment and locks.

use std::path::Path;

use bds_io::sim::LockKind;
use bds_io::{Buf, ByteLock, File, FileKind, IoVec, OpenOptions, Sim, SimConfig, ZeroMode};

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn open_with(sim: &Sim, path: &str, options: OpenOptions) -> std::io::Result<File> {
    sim.fs().open(Path::new(path), &options)
}

fn open(sim: &Sim, path: &str) -> File {
    let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    open_with(sim, path, options).expect("no fault is armed")
}

#[test]
fn opening_follows_the_options() {
    let sim = Sim::new(1, SimConfig::calm());
    let read = OpenOptions::default();
    let create = OpenOptions { write: true, create: true, ..read.clone() };
    let exclusive = OpenOptions { exclusive: true, ..create.clone() };
    assert_eq!(errno(open_with(&sim, "a", read.clone())), Some(libc::ENOENT));
    let first = open_with(&sim, "a", exclusive.clone()).expect("creates");
    assert_eq!(errno(open_with(&sim, "./x/../a", exclusive)), Some(libc::EEXIST));
    let second = open_with(&sim, "a", read).expect("is there");
    assert_eq!(first.identity().expect("has one"), second.identity().expect("has one"));
    let write = sim.block_on(second.write(0, IoVec::from(vec![1]), false));
    assert_eq!(errno(write), Some(libc::EBADF), "opened read-only");
    assert_eq!(first.kind(), FileKind::Regular);
}

#[test]
fn a_removed_file_exists_until_it_is_closed() {
    let sim = Sim::new(1, SimConfig::calm());
    let old = open(&sim, "a");
    sim.block_on(old.write(0, IoVec::from(vec![1; 10]), false)).expect("no fault");
    sim.fs().remove(Path::new("a")).expect("it is there");
    assert_eq!(errno(sim.fs().remove(Path::new("a"))), Some(libc::ENOENT));
    let new = open(&sim, "a");
    assert_ne!(old.identity().expect("has one"), new.identity().expect("has one"));
    assert_eq!((old.len().expect("open"), new.len().expect("open")), (10, 0));
}

#[test]
fn two_names_of_one_file_have_one_identity_and_content() {
    let sim = Sim::new(1, SimConfig::calm());
    sim.put_file("/a", &[1; 10]);
    sim.link("/a", "/b");
    let identity = |path| open(&sim, path).identity().expect("has one");
    assert_eq!(identity("/a"), identity("/b"));
    let after = sim.after_cut(1);
    let identity = |path| open(&after, path).identity().expect("has one");
    assert_eq!(identity("/a"), identity("/b"), "also after a cut");
}

#[test]
fn holes_are_where_nothing_was_written() {
    let sim = Sim::new(1, SimConfig::calm());
    let file = open(&sim, "a");
    sim.block_on(async {
        file.write(8192, IoVec::from(vec![1; 5000]), false).await.expect("no fault");
        file.set_len(40_000).await.expect("no fault");
        file.zero_range(20_480..24_576, ZeroMode::Extend).await.expect("no fault");
    });
    let extents = |file: &File| {
        let mut at = 0;
        let mut text = String::new();
        while let Some(extent) = file.extent(at).expect("no fault") {
            text += &format!("{}{} ", if extent.is_data { "data " } else { "hole " }, extent.len);
            at += extent.len;
        }
        text
    };
    assert_eq!(extents(&file), "hole 8192 data 8192 hole 23616 ");
    assert_eq!(file.allocated_len().expect("regular"), 3 * 4096, "preallocated counts");
    sim.block_on(file.zero_range(8192..12_288, ZeroMode::PunchHole)).expect("no fault");
    assert_eq!(extents(&file), "hole 12288 data 4096 hole 23616 ");
    assert_eq!(file.extent(40_000).expect("no fault"), None);
}

#[test]
fn copies_between_worlds_are_not_supported() {
    let sim = Sim::new(1, SimConfig::calm());
    sim.put_file("a", &(0..=255).collect::<Vec<u8>>());
    let (from, to) = (open(&sim, "a"), open(&sim, "b"));
    let copied = sim.block_on(from.copy_range_to(200, &to, 4090, 1000)).expect("no fault");
    assert_eq!(copied, 56, "up to the end of the source");
    assert_eq!(sim.snapshot_file("b")[4090..], (200..=255).collect::<Vec<u8>>());
    let overlap = sim.block_on(from.copy_range_to(0, &from, 10, 100));
    assert_eq!(errno(overlap), Some(libc::EINVAL));
    let elsewhere = open(&Sim::new(2, SimConfig::calm()), "c");
    assert_eq!(
        sim.block_on(from.copy_range_to(0, &elsewhere, 0, 8)).expect("not supported, no error"),
        0
    );
}

#[test]
fn direct_files_demand_alignment() {
    let config = SimConfig { direct_align: (512, 4096), ..SimConfig::calm() };
    let sim = Sim::new(1, config);
    sim.put_file("a", &[3; 10_000]);
    let direct = OpenOptions { write: true, direct: true, ..OpenOptions::default() };
    let file = open_with(&sim, "a", direct).expect("is there");
    assert_eq!(file.alignment().expect("known"), (512, 4096));
    let buf = Buf::zeroed(16_384, 4096);
    let read = |offset, iov| sim.block_on(file.read(offset, iov));
    assert_eq!(read(0, buf.slice(0..8192)).expect("aligned"), 8192);
    assert_eq!(read(8192, buf.slice(0..4096)).expect("aligned"), 1808, "short at the end");
    assert_eq!(read(4096, buf.slice(512..4608)).expect("memory by 512"), 4096);
    assert_eq!(errno(read(512, buf.slice(0..4096))), Some(libc::EINVAL));
    assert_eq!(errno(read(0, buf.slice(0..512))), Some(libc::EINVAL));
    assert_eq!(errno(read(0, buf.slice(8..4104))), Some(libc::EINVAL));
    assert!(file.try_read(0, &buf.slice(0..4096)).is_none(), "no page cache");
    let buffered = open(&sim, "a");
    assert_eq!(buffered.alignment().expect("known"), (1, 1));
}

#[test]
fn a_short_direct_transfer_ends_on_a_block() {
    let config = SimConfig { short_io_rate: 1.0, ..SimConfig::calm() };
    for seed in 0..50 {
        let sim = Sim::new(seed, config.clone());
        sim.put_file("a", &[3; 8192]);
        let direct = OpenOptions { write: true, direct: true, ..OpenOptions::default() };
        let file = open_with(&sim, "a", direct).expect("is there");
        let buf = Buf::zeroed(8192, 4096);
        let done = sim.block_on(file.write(0, buf.iov(), false)).expect("no fault");
        assert!(done > 0 && done.is_multiple_of(512), "seed {seed}: {done}");
    }
}

#[test]
fn a_device_keeps_its_length() {
    let sim = Sim::new(1, SimConfig::calm());
    sim.put_device("/dev/sim", &[7; 8192]);
    let file = open(&sim, "/dev/sim");
    assert_eq!((file.kind(), file.len().expect("known")), (FileKind::Block, 8192));
    sim.block_on(async {
        assert_eq!(errno(file.set_len(1).await), Some(libc::EINVAL));
        let write = file.write(7680, IoVec::from(vec![1; 1024]), false).await;
        assert_eq!(write.expect("a part fits"), 512);
        let beyond = file.write(8192, IoVec::from(vec![1; 512]), false).await;
        assert_eq!(errno(beyond), Some(libc::ENOSPC));
        file.discard_device(0..4096).await.expect("supported");
        file.zero_device(4096..4608).await.expect("supported");
        assert_eq!(errno(file.zero_device(1..513).await), Some(libc::EINVAL));
    });
    let content = sim.snapshot_file("/dev/sim");
    assert_eq!((content[0], content[4096], content[4608], content[8191]), (0, 0, 7, 1));
    let regular = open(&sim, "a");
    assert_eq!(errno(sim.block_on(regular.discard_device(0..512))), Some(libc::ENOTTY));
}

#[test]
fn locks_follow_the_rules_of_open_file_descriptions() {
    let sim = Sim::new(1, SimConfig::calm());
    let (one, two) = (open(&sim, "a"), open(&sim, "a"));
    let byte = |offset| ByteLock { offset, len: 1 };
    one.lock_shared(byte(100)).expect("free");
    two.lock_shared(byte(100)).expect("shared with others");
    assert!(one.is_locked_by_others(byte(100)).expect("no fault"));
    assert!(!one.is_locked_by_others(byte(101)).expect("no fault"));
    two.unlock(byte(100)).expect("held");
    assert!(!one.is_locked_by_others(byte(100)).expect("no fault"), "never in one's own way");
    let clone = one.clone();
    drop(one);
    assert!(
        two.is_locked_by_others(byte(100)).expect("no fault"),
        "a clone is the same description"
    );
    drop(clone);
    assert!(!two.is_locked_by_others(byte(100)).expect("no fault"), "the last close releases");
}

#[test]
fn exclusive_locks_of_others_conflict_and_ranges_split() {
    let sim = Sim::new(1, SimConfig::calm());
    let file = open(&sim, "a");
    let range = |offset, len| ByteLock { offset, len };
    let elsewhere = |lock, kind| sim.lock_elsewhere("a", lock, kind);
    let held = elsewhere(range(10, 0), LockKind::Exclusive).expect("free");
    assert_eq!(errno(file.lock_shared(range(u64::MAX - 1, 1))), Some(libc::EAGAIN), "0 reaches on");
    file.lock_shared(range(0, 10)).expect("in front of it");
    drop(held);
    file.lock_shared(range(0, 100)).expect("free again");
    file.unlock(range(40, 20)).expect("held");
    assert!(elsewhere(range(40, 20), LockKind::Exclusive).is_ok());
    assert_eq!(errno(elsewhere(range(39, 2), LockKind::Exclusive)), Some(libc::EAGAIN));
    assert!(elsewhere(range(39, 2), LockKind::Shared).is_ok());
    assert_eq!(errno(elsewhere(range(60, 1), LockKind::Exclusive)), Some(libc::EAGAIN));
}

#[test]
fn import_and_export_keep_the_content() {
    let dir = tempfile::tempdir().expect("a writable temporary directory");
    let sim = Sim::new(1, SimConfig::calm());
    let mut content = vec![0; 300_001];
    content[5000..9000].fill(1);
    content[300_000] = 2;
    sim.put_file("a", &content);
    let host = dir.path().join("a.raw");
    sim.export("a", &host).expect("a writable temporary directory");
    assert_eq!(std::fs::read(&host).expect("just written"), content);
    sim.import(&host, "b").expect("just written");
    assert_eq!(sim.snapshot_file("b"), content);
}

//! Tests of reopen, inactivate and activate on a simulated disk: which locks are held when, and
//! that a failure changes nothing.

use std::path::Path;

use bds_core::driver::{
    Attempt, CacheMode, Driver, DriverType, OpenFlags, Precision, Reopen, ReopenContext, Role,
    StatusFlags, WriteFlags,
};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_io::sim::{Fault, OpMask};
use bds_io::{Sim, SimConfig};
use serde_json::json;

use crate::protocol::file::FileProtocol;
use crate::protocol::file::tests::{
    NAME, calm, direct, foreign, held, metadata, open, open_as, read, with_config, write,
};

/// Prepares a reopen with other flags and options.
fn prepare<'a>(
    sim: &Sim,
    node: &'a dyn Driver,
    current: OpenFlags,
    flags: OpenFlags,
    options: Options,
) -> Result<Box<dyn Reopen + 'a>> {
    let fs = sim.fs();
    let mut context = ReopenContext { current, flags, options, fs: &fs };
    // The context ends here; the prepared reopen outlives it.
    let prepared = sim.block_on(async { prepare_in(node, &mut context).await })?;
    assert_eq!(context.options.keys().next(), None, "every option is taken");
    Ok(prepared)
}

async fn prepare_in<'a>(
    node: &'a dyn Driver,
    context: &mut ReopenContext<'_>,
) -> Result<Box<dyn Reopen + 'a>> {
    node.prepare_reopen(context).await
}

fn reopen(sim: &Sim, node: &dyn Driver, current: OpenFlags, flags: OpenFlags) -> Result<()> {
    prepare(sim, node, current, flags, Options::new()).map(Reopen::commit)
}

fn read_only(flags: OpenFlags) -> OpenFlags {
    OpenFlags { read_only: true, ..flags }
}

fn plain(sim: &Sim, node: &dyn Driver, byte: u8) -> Result<()> {
    write(sim, node, 0, &[byte; 512], WriteFlags::empty())
}

/// Reads, and writes if it was opened for that.
fn works(sim: &Sim, node: &dyn Driver, can_write: bool) {
    let before = read(sim, node, 0, 512).unwrap();
    let written = plain(sim, node, before[0].wrapping_add(1));
    assert_eq!(written.is_ok(), can_write, "{written:?}");
    assert_eq!(node.is_read_only(), !can_write);
    let expected = before[0].wrapping_add(u8::from(can_write));
    assert_eq!(read(sim, node, 0, 512).unwrap(), [expected; 512]);
    sim.block_on(node.flush_to_disk()).unwrap();
}

const IMAGE_RW: &[u64] = &[100, 101, 103, 201, 203];
const IMAGE_RO: &[u64] = &[100, 201, 203];
const RAW_RW: &[u64] = &[100, 101, 201, 203];
const RAW_RO: &[u64] = &[100];

#[test]
fn the_mode_changes_at_commit_and_not_without_it() {
    let raw = OpenFlags::default();
    let shared = OpenFlags { force_share: true, ..read_only(raw) };
    let raw_direct = OpenFlags { cache: direct().cache, ..raw };
    for (what, from, to, before, meanwhile, after) in [
        ("image to ro", metadata(), read_only(metadata()), IMAGE_RW, IMAGE_RW, IMAGE_RO),
        ("image to rw", read_only(metadata()), metadata(), IMAGE_RO, IMAGE_RW, IMAGE_RW),
        ("raw to ro", raw, read_only(raw), RAW_RW, RAW_RW, RAW_RO),
        ("raw to rw", read_only(raw), raw, RAW_RO, RAW_RW, RAW_RW),
        ("raw to direct", raw, raw_direct, RAW_RW, RAW_RW, RAW_RW),
        ("image to shared", metadata(), shared, IMAGE_RW, IMAGE_RW, RAW_RO),
    ] {
        let sim = calm(&[7; 4096]);
        let node = open(&sim, from).unwrap();
        assert_eq!(held(&sim), before, "{what}");

        let prepared = prepare(&sim, &*node, from, to, Options::new()).unwrap();
        assert_eq!(held(&sim), meanwhile, "{what}: prepared");
        drop(prepared);
        assert_eq!(held(&sim), before, "{what}: dropped");
        works(&sim, &*node, !from.read_only);

        prepare(&sim, &*node, from, to, Options::new()).unwrap().commit();
        assert_eq!(held(&sim), after, "{what}: done");
        works(&sim, &*node, !to.read_only);
        let align = if to.cache.direct { 512 } else { 1 };
        assert_eq!(node.limits().request_alignment, align, "{what}");

        reopen(&sim, &*node, to, from).unwrap();
        assert_eq!(held(&sim), before, "{what}: and back");
        works(&sim, &*node, !from.read_only);
        sim.block_on(node.close()).unwrap();
        assert_eq!(held(&sim), Vec::<u64>::new(), "{what}");
    }
}

#[test]
fn reopen_to_the_same_mode_opens_nothing() {
    let sim = calm(&[7; 512]);
    let node = open(&sim, metadata()).unwrap();
    let before = sim.ops_of(OpMask::OPEN);
    let options = Options::new()
        .with("filename", format!("file:{NAME}"))
        .with("aio", "native")
        .with("drop-cache", true);
    let unmap = OpenFlags { discard: true, ..metadata() };
    prepare(&sim, &*node, metadata(), unmap, options).unwrap().commit();
    assert_eq!(sim.ops_of(OpMask::OPEN), before);
}

#[test]
fn conflicting_locks_refuse_a_reopen() {
    let raw = OpenFlags::default();
    for (what, from, to, byte, is_fine) in [
        ("a writer is not wanted", read_only(raw), raw, 201, false),
        ("another writer", read_only(raw), raw, 101, false),
        ("another reader", read_only(metadata()), metadata(), 100, true),
        ("to a reader beside a reader", metadata(), read_only(metadata()), 100, true),
    ] {
        let sim = calm(&[7; 4096]);
        let node = open(&sim, from).unwrap();
        let _other = foreign(&sim, byte);
        let before = held(&sim);
        let outcome = reopen(&sim, &*node, from, to);
        match outcome {
            Ok(()) => assert!(is_fine, "{what}"),
            Err(error) => {
                assert!(!is_fine, "{what}: {error}");
                assert_eq!(error.kind(), ErrorKind::InUse, "{what}");
                assert!(error.to_string().contains(NAME), "{error}");
                assert_eq!(held(&sim), before, "{what}");
                works(&sim, &*node, !from.read_only);
            }
        }
    }
}

#[test]
fn two_nodes_on_one_file_conflict() {
    let raw = OpenFlags::default();
    let sim = calm(&[7; 4096]);
    let writer = open(&sim, raw).unwrap();
    let reader = open(&sim, read_only(raw)).unwrap();
    let refused = reopen(&sim, &*reader, read_only(raw), raw).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InUse);
    reopen(&sim, &*writer, raw, read_only(raw)).unwrap();
    reopen(&sim, &*reader, read_only(raw), raw).unwrap();
    works(&sim, &*reader, true);
    assert_eq!(reopen(&sim, &*writer, read_only(raw), raw).unwrap_err().kind(), ErrorKind::InUse);
    works(&sim, &*writer, false);
}

#[test]
fn lock_options_change_by_reopen() {
    let raw = OpenFlags::default();
    let sim = calm(&[7; 4096]);
    let node = open(&sim, raw).unwrap();
    for (key, value, locks) in [
        ("x-share-rw", json!(true), &[100, 101][..]),
        ("locking", json!("off"), &[]),
        ("locking", json!("on"), &[100, 101]),
        ("x-share-rw", json!(false), RAW_RW),
    ] {
        let options = Options::new().with(key, value.clone());
        prepare(&sim, &*node, raw, raw, options).unwrap().commit();
        assert_eq!(held(&sim), locks, "{key}={value}");
        works(&sim, &*node, true);
    }
}

#[test]
fn missing_locks_matter_only_if_locking_is_on() {
    for (word, is_fine) in [("auto", true), ("on", false)] {
        let sim = calm(&[7; 4096]);
        let off = Options::new().with("locking", "off");
        let node = open_as(&sim, &FileProtocol, metadata(), off).unwrap();
        sim.fail_nth(0, Fault::sticky(libc::ENOLCK).on(OpMask::LOCK));
        let on = Options::new().with("locking", word);
        let outcome = prepare(&sim, &*node, metadata(), metadata(), on).map(Reopen::commit);
        assert_eq!(outcome.is_ok(), is_fine, "{word}");
        sim.clear_faults();
        assert_eq!(held(&sim), Vec::<u64>::new());
        works(&sim, &*node, true);
    }
}

#[test]
fn unchangeable_options_are_refused_by_name() {
    let sim = calm(&[7; 4096]);
    let node = open(&sim, metadata()).unwrap();
    for (key, value) in
        [("filename", "/other"), ("locking", "maybe"), ("aio", "posix"), ("drop-cache", "7")]
    {
        let options = Options::new().with(key, value);
        let error = prepare(&sim, &*node, metadata(), metadata(), options).err().unwrap();
        assert!(error.to_string().contains(key), "{error}");
    }
    let shared = OpenFlags { force_share: true, ..metadata() };
    assert!(reopen(&sim, &*node, metadata(), shared).is_err());
    assert_eq!(held(&sim), IMAGE_RW);
}

#[test]
fn another_file_under_the_name_is_refused() {
    let sim = calm(&[7; 4096]);
    let node = open(&sim, metadata()).unwrap();
    sim.fs().remove(Path::new(NAME)).unwrap();
    sim.put_file(NAME, &[9; 4096]);
    let error = reopen(&sim, &*node, metadata(), read_only(metadata())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("another file"), "{error}");
    works(&sim, &*node, true);
    assert_eq!(sim.snapshot_file(NAME), [9; 4096]);
    sim.fs().remove(Path::new(NAME)).unwrap();
    let error = reopen(&sim, &*node, metadata(), read_only(metadata())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    works(&sim, &*node, true);
}

#[test]
fn auto_read_only_falls_back_and_tries_again_next_time() {
    let auto = OpenFlags { auto_read_only: true, ..metadata() };
    let sim = calm(&[7; 4096]);
    let node = open(&sim, read_only(auto)).unwrap();
    sim.fail_nth(0, Fault::once(libc::EACCES).on(OpMask::OPEN));
    reopen(&sim, &*node, read_only(auto), auto).unwrap();
    works(&sim, &*node, false);
    assert_eq!(held(&sim), IMAGE_RO);
    reopen(&sim, &*node, auto, auto).unwrap();
    works(&sim, &*node, true);
    assert_eq!(held(&sim), IMAGE_RW);
}

/// Each operation of each change of mode fails once: the node stays as it was.
#[test]
fn a_prepare_that_fails_changes_nothing() {
    let raw = OpenFlags::default();
    for (from, to) in [
        (metadata(), read_only(metadata())),
        (read_only(metadata()), metadata()),
        (raw, direct()),
        (direct(), raw),
    ] {
        let mut failed = 0;
        for n in 0.. {
            let sim = calm(&[7; 4096]);
            let node = open(&sim, from).unwrap();
            let before = held(&sim);
            let steps = OpMask::OPEN | OpMask::LOCK | OpMask::SYNC;
            sim.fail_nth(n, Fault::once(libc::EPERM).on(steps));
            let first = sim.ops_of(steps);
            let outcome = reopen(&sim, &*node, from, to);
            if sim.ops_of(steps) - first <= n {
                break;
            }
            sim.clear_faults();
            let Err(error) = outcome else { continue };
            failed += 1;
            assert_eq!(held(&sim), before, "fault {n}: {error}");
            // A flush that failed stays failed, here too.
            if sim.block_on(node.flush_to_disk()).is_ok() {
                works(&sim, &*node, !from.read_only);
                reopen(&sim, &*node, from, to).unwrap();
                works(&sim, &*node, !to.read_only);
            }
        }
        assert!(failed > 3, "{failed} steps of {from:?} could fail");
    }
}

#[test]
fn a_prepare_that_is_dropped_at_any_await_changes_nothing() {
    for k in 0.. {
        let sim = Sim::new(1, SimConfig::default());
        sim.put_file(NAME, &[7; 4096]);
        let node = open(&sim, metadata()).unwrap();
        plain(&sim, &*node, 3).unwrap();
        let fs = sim.fs();
        let flags = read_only(metadata());
        let options = Options::new();
        let mut context = ReopenContext { current: metadata(), flags, options, fs: &fs };
        let is_dropped = sim.drop_at(prepare_in(&*node, &mut context), k);
        assert_eq!(held(&sim), IMAGE_RW, "await {k}");
        works(&sim, &*node, true);
        if !is_dropped {
            break;
        }
    }
}

#[test]
fn a_failed_flush_is_remembered_in_every_mode() {
    let raw = OpenFlags::default();
    for to in [read_only(raw), direct()] {
        let sim = calm(&[0; 4096]);
        let node = open(&sim, raw).unwrap();
        plain(&sim, &*node, 1).unwrap();
        sim.fail_nth(0, Fault::once(libc::EIO).on(OpMask::SYNC));
        assert!(sim.block_on(node.flush_to_disk()).is_err());
        reopen(&sim, &*node, raw, to).unwrap();
        assert!(sim.block_on(node.flush_to_disk()).is_err());
        reopen(&sim, &*node, to, raw).unwrap();
        assert!(sim.block_on(node.flush_to_disk()).is_err());
    }
}

#[test]
fn write_back_error_of_the_old_description_is_kept() {
    let raw = OpenFlags::default();
    let sim = calm(&[0; 4096]);
    let node = open(&sim, raw).unwrap();
    plain(&sim, &*node, 1).unwrap();
    sim.fail_nth(0, Fault::once(libc::EIO).on(OpMask::SYNC));
    let error = reopen(&sim, &*node, raw, direct()).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    assert!(sim.block_on(node.flush_to_disk()).is_err(), "and the failure is kept");
    assert_eq!(held(&sim), RAW_RW);
    let unsafe_cache = CacheMode { no_flush: true, ..CacheMode::default() };
    let current = OpenFlags { cache: unsafe_cache, ..raw };
    let sim = calm(&[0; 4096]);
    let node = open(&sim, current).unwrap();
    sim.fail_nth(0, Fault::once(libc::EIO).on(OpMask::SYNC));
    reopen(&sim, &*node, current, read_only(current)).unwrap();
}

#[test]
fn an_inactive_node_locks_only_as_a_reader() {
    let sim = with_config(SimConfig { inline_rate: 1.0, ..SimConfig::calm() }, &[7; 4096]);
    let node = open(&sim, metadata()).unwrap();
    sim.block_on(node.inactivate()).unwrap();
    assert_eq!(held(&sim), [100]);
    let other = open(&sim, metadata()).unwrap();
    write(&sim, &*other, 4096, &[9; 4096], WriteFlags::empty()).unwrap();
    assert_eq!(read(&sim, &*node, 0, 512).unwrap(), [7; 512], "it may be read");

    let error: Error = sim.block_on(node.activate()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.to_string().contains("write"), "{error}");
    sim.block_on(other.close()).unwrap();
    assert_eq!(held(&sim), [100], "it is as inactive as before");
    assert_eq!(node.len(), 4096);

    sim.block_on(node.activate()).unwrap();
    assert_eq!((held(&sim), node.len()), (IMAGE_RW.to_vec(), 8192));
    assert_eq!(read(&sim, &*node, 4096, 4096).unwrap(), [9; 4096]);
    works(&sim, &*node, true);
}

#[test]
fn activation_drops_cached_facts_of_the_file() {
    let sim = calm(&[7; 65536]);
    let node = open(&sim, metadata()).unwrap();
    let run =
        |node: &dyn Driver| sim.block_on(node.block_status(32768, 4096, Precision::Exact)).unwrap();
    assert!(run(&*node).flags.contains(StatusFlags::DATA));
    sim.block_on(node.inactivate()).unwrap();
    let other = open(&sim, metadata()).unwrap();
    assert_eq!(sim.block_on(other.discard(32768, 4096)).unwrap(), Attempt::Done);
    sim.block_on(other.close()).unwrap();
    sim.block_on(node.activate()).unwrap();
    assert!(run(&*node).flags.contains(StatusFlags::ZERO));
}

#[test]
fn reopen_of_an_inactive_node_takes_no_locks() {
    let sim = calm(&[7; 4096]);
    let ro = read_only(metadata());
    let node = open(&sim, ro).unwrap();
    sim.block_on(node.inactivate()).unwrap();
    assert_eq!(held(&sim), [100]);
    let other = open(&sim, metadata()).unwrap();
    reopen(&sim, &*node, ro, metadata()).unwrap();
    assert_eq!(sim.block_on(node.activate()).unwrap_err().kind(), ErrorKind::InUse);
    sim.block_on(other.close()).unwrap();
    assert_eq!(held(&sim), [100]);
    sim.block_on(node.activate()).unwrap();
    assert_eq!(held(&sim), IMAGE_RW);
    works(&sim, &*node, true);
}

#[test]
fn a_node_without_locks_is_inactivated_and_activated() {
    let sim = calm(&[7; 4096]);
    let off = Options::new().with("locking", "off");
    let node = open_as(&sim, &FileProtocol, metadata(), off).unwrap();
    sim.block_on(node.inactivate()).unwrap();
    sim.block_on(node.activate()).unwrap();
    assert_eq!(held(&sim), Vec::<u64>::new());
    works(&sim, &*node, true);
}

#[test]
fn a_device_changes_its_mode_too() {
    let sim = Sim::new(1, SimConfig::calm());
    sim.put_device(NAME, &[7; 8192]);
    let flags = OpenFlags { role: Role::FILTERED | Role::PRIMARY, ..OpenFlags::default() };
    let device = crate::protocol::file::HostDevice;
    let node = open_as(&sim, &device as &dyn DriverType, flags, Options::new()).unwrap();
    reopen(&sim, &*node, flags, read_only(flags)).unwrap();
    works(&sim, &*node, false);
    reopen(&sim, &*node, read_only(flags), flags).unwrap();
    works(&sim, &*node, true);
}

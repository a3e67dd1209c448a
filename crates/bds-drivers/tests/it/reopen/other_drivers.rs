//! Reopen of raw, null, mem and blkdebug: which options change, which do not, and the access to
//! their children.

use bds_core::driver::{
    Access, Driver, DriverType, NodeUse, OpenContext, OpenFlags, Perm, Reopen, Role,
};
use bds_core::{ErrorKind, Options, Result};
use bds_drivers::filter::blkdebug::Blkdebug;
use bds_drivers::format::qcow2::Qcow2Format;
use bds_drivers::format::raw::Raw;
use bds_drivers::protocol::mem::Mem;
use bds_drivers::protocol::null::Null;
use bds_io::{Fs, IoVec};
use bds_testkit::{Scratch, pattern};
use serde_json::{Value, json};

use super::driver_stack::{
    Image, NodeCell, ReadyChildren, made, node_cell, open_file, prepare, read_only, writer,
};
use crate::kit::ImageKind;

fn open(
    driver: &dyn DriverType,
    options: &Value,
    children: Vec<(&'static str, NodeCell)>,
) -> Result<Box<dyn Driver>> {
    let options = Options::from_json(options.clone())?;
    let (fs, mut children) = (Fs::Host, ReadyChildren(children));
    let mut context = OpenContext::new("node", options, writer(), &fs, &mut children);
    bds_io::block_on(driver.open(&mut context))
}

fn ready<'a>(
    node: &'a dyn Driver,
    flags: OpenFlags,
    options: &Value,
) -> Result<Box<dyn Reopen + 'a>> {
    let options = Options::from_json(options.clone())?;
    bds_io::block_on(prepare(node, &Fs::Host, writer(), flags, options))
}

fn reopen(node: &dyn Driver, options: &Value) -> Result<()> {
    ready(node, writer(), options).map(Reopen::commit)
}

/// A disk in memory with these bytes.
fn memory(bytes: &[u8]) -> NodeCell {
    let node = open(&Mem, &json!({"size": bytes.len()}), Vec::new()).unwrap();
    assert!(node.try_write(0, &bds_io::Buf::from_slice(bytes).iov()).unwrap().is_ok());
    node_cell(std::sync::Arc::from(node))
}

fn read(node: &dyn Driver, at: u64, len: usize) -> Option<Vec<u8>> {
    let iov: IoVec = bds_io::Buf::zeroed(len, 4096).iov();
    iov.fill(0..len, 0xee);
    node.try_read(at, &iov).map(|result| {
        result.unwrap();
        iov.to_vec(0..len)
    })
}

#[test]
fn a_raw_window_moves_by_reopen() {
    let bytes = pattern(1, 0, 10_000);
    let start = json!({"offset": 1000, "size": 2000});
    let node = open(&Raw, &start, vec![("file", memory(&bytes))]).unwrap();
    for (options, at, len) in [
        (json!({"offset": 3000}), 3000, 2000),
        (json!({"size": 500}), 3000, 500),
        (json!({"size": null}), 3000, 7000),
        (json!({"offset": 0, "size": 10_000}), 0, 10_000),
        (json!({"offset": 9000, "size": 1000}), 9000, 1000),
        (json!({}), 9000, 1000),
    ] {
        let prepared = ready(&*node, read_only(writer()), &options).unwrap();
        let before = node.len();
        drop(prepared);
        assert_eq!(node.len(), before, "{options}: nothing changes before the commit");
        reopen(&*node, &options).unwrap();
        assert_eq!(node.len(), len as u64, "{options}");
        assert_eq!(read(&*node, 0, len).unwrap(), bytes[at..at + len], "{options}");
        assert_eq!(read(&*node, len as u64, 1), None, "{options}: past the end");
        assert_eq!(node.limits().discard_alignment, 1);
    }
    for (options, word) in [
        (json!({"offset": 10_001}), "offset"),
        (json!({"offset": 9500}), "reach past"),
        (json!({"size": 1001}), "reach past"),
        (json!({"size": "much"}), "size"),
        (json!({"offset": 0, "size": null}), "filter"),
        (json!({"siize": 1}), "siize"),
    ] {
        let error = reopen(&*node, &options).unwrap_err();
        assert!(error.to_string().contains(word), "{options}: {error}");
        assert_eq!(read(&*node, 0, 1000).unwrap(), bytes[9000..], "{options}");
    }
    assert!(!node.is_filter());
}

#[test]
fn a_raw_filter_stays_a_filter_in_every_mode() {
    let node = open(&Raw, &json!({}), vec![("file", memory(&[7; 1000]))]).unwrap();
    for options in [json!({"offset": 10}), json!({"size": 10})] {
        assert_eq!(reopen(&*node, &options).unwrap_err().kind(), ErrorKind::NotSupported);
    }
    ready(&*node, read_only(writer()), &json!({})).unwrap().commit();
    reopen(&*node, &json!({"offset": 0, "size": null})).unwrap();
    assert!(node.is_filter());
    assert_eq!(read(&*node, 0, 1000).unwrap(), [7; 1000]);
}

#[test]
fn null_settings_change_together() {
    for driver in [Null::CO, Null::AIO] {
        let node = open(&driver, &json!({"size": 1000}), Vec::new()).unwrap();
        reopen(&*node, &json!({"size": 4096, "read-zeroes": true})).unwrap();
        assert_eq!((node.len(), read(&*node, 0, 512).unwrap()), (4096, vec![0; 512]));
        reopen(&*node, &json!({"read-zeroes": false})).unwrap();
        assert_eq!((node.len(), read(&*node, 0, 512).unwrap()), (4096, vec![0xee; 512]));
        reopen(&*node, &json!({"latency-ns": 1000})).unwrap();
        assert_eq!(read(&*node, 0, 512), None, "it does not complete at once");
        reopen(&*node, &json!({"latency-ns": 0})).unwrap();
        assert!(read(&*node, 0, 512).is_some());
        ready(&*node, read_only(writer()), &json!({"size": 1})).unwrap();
        for options in [json!({"size": "9E"}), json!({"size": 1, "read-zeroes": 3})] {
            let error = reopen(&*node, &options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{options}: {error}");
        }
        assert_eq!(node.len(), 4096);
    }
}

#[test]
fn the_size_of_a_mem_disk_only_grows() {
    let node = open(&Mem, &json!({"size": 1000}), Vec::new()).unwrap();
    assert!(node.try_write(0, &bds_io::Buf::from_slice(&[7; 1000]).iov()).unwrap().is_ok());
    drop(ready(&*node, writer(), &json!({"size": 5000})).unwrap());
    assert_eq!(node.len(), 1000);
    reopen(&*node, &json!({"size": 5000})).unwrap();
    let mut expected = vec![7; 1000];
    expected.resize(5000, 0);
    assert_eq!(read(&*node, 0, 5000).unwrap(), expected);
    let error = reopen(&*node, &json!({"size": 4999})).unwrap_err();
    assert!(error.to_string().contains("lose"), "{error}");
    ready(&*node, read_only(writer()), &json!({})).unwrap().commit();
    assert_eq!(read(&*node, 0, 5000).unwrap(), expected);
}

/// True if a read fails with the injected error; any other error is a failure of the test.
fn fails(node: &dyn Driver) -> bool {
    let iov = bds_io::Buf::zeroed(512, 4096).iov();
    let read = bds_io::block_on(node.read(0, iov, bds_core::driver::ReadFlags::empty()));
    match read {
        Ok(()) => false,
        Err(error) => {
            assert!([libc::EIO, libc::ENOSPC].contains(&error.errno()), "{error}");
            true
        }
    }
}

#[test]
fn blkdebug_rules_and_limits_change_by_reopen() {
    let node = open(&Blkdebug, &json!({}), vec![("image", memory(&[7; 65536]))]).unwrap();
    assert!(read(&*node, 0, 512).is_some() && !fails(&*node));
    let once = json!({"inject-error": [{"iotype": "read", "once": true}]});
    drop(ready(&*node, writer(), &once).unwrap());
    assert!(!fails(&*node), "not before the commit");
    reopen(&*node, &once).unwrap();
    assert!(fails(&*node) && !fails(&*node));
    // A rule that was used up stays so if other options change; given again it starts anew.
    reopen(&*node, &json!({"align": 4096})).unwrap();
    assert_eq!((node.limits().request_alignment, fails(&*node)), (4096, false));
    reopen(&*node, &once).unwrap();
    assert!(fails(&*node) && !fails(&*node));
    reopen(&*node, &json!({"max-transfer": 8192, "opt-discard": 1024})).unwrap();
    let limits = node.limits();
    assert_eq!((limits.request_alignment, limits.max_transfer), (4096, 8192));
    assert_eq!(limits.discard_alignment, 1024);
    for (options, word) in [
        (json!({"align": 16384}), "max-transfer"),
        (json!({"align": 3}), "align"),
        (json!({"inject-error": [{"event": "l2_load"}]}), "l2_load"),
        (json!({"take-child-perms": ["write"]}), "take-child-perms"),
    ] {
        let error = reopen(&*node, &options).unwrap_err();
        assert!(error.to_string().contains(word), "{options}: {error}");
    }
    assert_eq!(node.limits(), limits);
    reopen(&*node, &json!({"inject-error": []})).unwrap();
    assert!(read(&*node, 0, 512).is_some(), "without rules the inline path is used");
    ready(&*node, read_only(writer()), &json!({})).unwrap().commit();
}

#[test]
fn blkdebug_rules_are_read_from_a_file() {
    let scratch = Scratch::new();
    let path = scratch.path("rules");
    std::fs::write(&path, "[inject-error]\niotype = \"read\"\nerrno = \"28\"\n").unwrap();
    let config = json!({"config": path});
    let node = open(&Blkdebug, &config, vec![("image", memory(&[7; 4096]))]).unwrap();
    assert!(fails(&*node));
    // Read once: later content of the file counts only when it is named again.
    std::fs::write(&path, "[inject-error]\niotype = \"write\"\n").unwrap();
    reopen(&*node, &json!({"set-state": []})).unwrap();
    assert!(fails(&*node));
    reopen(&*node, &config).unwrap();
    assert!(!fails(&*node));
    std::fs::write(&path, "[inject-error]\niotype = \"seek\"\n").unwrap();
    for (path, word) in [(path.as_path(), "seek"), (&scratch.path("none"), "none")] {
        let error = reopen(&*node, &json!({"config": path})).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        assert!(!fails(&*node));
    }
}

/// The use by a parent that reads and writes.
fn node_use(is_active: bool) -> NodeUse {
    let above = Access { perm: Perm::CONSISTENT_READ, shared: Perm::all() };
    NodeUse { above, is_writable: true, is_active, force_share: false }
}

#[test]
fn blkdebug_takes_and_unshares_permissions() {
    let image = || vec![("image", memory(&[7; 512]))];
    let role = Role::FILTERED | Role::PRIMARY;
    let options = json!({
        "take-child-perms": ["write", "resize"], "unshare-child-perms": {"0": "write-unchanged"}
    });
    let node = open(&Blkdebug, &options, image()).unwrap();
    let access = node.child_access("image", role, &node_use(true));
    assert_eq!(access.perm, Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    assert_eq!(access.shared, Perm::all() - Perm::WRITE_UNCHANGED);
    let access = node.child_access("image", role, &node_use(false));
    assert_eq!(access, Access { perm: Perm::CONSISTENT_READ, shared: Perm::all() }, "inactive");
    let node = open(&Blkdebug, &json!({}), image()).unwrap();
    let access = node.child_access("image", role, &node_use(true));
    assert_eq!(access, Access::of_child(role, &node_use(true)));
    for (key, value) in [("take-child-perms", json!(["fly"])), ("unshare-child-perms", json!([7]))]
    {
        let error = open(&Blkdebug, &json!({key: value}), image()).err().unwrap();
        assert!(error.to_string().contains(key), "{error}");
    }
}

/// Beside an external data file the image file holds metadata only, so data writes do not reach it.
#[test]
fn an_image_file_beside_a_data_file_holds_metadata_only() {
    let role = Role::DATA | Role::METADATA | Role::PRIMARY;
    for (kind, expected) in [
        (ImageKind::qcow2("one", 4096), role),
        (ImageKind::qcow2("two", 4096).with_data_file(), Role::METADATA | Role::PRIMARY),
    ] {
        let (sim, env) = made(1, &kind);
        let image = sim.block_on(Image::open(&env, &kind, writer())).unwrap();
        let above = Access { perm: Perm::all(), shared: Perm::all() };
        let node = NodeUse { above, ..node_use(true) };
        assert_eq!(image.node.child_access("file", role, &node), Access::of_child(expected, &node));
        let data = Role::DATA;
        let access = image.node.child_access("data-file", data, &node);
        assert_eq!(access, Access::of_child(data, &node));
        sim.block_on(image.close()).unwrap();
    }
}

/// A driver without reopen support of its own accepts options that the graph handles, and no other
/// mode.
#[test]
fn every_driver_accepts_a_reopen_with_graph_options() {
    let kind = ImageKind::qcow2("flags", 4096);
    let (sim, env) = made(2, &kind);
    let fs = sim.fs();
    let flags = OpenFlags { discard: !writer().discard, ..writer() };
    sim.block_on(async {
        let file = open_file(&fs, env.path("disk"), writer()).await.unwrap();
        let below = node_cell(std::sync::Arc::clone(&file));
        let mut children = ReadyChildren(vec![("file", below.clone()), ("image", below)]);
        for driver in [&Qcow2Format as &dyn DriverType, &Raw, &Blkdebug, &Mem, &Null::CO] {
            let options = Options::new();
            let mut context = OpenContext::new("node", options, writer(), &fs, &mut children);
            let node = driver.open(&mut context).await.unwrap();
            for flags in [flags, read_only(flags)] {
                prepare(&*node, &fs, writer(), flags, Options::new()).await.unwrap().commit();
            }
            node.inactivate().await.unwrap();
            node.activate().await.unwrap();
        }
    });
}

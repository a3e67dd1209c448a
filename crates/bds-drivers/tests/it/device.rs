//! Tests `host_device` on a loop device, where the host allows one.

use std::path::{Path, PathBuf};
use std::process::Command;

use bds_core::driver::{Attempt, Precision, StatusFlags, WriteFlags, ZeroFlags};
use bds_core::graph::{Graph, GraphConfig, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Options, Result};
use bds_io::Buf;
use bds_testkit::{Scratch, pattern, skip};
use serde_json::json;

const LEN: usize = 8 << 20;

/// A loop device over a file of `LEN` bytes, until dropped.
struct Loop {
    _scratch: Scratch,
    device: PathBuf,
}

impl Loop {
    /// Makes the device; prints a skip and returns `None` where the host forbids it.
    fn new(options: &[&str]) -> Option<Self> {
        let scratch = Scratch::new();
        let file = scratch.path("backing");
        std::fs::write(&file, pattern(1, 0, LEN)).expect("scratch is writable");
        let made = Command::new("losetup").args(["-f", "--show"]).args(options).arg(&file).output();
        match made {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                Some(Self { _scratch: scratch, device: name.into() })
            }
            Ok(output) => {
                skip(&format!(
                    "no loop device: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                ));
                None
            }
            Err(error) => {
                skip(&format!("losetup cannot be run: {error}"));
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

fn open(driver: &str, path: &Path, more: serde_json::Value) -> Result<(Graph, NodeRef)> {
    let graph = Graph::new(GraphConfig::new(bds_drivers::registry().into()));
    let mut options = more;
    options["driver"] = json!(driver);
    options["filename"] = json!(path);
    let node = bds_io::block_on(graph.open(Options::from_json(options)?))?;
    Ok((graph, node))
}

#[test]
fn a_device_is_read_written_zeroed_and_discarded() {
    let Some(device) = Loop::new(&[]) else { return };
    for direct in [false, true] {
        let options = json!({"cache.direct": direct, "discard": "unmap"});
        let (_graph, node) = open("host_device", &device.device, options).unwrap();
        assert_eq!(node.len(), LEN as u64);
        assert_eq!(node.limits().request_alignment >= 512, direct);
        let options = BackendOptions { name: "test".into(), writable: true, ..Default::default() };
        let disk = Backend::new(&node, options).unwrap();
        // Neither aligned in offset nor in length.
        let bytes = pattern(2, 0, 10_001);
        disk.write_at(777, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        disk.read_at(777, &mut back).unwrap();
        assert!(back == bytes, "direct={direct}");
        for flags in [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP] {
            bds_io::block_on(disk.write(1 << 20, Buf::from_slice(&bytes).iov(), WriteFlags::FUA))
                .unwrap();
            let zeroed = bds_io::block_on(disk.write_zeroes(1 << 20, 65536, flags)).unwrap();
            assert_eq!(zeroed, Attempt::Done);
            let mut back = vec![1; 65536];
            disk.read_at(1 << 20, &mut back).unwrap();
            assert!(back.iter().all(|b| *b == 0), "direct={direct} {flags:?}");
        }
        bds_io::block_on(disk.discard(2 << 20, 1 << 20)).unwrap();
        let run = bds_io::block_on(disk.block_status(0, LEN as u64, Precision::Exact)).unwrap();
        assert_eq!((run.len, run.flags.contains(StatusFlags::DATA)), (LEN as u64, true));
        drop(disk);
        bds_io::block_on(node.close()).unwrap().into_result().unwrap();
    }
}

#[test]
fn a_device_and_a_file_each_want_their_driver() {
    let Some(device) = Loop::new(&[]) else { return };
    let error = open("file", &device.device, json!({})).unwrap_err();
    assert!(error.to_string().contains("host_device"), "{error}");
    let scratch = Scratch::new();
    std::fs::write(scratch.path("f"), [0; 512]).unwrap();
    let error = open("host_device", &scratch.path("f"), json!({})).unwrap_err();
    assert!(error.to_string().contains("'file'"), "{error}");
}

#[test]
fn a_write_protected_device_is_only_read() {
    let Some(device) = Loop::new(&["-r"]) else { return };
    let error = open("host_device", &device.device, json!({})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    let (_graph, node) =
        open("host_device", &device.device, json!({"auto-read-only": true})).unwrap();
    assert!(!node.is_writable());
}

//! Tests of injected errors, and that they damage no other data.

use bds_core::driver::{Attempt, ZeroFlags};
use serde_json::{Value, json};

use crate::kit::Fixture;

/// A view of a mem disk full of ones with 4 KiB alignment, with these rules.
fn disk(fixture: &Fixture, rules: Value) -> bds_core::request::Backend {
    let mem =
        fixture.backend(json!({"driver": "mem", "node-name": "disk", "size": 16384})).unwrap();
    fixture.write(&mem, 0, &[1; 16384]).unwrap();
    let options =
        json!({"driver": "blkdebug", "image": "disk", "align": 4096, "inject-error": rules});
    let backend = fixture.backend(options).unwrap();
    drop(mem);
    backend
}

/// The neighbours of a small write lie in the same block; if they cannot be read they must not be
/// overwritten. (QEMU 10.0.2 reports success and destroys them.)
#[test]
fn a_failed_read_of_the_neighbours_fails_the_write() {
    let fixture = Fixture::new(1);
    let rule = json!([{"iotype": "read", "errno": 5, "once": true}]);
    let backend = disk(&fixture, rule);
    let error = fixture.write(&backend, 512, &[7; 512]).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    assert_eq!(fixture.read(&backend, 0, 16384).unwrap(), [1; 16384]);
    fixture.write(&backend, 512, &[7; 512]).unwrap();
    let mut expected = [1; 4096];
    expected[512..1024].fill(7);
    assert_eq!(fixture.read(&backend, 0, 4096).unwrap(), expected);
}

#[test]
fn a_failed_read_of_the_neighbours_fails_the_zero_write() {
    let fixture = Fixture::new(1);
    let rule = json!([{"iotype": "read", "errno": 5, "once": true}]);
    let backend = disk(&fixture, rule);
    let zero = |fixture: &Fixture| {
        fixture.sim.block_on(backend.write_zeroes(512, 512, ZeroFlags::empty()))
    };
    assert_eq!(zero(&fixture).unwrap_err().errno(), libc::EIO);
    assert_eq!(fixture.read(&backend, 0, 16384).unwrap(), [1; 16384]);
    assert_eq!(zero(&fixture).unwrap(), Attempt::Done);
}

#[test]
fn a_rule_hits_its_sector_and_keeps_its_errno() {
    let fixture = Fixture::new(1);
    let backend = disk(&fixture, json!([{"iotype": "write", "errno": 28, "sector": 8}]));
    fixture.write(&backend, 0, &[2; 4096]).unwrap();
    let error = fixture.write(&backend, 4096, &[2; 4096]).unwrap_err();
    assert_eq!((error.errno(), error.kind()), (libc::ENOSPC, bds_core::ErrorKind::NoSpace));
    assert_eq!(fixture.read(&backend, 4096, 4096).unwrap(), [1; 4096]);
}

#[test]
fn limit_overrides_are_honoured() {
    let fixture = Fixture::new(1);
    let limits = json!({
        "driver": "blkdebug", "image": {"driver": "mem", "size": 65536}, "align": 512,
        "max-transfer": 4096, "opt-write-zero": 1024, "max-write-zero": 2048,
        "opt-discard": 4096, "max-discard": 8192,
    });
    let backend = fixture.backend(limits).unwrap();
    let found = backend.node().unwrap().limits();
    assert_eq!(
        (found.request_alignment, found.max_transfer, found.zero_alignment, found.max_zero),
        (512, 4096, 1024, 2048)
    );
    assert_eq!((found.discard_alignment, found.max_discard), (4096, 8192));
    fixture.write(&backend, 100, &[3; 20000]).unwrap();
    assert_eq!(fixture.read(&backend, 100, 20000).unwrap(), [3; 20000]);
    for (key, value) in [("align", 3), ("max-transfer", 100), ("max-discard", 513)] {
        let mut options = json!({"driver": "blkdebug", "image": {"driver": "mem"}, "align": 512});
        options[key] = json!(value);
        let text = fixture.node(options).unwrap_err().to_string();
        assert!(text.contains(key), "{text}");
    }
}

//! Tests of null-co and null-aio.

use bds_core::driver::{Precision, StatusFlags};
use serde_json::json;

use crate::kit::Fixture;

#[test]
fn a_null_disk_has_its_size_and_reads_zeros_with_read_zeroes() {
    for name in ["null-co", "null-aio"] {
        let fixture = Fixture::new(1);
        let plain = fixture.backend(json!({"driver": name})).unwrap();
        assert_eq!(plain.len(), 1 << 30);
        let slow = json!({"driver": name, "size": "1M", "read-zeroes": true, "latency-ns": 1000});
        let slow = fixture.backend(slow).unwrap();
        fixture.write(&slow, 0, &[1; 512]).unwrap();
        assert_eq!(fixture.read(&slow, 0, 512).unwrap(), [0; 512]);
        let run = fixture.sim.block_on(slow.block_status(0, 1 << 20, Precision::Exact)).unwrap();
        assert_eq!(run.len, 1 << 20);
        assert!(run.flags.contains(StatusFlags::ZERO | StatusFlags::EOF));
    }
}

//! Tests of the raw format, with and without a window.

use bds_core::ErrorKind;
use bds_core::driver::{Precision, StatusFlags};
use serde_json::json;

use crate::kit::{Fixture, resize_to};

fn fixture() -> Fixture {
    let fixture = Fixture::new(3);
    let bytes: Vec<u8> = (0..8192_u32).map(|i| (i / 512 + 1) as u8).collect();
    fixture.sim.put_file("/disk", &bytes);
    fixture
}

#[test]
fn a_window_shows_its_part_and_nothing_else() {
    let fixture = fixture();
    let file = json!({"driver": "file", "filename": "/disk"});
    let window = json!({"driver": "raw", "offset": 1024, "size": 2048, "file": file});
    let backend = fixture.backend(window).unwrap();
    assert_eq!(backend.len(), 2048);
    assert_eq!(fixture.read(&backend, 0, 512).unwrap(), [3; 512]);
    fixture.write(&backend, 1536, &[9; 512]).unwrap();
    let file = fixture.sim.snapshot_file("/disk");
    assert_eq!((file[2559], file[2560], file[3071], file[3072]), (5, 9, 9, 7));
    assert_eq!(fixture.write(&backend, 1537, &[9; 512]).unwrap_err().kind(), ErrorKind::OutOfRange);
    let error = fixture.sim.block_on(backend.truncate(resize_to(4096))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported, "{error}");
}

#[test]
fn windows_that_do_not_fit_are_refused() {
    for (offset, size, word) in
        [(8193, None, "offset"), (0, Some(8193), "size"), (8000, Some(193), "size")]
    {
        let fixture = fixture();
        let mut options = json!({
            "driver": "raw", "offset": offset, "file": {"driver": "file", "filename": "/disk"},
        });
        if let Some(size) = size {
            options["size"] = json!(size);
        }
        let error = fixture.node(options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn without_a_window_raw_is_transparent() {
    let fixture = fixture();
    let file = json!({"driver": "file", "filename": "/disk"});
    let backend = fixture.backend(json!({"driver": "raw", "file": file})).unwrap();
    assert_eq!(backend.len(), 8192);
    let run = fixture.sim.block_on(backend.block_status(512, 1024, Precision::Exact)).unwrap();
    assert_eq!((run.len, run.depth), (1024, 0));
    assert!(run.flags.contains(StatusFlags::DATA | StatusFlags::OFFSET_VALID));
    let host = run.host.unwrap();
    assert_eq!((host.offset, host.file.unwrap().to_str()), (512, Some("/disk")));
    fixture.sim.block_on(backend.truncate(resize_to(10_000))).unwrap();
    assert_eq!((backend.len(), fixture.sim.snapshot_file("/disk").len()), (10_000, 10_000));
}

//! qcow2 images with a log go through QEMU's hands: it reads what was stored, sees bitmaps that are
//! in use after a crash, and what it writes makes the log invalid.

use std::path::Path;

use bds_core::Options;
use bds_io::Fs;
use bds_testkit::{Scratch, bitmap_sums, qemu_img, qemu_io, tool};

use super::{BLOCK, Disk, REGION, options, persistent};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An image that crashed with block 1 of region 2 written: copies of the files of an open one.
fn crashed(scratch: &Scratch) -> std::path::PathBuf {
    let (path, copy) = (scratch.path("disk.qcow2"), scratch.path("copy.qcow2"));
    let log = |path: &Path| format!("{}.bds-cbt", text(path));
    qemu_img().unwrap().must(["create", "-q", "-f", "qcow2", text(&path), "64M"]);
    bds_io::block_on(async {
        let disk = Disk::open(Fs::Host, options("qcow2", &path)).await.unwrap();
        disk.node.add_bitmap(persistent("daily")).await.unwrap();
        disk.close().await.unwrap();
        let disk = Disk::open(Fs::Host, options("qcow2", &path)).await.unwrap();
        disk.write(2 * REGION + BLOCK, 1).await.unwrap();
        disk.guest.flush().await.unwrap();
        std::fs::copy(&path, &copy).unwrap();
        std::fs::copy(log(&path), log(&copy)).unwrap();
        disk.close().await.unwrap();
    });
    assert!(!Path::new(&log(&path)).exists(), "a clean close leaves no log");
    std::fs::remove_file(&path).unwrap();
    copy
}

fn bitmaps_after(path: &Path) -> (bool, u64, Option<u64>) {
    bds_io::block_on(async {
        let disk = Disk::open(Fs::Host, options("qcow2", path)).await.unwrap();
        let info = disk.bitmap("daily");
        disk.close().await.unwrap();
        (info.inconsistent, info.count, info.recovered_bytes)
    })
}

#[test]
fn after_a_crash_the_log_is_believed_unless_qemu_wrote() {
    if tool("qemu-storage-daemon").is_none() || qemu_img().is_none() {
        return;
    }
    let (img, io) = (qemu_img().unwrap(), qemu_io().unwrap());
    let scratch = Scratch::new();
    // QEMU looks at it: in use is the truth for QEMU, and there is nothing to repair but that.
    let path = crashed(&scratch);
    let info = img.must(["info", "--output=json", text(&path)]).json();
    let flags = info["format-specific"]["data"]["bitmaps"][0]["flags"].clone();
    assert_eq!(flags, serde_json::json!(["in-use", "auto"]));
    io.must(["-r", "-f", "qcow2", "-c", "read 0 4k", text(&path)]);
    img.must(["check", text(&path)]);
    assert_eq!(bitmaps_after(&path), (false, REGION, Some(REGION)));
    // It was closed: QEMU reads what was recovered.
    let info = img.must(["info", "--output=json", text(&path)]).json();
    let flags = info["format-specific"]["data"]["bitmaps"][0]["flags"].clone();
    assert_eq!(flags, serde_json::json!(["auto"]));
    assert_eq!(bitmaps_after(&path), (false, REGION, None));
    // QEMU writes after a crash: the log must not be believed.
    std::fs::remove_file(&path).unwrap();
    let path = crashed(&scratch);
    io.must(["-f", "qcow2", "-c", "write 40M 4k", text(&path)]);
    let (is_inconsistent, ..) = bitmaps_after(&path);
    assert!(is_inconsistent);
}

/// Scenario 36: a hundred sessions, with QEMU in between, reading and writing.
#[test]
fn scenario_36_a_hundred_sessions_with_qemu_in_between() {
    if tool("qemu-storage-daemon").is_none() || qemu_img().is_none() {
        return;
    }
    let (img, io) = (qemu_img().unwrap(), qemu_io().unwrap());
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    img.must(["create", "-q", "-f", "qcow2", text(&path), "64M"]);
    img.must(["bitmap", "--add", "-g", "64k", text(&path), "daily"]);
    let mut count = 0;
    let mut last_sum = None;
    for round in 0..100_u64 {
        let at = round * 10 % 1024;
        let is_ours = round % 10 != 5;
        match is_ours {
            true => bds_io::block_on(async {
                let disk = Disk::open(Fs::Host, options("qcow2", &path)).await.unwrap();
                let info = disk.bitmap("daily");
                assert_eq!((info.count, info.inconsistent), (count * BLOCK, false), "{round}");
                assert_eq!(info.recovered_bytes, None, "{round}");
                if round % 3 != 1 {
                    count +=
                        u64::from(!disk.node.copy_bitmap("daily").unwrap().is_dirty(at * BLOCK));
                    disk.write(at * BLOCK, 3).await.unwrap();
                    last_sum = None;
                }
                disk.close().await.unwrap();
            }),
            false => {
                let write = format!("write {} 64k", at * BLOCK);
                io.must(["-f", "qcow2", "-c", &write, text(&path)]);
                count += 1;
                last_sum = None;
            }
        }
        if round % 4 == 0 {
            io.must(["-r", "-f", "qcow2", "-c", "read 0 4k", text(&path)]);
            let sum = bitmap_sums(&path, &["daily"]).remove(0);
            assert_eq!(*last_sum.get_or_insert(sum.clone()), sum, "{round}");
        }
    }
    img.must(["check", text(&path)]);
    assert!(count > 60, "{count} blocks");
}

/// `off` keeps no log: a crash is what it is with QEMU.
#[test]
fn without_a_log_a_crash_makes_bitmaps_inconsistent() {
    if qemu_img().is_none() {
        return;
    }
    let scratch = Scratch::new();
    let path = crashed(&scratch);
    let off: Options = options("qcow2", &path).with("bitmap-log", "off");
    bds_io::block_on(async {
        let disk = Disk::open(Fs::Host, off).await.unwrap();
        assert!(disk.bitmap("daily").inconsistent);
        // Its first write makes the log that is there invalid.
        disk.write(0, 1).await.unwrap();
        disk.close().await.unwrap();
    });
    let (is_inconsistent, ..) = bitmaps_after(&path);
    assert!(is_inconsistent);
}

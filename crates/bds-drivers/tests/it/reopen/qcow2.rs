//! Reopen of qcow2: read-only and writable, other options, and inactivation while another instance
//! writes.

use bds_core::driver::{OpenFlags, ZeroFlags};
use bds_core::{ErrorKind, Options};
use bds_io::sim::OpMask;
use bds_io::{Buf, Sim};
use bds_testkit::pattern;
use serde_json::json;

use super::driver_stack::{Image, made, read_only, writer};
use crate::kit::{ImageKind, TestEnv, resize_to};

const CLUSTER: u64 = 4096;

fn kinds() -> Vec<ImageKind> {
    let q = |name| ImageKind::qcow2(name, CLUSTER);
    vec![
        q("plain"),
        q("lazy").lazy(),
        q("v2").version_2(),
        q("backed").backed(100_000),
        q("data").with_data_file(),
        ImageKind::qcow2("extended", 16384).extended(),
    ]
}

/// Bytes at an offset of the image's file.
fn header(sim: &Sim, env: &TestEnv, at: usize, len: usize) -> Vec<u8> {
    sim.snapshot_file(env.path("disk"))[at..at + len].to_vec()
}

fn put(sim: &Sim, env: &TestEnv, at: usize, bytes: &[u8]) {
    let path = env.path("disk");
    let mut image = sim.snapshot_file(&path);
    image[at..at + bytes.len()].copy_from_slice(bytes);
    // In place: it stays the same inode.
    sim.block_on(async {
        let options = bds_io::OpenOptions { write: true, ..Default::default() };
        let file = sim.fs().open(&path, &options).unwrap();
        file.write(0, Buf::from_slice(&image).iov(), true).await.unwrap();
    });
}

fn is_dirty(sim: &Sim, env: &TestEnv) -> bool {
    header(sim, env, 79, 1)[0] & 1 != 0
}

#[test]
fn a_writer_becomes_a_reader_and_a_writer_again() {
    for kind in kinds() {
        let (sim, env) = made(1, &kind);
        sim.block_on(async {
            let mut image = Image::open(&env, &kind, writer()).await.unwrap();
            let bytes = pattern(7, 0, 20_000);
            image.write(1000, &bytes).await.unwrap();
            if kind.is_lazy {
                image.flush().await.unwrap();
                assert!(is_dirty(&sim, &env));
            }
            image.reopen(read_only(writer()), Options::new()).await.unwrap();

            assert!(!is_dirty(&sim, &env), "{}", kind.name);
            assert_eq!(image.check().await, 0, "{}", kind.name);
            let durable = sim.durable_file(env.path("disk"));
            assert_eq!(durable, sim.snapshot_file(env.path("disk")), "{}", kind.name);
            let before = sim.ops_of(OpMask::CHANGE);
            let error = image.write(0, &[1; 512]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
            let discard = image.node.discard(0, kind.cluster).await;
            assert_eq!(discard.unwrap_err().kind(), ErrorKind::ReadOnly);
            let zero = image.node.write_zeroes(0, kind.cluster, ZeroFlags::empty()).await;
            assert_eq!(zero.unwrap_err().kind(), ErrorKind::ReadOnly);
            assert!(image.read(1000, 20_000).await.unwrap() == bytes, "{}", kind.name);
            assert_eq!(sim.ops_of(OpMask::CHANGE), before, "{}: read-only wrote", kind.name);

            image.reopen(writer(), Options::new()).await.unwrap();
            assert_eq!(sim.ops_of(OpMask::CHANGE), before, "{}: too early", kind.name);
            image.write(50_000, &bytes).await.unwrap();
            image.flush().await.unwrap();
            assert!(image.read(1000, 20_000).await.unwrap() == bytes, "{}", kind.name);
            assert!(image.read(50_000, 20_000).await.unwrap() == bytes, "{}", kind.name);
            assert_eq!(image.check().await, 0, "{}", kind.name);
            image.close().await.unwrap();
            assert!(!is_dirty(&sim, &env), "{}", kind.name);
        });
    }
}

#[test]
fn an_image_opened_read_only_becomes_writable() {
    for kind in kinds() {
        let (sim, env) = made(2, &kind);
        sim.block_on(async {
            let first = Image::open(&env, &kind, writer()).await.unwrap();
            first.write(0, &pattern(1, 0, 30_000)).await.unwrap();
            first.close().await.unwrap();
            let mut image = Image::open(&env, &kind, read_only(writer())).await.unwrap();
            image.read(0, 30_000).await.unwrap();
            image.reopen(writer(), Options::new()).await.unwrap();
            image.write(5000, &[7; 9000]).await.unwrap();
            let mut expected = pattern(1, 0, 30_000);
            expected[5000..14_000].fill(7);
            assert!(image.read(0, 30_000).await.unwrap() == expected, "{}", kind.name);
            assert_eq!(image.check().await, 0, "{}", kind.name);
            image.close().await.unwrap();
        });
    }
}

/// What an open for writing refuses, a reopen refuses too, and the node stays readable.
#[test]
fn a_reopen_refuses_to_write_what_an_open_refuses() {
    let kind = ImageKind::qcow2("bad", CLUSTER);
    for (what, at, byte, word) in [
        ("the dirty bit", 79, 1, "not closed properly"),
        ("the corrupt bit", 79, 2, "corrupt"),
        ("an unknown feature", 74, 1, "unknown incompatible feature"),
        ("an odd length", 31, 1, "512"),
        ("a table beyond the file", 51, 200, "refcount table"),
    ] {
        let (sim, env) = made(3, &kind);
        sim.block_on(async {
            let first = Image::open(&env, &kind, writer()).await.unwrap();
            first.write(0, &[5; 5000]).await.unwrap();
            first.close().await.unwrap();
        });
        let mut image = sim.block_on(Image::open(&env, &kind, read_only(writer()))).unwrap();
        let old = header(&sim, &env, at, 1)[0];
        put(&sim, &env, at, &[byte]);
        sim.block_on(async {
            let error = image.reopen(writer(), Options::new()).await.unwrap_err();
            assert!(error.to_string().contains(word), "{what}: {error}");
            assert!(error.to_string().contains("disk"), "{what}: {error}");
            assert_eq!(image.read(0, 5000).await.unwrap(), [5; 5000], "{what}");
            let write = image.write(0, &[1]).await;
            assert_eq!(write.unwrap_err().kind(), ErrorKind::ReadOnly, "{what}");
        });
        put(&sim, &env, at, &[old]);
        sim.block_on(async {
            image.reopen(writer(), Options::new()).await.unwrap();
            image.write(100, &[1; 100]).await.unwrap();
            image.close().await.unwrap();
        });
    }
}

#[test]
fn unmaintained_features_are_cleared_at_the_first_write_after_a_reopen() {
    let kind = ImageKind::qcow2("autoclear", CLUSTER);
    let (sim, env) = made(4, &kind);
    put(&sim, &env, 95, &[0x80]);
    sim.block_on(async {
        let mut image = Image::open(&env, &kind, read_only(writer())).await.unwrap();
        for _ in 0..2 {
            image.reopen(writer(), Options::new()).await.unwrap();
            assert_eq!(header(&sim, &env, 95, 1), [0x80]);
            image.reopen(read_only(writer()), Options::new()).await.unwrap();
        }
        image.reopen(writer(), Options::new()).await.unwrap();
        image.write(0, &[1; 512]).await.unwrap();
        assert_eq!(header(&sim, &env, 95, 1), [0]);
        image.close().await.unwrap();
    });
}

#[test]
fn options_change_while_the_image_is_open() {
    let kind = ImageKind::qcow2("options", CLUSTER);
    let (sim, env) = made(5, &kind);
    sim.block_on(async {
        let mut image = Image::open(&env, &kind, writer()).await.unwrap();
        let mut expected = vec![0; 40_000];
        let steps = [
            json!({"lazy-refcounts": true}),
            json!({"overlap-check": "all", "cache-clean-interval": 5}),
            json!({"l2-cache-size": 8192, "refcount-cache-size": 16384, "decompressed-cache-size": 0}),
            json!({"overlap-check": {"template": "none", "main-header": true}}),
            json!({"overlap-check.active-l1": false, "pass-discard-other": true}),
            json!({"lazy-refcounts": false, "pass-discard-request": false, "pass-discard-snapshot": false}),
            json!({"discard-no-unref": true, "data-before-metadata": true}),
        ];
        for (i, step) in steps.into_iter().enumerate() {
            let options = Options::from_json(step.clone()).unwrap();
            image.reopen(writer(), options).await.unwrap();
            let (at, byte) = (i * 5000, u8::try_from(i).unwrap() + 1);
            image.write(at as u64, &[byte; 6000]).await.unwrap();
            expected[at..at + 6000].fill(byte);
            image.flush().await.unwrap();
            let is_lazy = i < 5;
            assert_eq!(is_dirty(&sim, &env), is_lazy, "{step}");
            assert_eq!(image.read(0, 40_000).await.unwrap(), expected, "{step}");
            if !is_lazy {
                assert_eq!(image.check().await, 0, "{step}");
            }
        }
        // Discarded clusters keep their allocation now.
        let used = |image: &Image| image.files[0].len();
        let before = used(&image);
        let _ = image.node.discard(0, CLUSTER).await.unwrap();
        image.write(0, &[9; 4096]).await.unwrap();
        image.flush().await.unwrap();
        assert_eq!(used(&image), before);
        image.close().await.unwrap();
    });
}

#[test]
fn options_that_cannot_change_are_refused_by_name() {
    let kind = ImageKind::qcow2("options", CLUSTER);
    let v2 = ImageKind::qcow2("v2", CLUSTER).version_2();
    for (kind, options, word) in [
        (&kind, json!({"l2-cache-entry-size": 512}), "l2-cache-entry-size"),
        (&kind, json!({"overlap-check": "some"}), "overlap-check"),
        (&kind, json!({"cache-size": 1 << 20, "l2-cache-size": 1 << 21}), "cache-size"),
        (&kind, json!({"lazy-refcounts": "perhaps"}), "lazy-refcounts"),
        (&v2, json!({"lazy-refcounts": true}), "version 3"),
    ] {
        let (sim, env) = made(6, kind);
        sim.block_on(async {
            let mut image = Image::open(&env, kind, writer()).await.unwrap();
            image.write(0, &[1; 5000]).await.unwrap();
            let options = Options::from_json(options).unwrap();
            let error = image.reopen(read_only(writer()), options).await.unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
            image.write(100, &[2; 5000]).await.unwrap();
            assert_eq!(image.check().await, 0);
            image.close().await.unwrap();
        });
    }
}

#[test]
fn an_image_opened_for_inspection_refuses_requests() {
    let kind = ImageKind::qcow2("look", CLUSTER);
    let (sim, env) = made(7, &kind);
    let look = OpenFlags { for_check: true, ..read_only(writer()) };
    sim.block_on(async {
        let mut image = Image::open(&env, &kind, look).await.unwrap();
        for flags in [writer(), read_only(writer()), OpenFlags { read_only: false, ..look }] {
            let error = image.reopen(flags, Options::new()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported, "{error}");
        }
        image.reopen(look, Options::new()).await.unwrap();
    });
}

/// Writes compressed bytes to a cluster.
async fn pack(image: &Image, at: u64, byte: u8) {
    let iov = Buf::from_slice(&[byte; 4096]).iov();
    image.node.write_compressed(at, iov).await.unwrap();
}

/// Two instances alternate: each sees what the other wrote, and none writes while inactive.
#[test]
fn two_instances_alternate_by_inactivation() {
    for kind in kinds() {
        let (sim, env) = made(8, &kind);
        sim.block_on(async {
            let ours = Image::open(&env, &kind, writer()).await.unwrap();
            let mut expected = pattern(1, 0, 60_000);
            ours.write(0, &expected).await.unwrap();
            if kind.has_compression && kind.cluster == 4096 {
                pack(&ours, 61_440, 0x11).await;
                // Twice, so that it is cached.
                assert_eq!(ours.read(61_440, 4096).await.unwrap(), [0x11; 4096]);
                assert_eq!(ours.read(61_440, 4096).await.unwrap(), [0x11; 4096]);
            }
            ours.inactivate().await.unwrap();
            assert!(!is_dirty(&sim, &env), "{}", kind.name);
            let changes = OpMask::CHANGE - OpMask::SYNC;
            let before = sim.ops_of(changes);
            let error = ours.write(0, &[1; 512]).await.unwrap_err();
            assert!(error.to_string().contains("inactive"), "{error}");
            ours.flush().await.unwrap();
            assert_eq!(sim.ops_of(changes), before, "{}", kind.name);

            let theirs = Image::open(&env, &kind, writer()).await.unwrap();
            assert_eq!(theirs.check().await, 0, "{}", kind.name);
            assert!(theirs.read(0, 60_000).await.unwrap() == expected, "{}", kind.name);
            theirs.write(10_000, &[9; 30_000]).await.unwrap();
            expected[10_000..40_000].fill(9);
            let _ = theirs.node.discard(0, kind.cluster).await.unwrap();
            if kind.has_compression && kind.cluster == 4096 {
                // The same place in the file, other bytes.
                pack(&theirs, 61_440, 0x22).await;
            }
            let len = kind.len + 65536;
            theirs.node.truncate(resize_to(len)).await.unwrap();
            theirs.write(len - 5000, &[4; 5000]).await.unwrap();
            assert_eq!(ours.activate().await.unwrap_err().kind(), ErrorKind::InUse);
            let start = theirs.read(0, 4096).await.unwrap();
            theirs.close().await.unwrap();

            ours.activate().await.unwrap();
            assert_eq!(ours.node.len(), len, "{}", kind.name);
            assert!(ours.read(0, 4096).await.unwrap() == start, "{}", kind.name);
            let middle = ours.read(4096 * 4, 40_000).await.unwrap();
            assert_eq!(middle, expected[16_384..56_384], "{}", kind.name);
            assert_eq!(ours.read(len - 5000, 5000).await.unwrap(), [4; 5000], "{}", kind.name);
            if kind.has_compression && kind.cluster == 4096 {
                assert_eq!(ours.read(61_440, 4096).await.unwrap(), [0x22; 4096], "{}", kind.name);
            }
            ours.write(100_000, &[6; 70_000]).await.unwrap();
            assert_eq!(ours.check().await, 0, "{}", kind.name);
            ours.close().await.unwrap();
        });
    }
}

/// An image whose header changed meanwhile is not activated; once the change is undone, it is.
#[test]
fn activation_refuses_a_changed_image() {
    let kind = ImageKind::qcow2("other", CLUSTER);
    for (what, at, bytes, word) in [
        ("narrower refcounts", 96, &3u32.to_be_bytes()[..], "refcount width"),
        ("a data file", 79, &[4], "data file"),
        ("the dirty bit", 79, &[1], "not closed properly"),
        ("the corrupt bit", 79, &[2], "corrupt"),
        ("another format", 0, b"LOOK", "qcow2"),
    ] {
        let (sim, env) = made(9, &kind);
        let image = sim.block_on(Image::open(&env, &kind, writer())).unwrap();
        sim.block_on(async {
            image.write(0, &[5; 5000]).await.unwrap();
            image.inactivate().await.unwrap();
        });
        let old = header(&sim, &env, at, bytes.len());
        put(&sim, &env, at, bytes);
        sim.block_on(async {
            let error = image.activate().await.unwrap_err();
            assert!(error.to_string().contains(word), "{what}: {error}");
            let write = image.write(0, &[1; 512]).await;
            assert_eq!(write.unwrap_err().kind(), ErrorKind::Inactive, "{what}");
        });
        assert_eq!(header(&sim, &env, at, bytes.len()), bytes, "{what}");
        put(&sim, &env, at, &old);
        sim.block_on(async {
            image.activate().await.unwrap();
            image.write(4000, &[6; 5000]).await.unwrap();
            assert_eq!(image.read(0, 4000).await.unwrap(), [5; 4000]);
            assert_eq!(image.check().await, 0);
            image.close().await.unwrap();
        });
    }
}

#[test]
fn the_mode_changes_while_the_image_is_inactive() {
    let kind = ImageKind::qcow2("mode", CLUSTER);
    let (sim, env) = made(10, &kind);
    sim.block_on(async {
        let mut ours = Image::open(&env, &kind, read_only(writer())).await.unwrap();
        ours.inactivate().await.unwrap();
        let theirs = Image::open(&env, &kind, writer()).await.unwrap();
        theirs.write(0, &[3; 5000]).await.unwrap();
        ours.reopen(writer(), Options::new().with("lazy-refcounts", true)).await.unwrap();
        let write = ours.write(0, &[1; 512]).await;
        assert_eq!(write.unwrap_err().kind(), ErrorKind::Inactive);
        theirs.close().await.unwrap();
        ours.activate().await.unwrap();
        assert_eq!(ours.read(0, 5000).await.unwrap(), [3; 5000]);
        ours.write(8000, &[4; 5000]).await.unwrap();
        ours.flush().await.unwrap();
        assert!(is_dirty(&sim, &env));
        ours.inactivate().await.unwrap();
        assert!(!is_dirty(&sim, &env));
        ours.reopen(read_only(writer()), Options::new()).await.unwrap();
        ours.activate().await.unwrap();
        let write = ours.write(0, &[1; 512]).await;
        assert_eq!(write.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(ours.check().await, 0);
        ours.close().await.unwrap();
    });
}

/// A read-only image is never marked corrupt, whatever it contains.
#[test]
fn an_inactive_image_is_not_marked_corrupt() {
    let kind = ImageKind::qcow2("marks", CLUSTER);
    let (sim, env) = made(11, &kind);
    let image = sim.block_on(Image::open(&env, &kind, writer())).unwrap();
    sim.block_on(async {
        for at in [0, 512 * CLUSTER] {
            if at < kind.len {
                image.write(at, &[5; 5000]).await.unwrap();
            }
        }
        image.inactivate().await.unwrap();
        image.activate().await.unwrap();
        image.inactivate().await.unwrap();
    });
    // The L2 table's first entry points into the middle of a cluster.
    let l1_at = u64::from_be_bytes(header(&sim, &env, 40, 8).try_into().unwrap());
    let index = |n: u64| usize::try_from(n & 0x00ff_ffff_ffff_fe00).unwrap();
    let entry = header(&sim, &env, index(l1_at), 8);
    let l2_at = index(u64::from_be_bytes(entry.try_into().unwrap()));
    let old = header(&sim, &env, l2_at, 8);
    put(&sim, &env, l2_at, &(1 << 63 | 0x5200_u64).to_be_bytes());
    sim.block_on(async {
        let error = image.read(0, 512).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        sim.run_until_idle();
        assert_eq!(header(&sim, &env, 79, 1), [0]);
    });
    put(&sim, &env, l2_at, &old);
    sim.block_on(async {
        image.activate().await.unwrap();
        assert_eq!(image.read(0, 5000).await.unwrap(), [5; 5000]);
        image.close().await.unwrap();
    });
}

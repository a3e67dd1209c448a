//! What a writer must not lose silently: persistent bitmaps, in a graph that records what changes,
//! and the sizes of internal snapshots.

use bds_core::options::Options;
use bds_drivers::format::qcow2::check_image;
use bds_drivers::format::qcow2::fuzzing::{self, MemPort};
use bds_io::{Sim, SimConfig};
use bds_testkit::{Scratch, qemu_img};

use super::harness::{IMAGE, close, graph, open, options, read, write, writer};
use crate::kit::resize_to;

const CLUSTER: usize = 4096;
const LEN: u64 = 1 << 20;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn empty(compat: &str) -> Vec<u8> {
    let file = MemPort::default();
    let options = Options::new()
        .with("size", LEN)
        .with("cluster_size", CLUSTER as u64)
        .with("compat", compat);
    fuzzing::create(options, &file, None).unwrap();
    let mut bytes = file.bytes();
    bytes.resize(bytes.len().next_multiple_of(CLUSTER), 0);
    bytes
}

/// Appends clusters with refcount one, and returns their offset.
fn append(bytes: &mut Vec<u8>, content: &[u8]) -> u64 {
    let at = bytes.len();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(CLUSTER), 0);
    for cluster in at / CLUSTER..bytes.len() / CLUSTER {
        put(bytes, 2 * CLUSTER + 2 * cluster, &[0, 1]);
    }
    at as u64
}

/// An empty image with bitmaps of these names and flags.
fn with_bitmaps(bitmaps: &[(&str, u32)]) -> Vec<u8> {
    let mut bytes = empty("v3");
    let mut directory = Vec::new();
    for (name, flags) in bitmaps {
        let table = append(&mut bytes, &[0; 8]);
        directory.extend(table.to_be_bytes());
        directory.extend(1_u32.to_be_bytes());
        directory.extend(flags.to_be_bytes());
        directory.extend([1, 16]);
        directory.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
        directory.extend([0; 4]);
        directory.extend(name.as_bytes());
        directory.resize(directory.len().next_multiple_of(8), 0);
    }
    let at = append(&mut bytes, &directory);
    put(&mut bytes, 95, &[1]);
    let mut extension = [0x2385_2875_u32.to_be_bytes(), 24_u32.to_be_bytes()].concat();
    extension.extend(u32::try_from(bitmaps.len()).unwrap().to_be_bytes());
    extension.extend([0; 4]);
    extension.extend((directory.len() as u64).to_be_bytes());
    extension.extend(at.to_be_bytes());
    extension.extend([0; 8]);
    put(&mut bytes, 112, &extension);
    expect_clean(&bytes);
    bytes
}

fn expect_clean(bytes: &[u8]) {
    let file = MemPort::new(bytes.to_vec());
    let calm = Sim::new(1, SimConfig::calm());
    let report = calm.block_on(check_image(&file, None, &|_, _| {})).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// The flags of each bitmap, as `info` shows them.
fn shown(bytes: &[u8]) -> Vec<String> {
    let info = fuzzing::info(&MemPort::new(bytes.to_vec())).unwrap();
    let data = &info.format_specific.unwrap()["data"]["bitmaps"];
    let list = data.as_array().expect("the image has bitmaps");
    list.iter().map(|b| format!("{} {}", b["name"], b["flags"])).collect()
}

fn on_disk(bytes: &[u8]) -> Sim {
    let sim = Sim::new(9, SimConfig::calm());
    sim.put_file(IMAGE, bytes);
    sim
}

#[test]
fn bitmaps_are_kept_in_step_and_marked_meanwhile() {
    let bytes = with_bitmaps(&[("backup0", AUTO), ("kept", 0), ("old", AUTO | IN_USE)]);
    let sim = on_disk(&bytes);
    let graph = graph(&sim);
    let marked = [r#""backup0" ["in-use","auto"]"#, r#""kept" []"#, r#""old" ["in-use","auto"]"#];
    let valid = [r#""backup0" ["auto"]"#, r#""kept" []"#, r#""old" ["in-use","auto"]"#];
    sim.block_on(async {
        let (node, backend) = open(&graph, options()).await;
        close(&graph, node, backend).await;
        assert!(sim.snapshot_file(IMAGE) == bytes, "nothing was written yet");
        let (node, backend) = open(&graph, options()).await;
        assert!(node.bitmaps()[2].inconsistent && node.bitmaps()[0].recording);
        write(&backend, 0, &[7; 512]).await.unwrap();
        assert_eq!(shown(&sim.durable_file(IMAGE)), marked, "not before the write");
        close(&graph, node, backend).await;
        assert_eq!(shown(&sim.durable_file(IMAGE)), valid, "stored at close");
        // A reader that becomes a writer, and a reader again.
        let file = serde_json::json!({"driver": "file", "filename": IMAGE, "node-name": "f"});
        let file = graph.open(Options::from_json(file).unwrap()).await.unwrap();
        let mode = |is_read_only: bool| {
            Options::new().with("driver", "qcow2").with("file", "f").with("read-only", is_read_only)
        };
        let node = graph.open(mode(true)).await.unwrap();
        let counts: Vec<u64> = node.bitmaps().iter().map(|bitmap| bitmap.count).collect();
        assert_eq!(counts, [65536, 0, 0]);
        assert!(node.bitmaps()[0].readonly);
        graph.reopen(&node, mode(false)).await.unwrap();
        assert_eq!(shown(&sim.durable_file(IMAGE)), valid);
        assert!(!node.bitmaps()[0].readonly);
        let backend = writer(&node);
        write(&backend, 1 << 19, &[7; 512]).await.unwrap();
        assert_eq!(shown(&sim.durable_file(IMAGE)), marked);
        drop(backend);
        graph.reopen(&node, mode(true)).await.unwrap();
        assert_eq!(shown(&sim.durable_file(IMAGE)), valid);
        assert_eq!(node.bitmaps()[0].count, 2 * 65536);
        drop(file);
        node.close().await.unwrap().into_result().unwrap();
        graph.reap().await;
    });
    let after = sim.snapshot_file(IMAGE);
    expect_clean(&after);
    let Some(tool) = qemu_img() else { return };
    let scratch = Scratch::new();
    let path = scratch.path("b.qcow2");
    std::fs::write(&path, &after).unwrap();
    let path = path.to_string_lossy();
    tool.must(["check", &*path]);
    tool.must(["bitmap", "--remove", &*path, "old"]);
    tool.must(["bitmap", "--clear", &*path, "backup0"]);
    tool.must(["check", &*path]);
}

/// Bitmaps grow with the disk; one that is inconsistent would be left behind.
#[test]
fn growing_is_refused_by_inconsistent_bitmaps() {
    for (flags, is_growable) in [(0, true), (AUTO, true), (AUTO | IN_USE, false), (IN_USE, false)] {
        let sim = on_disk(&with_bitmaps(&[("b", flags)]));
        let before = shown(&sim.snapshot_file(IMAGE));
        let graph = graph(&sim);
        sim.block_on(async {
            let (node, backend) = open(&graph, options()).await;
            write(&backend, 0, &[1; 512]).await.unwrap();
            let grown = backend.truncate(resize_to(2 * LEN)).await;
            assert_eq!(grown.is_ok(), is_growable, "{flags}: {grown:?}");
            if let Err(error) = grown {
                assert!(error.to_string().contains("'b'"), "{error}");
                assert_eq!(backend.len(), LEN);
            }
            close(&graph, node, backend).await;
        });
        let after = sim.snapshot_file(IMAGE);
        expect_clean(&after);
        assert_eq!(shown(&after), before, "{flags}");
        sim.block_on(async {
            let (node, backend) = open(&graph, options()).await;
            let recorded = u64::from(flags == AUTO);
            // Growing marks what is new.
            let grown = if is_growable { recorded * LEN / 65536 } else { 0 };
            assert_eq!(node.bitmaps()[0].count, (recorded + grown) * 65536);
            close(&graph, node, backend).await;
        });
    }
}

#[test]
fn an_unreadable_bitmap_directory_refuses_writing() {
    let mut bytes = with_bitmaps(&[("b", AUTO)]);
    let directory = bytes.len() - CLUSTER;
    put(&mut bytes, directory, &1_u64.to_be_bytes());
    let sim = on_disk(&bytes);
    let graph = graph(&sim);
    sim.block_on(async {
        let text = graph.open(options()).await.map(|_| ()).unwrap_err().to_string();
        assert!(text.contains("invalidate-bitmaps=on"), "{text}");
        let (node, backend) = open(&graph, options().with("invalidate-bitmaps", true)).await;
        write(&backend, 0, &[1; 512]).await.unwrap();
        close(&graph, node, backend).await;
    });
    // They are dropped, as by a writer that does not know the feature.
    assert_eq!(sim.snapshot_file(IMAGE)[95] & 1, 0);
}

/// An image with one internal snapshot whose entry has so many bytes of extra data.
fn with_snapshot(compat: &str, extra_len: u32) -> Vec<u8> {
    let mut bytes = empty(compat);
    let l1 = append(&mut bytes, &[0; 8]);
    let mut entry = l1.to_be_bytes().to_vec();
    entry.extend(1_u32.to_be_bytes());
    entry.extend([0, 1, 0, 2]);
    entry.extend([0; 20]);
    entry.extend(extra_len.to_be_bytes());
    let extra = [0_u64.to_be_bytes(), LEN.to_be_bytes(), u64::MAX.to_be_bytes()].concat();
    entry.extend(&extra[..extra_len as usize]);
    entry.extend(b"1s1");
    let table = append(&mut bytes, &entry);
    put(&mut bytes, 60, &1_u32.to_be_bytes());
    put(&mut bytes, 64, &table.to_be_bytes());
    bytes
}

#[test]
fn a_snapshot_keeps_the_size_it_was_taken_at() {
    for (compat, extra_len, word) in [
        ("v2", 0, Some("version 2")),
        ("v2", 24, Some("version 2")),
        ("v3", 0, Some("no size of its own")),
        ("v3", 8, Some("no size of its own")),
        ("v3", 16, None),
        ("v3", 24, None),
    ] {
        let bytes = with_snapshot(compat, extra_len);
        let sim = on_disk(&bytes);
        let graph = graph(&sim);
        sim.block_on(async {
            let (node, backend) = open(&graph, options()).await;
            let grown = backend.truncate(resize_to(2 * LEN)).await;
            match word {
                None => grown.unwrap(),
                Some(word) => {
                    let text = grown.unwrap_err().to_string();
                    assert!(text.contains(word) && text.contains(IMAGE), "{text}");
                }
            }
            assert_eq!(read(&backend, 0, 512).await.unwrap(), [0; 512]);
            close(&graph, node, backend).await;
        });
        let is_same = sim.snapshot_file(IMAGE) == bytes;
        assert_eq!(is_same, word.is_some(), "{compat} {extra_len}");
        let info = fuzzing::info(&MemPort::new(sim.snapshot_file(IMAGE))).unwrap();
        assert_eq!(info.snapshots.len(), 1);
    }
}

//! Images of QEMU's tools: read the same bytes, and written so that QEMU finds no error.

use bds_core::driver::ZeroFlags;
use bds_core::options::Options;
use bds_io::{Sim, SimConfig};
use bds_testkit::{Scratch, Tool, pattern, qemu_img};

use super::harness::{IMAGE, close, graph, open, options, qemu_check, read, write};

const LEN: u64 = 1 << 20;

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Data, zeros and holes.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; LEN as usize];
    for (i, chunk) in bytes.chunks_mut(40_000).enumerate() {
        match i % 4 {
            0 => chunk.copy_from_slice(&pattern(i as u64, 0, chunk.len())),
            1 => chunk.fill(i as u8),
            _ => {}
        }
    }
    bytes
}

fn made_by_qemu(tool: &Tool, scratch: &Scratch, args: &[&str]) -> String {
    let (raw, image) = (text(&scratch.path("c.raw")), text(&scratch.path("c.qcow2")));
    std::fs::write(&raw, content()).unwrap();
    let mut all = vec!["convert", "-f", "raw", "-O", "qcow2"];
    all.extend(args);
    all.extend([raw.as_str(), image.as_str()]);
    tool.must(all);
    image
}

#[test]
fn images_written_by_qemu_read_the_same() {
    let Some(tool) = qemu_img() else { return };
    for args in [
        &["-o", "cluster_size=512"][..],
        &["-o", "cluster_size=64k"],
        &["-o", "cluster_size=2M"],
        &["-o", "compat=v2"],
        &["-c"],
        &["-c", "-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=2M"],
        &["-c", "-o", "compression_type=zstd"],
        &["-o", "extended_l2=on"],
        &["-c", "-o", "extended_l2=on,cluster_size=16k"],
        &["-o", "refcount_bits=1"],
        &["-o", "preallocation=metadata"],
    ] {
        let scratch = Scratch::new();
        let image = made_by_qemu(&tool, &scratch, args);
        let sim = Sim::new(7, SimConfig::default());
        sim.import(&image, IMAGE).unwrap();
        let before = sim.snapshot_file(IMAGE);
        let graph = graph(&sim);
        sim.block_on(async {
            let node = graph.open(options().with("read-only", true)).await.unwrap();
            let backend = bds_core::request::Backend::new(&node, Default::default()).unwrap();
            let expected = content();
            assert!(read(&backend, 0, LEN as usize).await.unwrap() == expected, "{args:?}");
            for at in (0..LEN as usize - 700).step_by(9973) {
                let now = read(&backend, at as u64, 700).await.unwrap();
                assert!(now == expected[at..at + 700], "{args:?} at {at}");
            }
            drop(backend);
            drop(node);
            graph.reap().await;
        });
        assert!(sim.snapshot_file(IMAGE) == before, "read-only wrote to the image: {args:?}");
    }
}

/// Clusters and tables that a snapshot shares are copied, never changed in place.
#[test]
fn writes_leave_snapshots_unchanged() {
    let Some(tool) = qemu_img() else { return };
    for args in [
        &["-o", "cluster_size=512"][..],
        &["-o", "cluster_size=64k"],
        &["-o", "cluster_size=4k,refcount_bits=2"],
        &["-c", "-o", "cluster_size=4k"],
        &["-o", "extended_l2=on,cluster_size=16k"],
    ] {
        let scratch = Scratch::new();
        let image = made_by_qemu(&tool, &scratch, args);
        tool.must(["snapshot", "-c", "before", &image]);
        let sim = Sim::new(8, SimConfig::default());
        sim.import(&image, IMAGE).unwrap();
        let graph = graph(&sim);
        let mut model = content();
        sim.block_on(async {
            let (node, backend) = open(&graph, options().with("overlap-check", "all")).await;
            for at in (0..LEN - 5000).step_by(60_123) {
                write(&backend, at, &pattern(at, 0, 5000)).await.unwrap();
                let range = at as usize..at as usize + 5000;
                model[range].copy_from_slice(&pattern(at, 0, 5000));
            }
            let (at, len) = (131_072, 131_072);
            let _ = backend.write_zeroes(at, len, ZeroFlags::MAY_UNMAP).await.unwrap();
            model[at as usize..(at + len) as usize].fill(0);
            backend.discard(655_360, 65_536).await.unwrap();
            model[655_360..720_896].fill(0);
            backend.flush().await.unwrap();
            assert!(read(&backend, 0, LEN as usize).await.unwrap() == model, "{args:?}");
            close(&graph, node, backend).await;
        });
        let (code, out) = qemu_check(&sim).unwrap();
        assert_eq!(code, 0, "{args:?}: {out}");
        let (after, raw) = (text(&scratch.path("a.qcow2")), text(&scratch.path("a.raw")));
        sim.export(IMAGE, &after).unwrap();
        tool.must(["convert", "-l", "before", "-O", "raw", &after, &raw]);
        assert!(std::fs::read(&raw).unwrap() == content(), "the snapshot changed: {args:?}");
        tool.must(["convert", "-O", "raw", &after, &raw]);
        assert!(std::fs::read(&raw).unwrap() == model, "QEMU reads something else: {args:?}");
    }
}

/// Image, what a refused open must say, and that it leaves the file unchanged.
#[test]
fn images_that_must_not_be_written_are_refused_and_left_alone() {
    let Some(tool) = qemu_img() else { return };
    let scratch = Scratch::new();
    let image = made_by_qemu(&tool, &scratch, &["-o", "cluster_size=4k"]);
    let good = std::fs::read(&image).unwrap();
    let patched = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] |= byte;
        bytes
    };
    for (bytes, words) in [
        (patched(79, 1), "repair"),
        (patched(79, 2), "marked corrupt"),
        (patched(79, 64), "unsupported qcow2 feature"),
        (patched(35, 1), "encrypted"),
    ] {
        let sim = Sim::new(8, SimConfig::default());
        sim.put_file(IMAGE, &bytes);
        let graph = graph(&sim);
        sim.block_on(async {
            let error = graph.open(options()).await.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        });
        assert!(sim.snapshot_file(IMAGE) == bytes);
    }
}

/// Rule O13: unknown autoclear bits are cleared before the first write, not at open.
#[test]
fn unknown_autoclear_bits_are_cleared_at_the_first_write() {
    let Some(tool) = qemu_img() else { return };
    let scratch = Scratch::new();
    let image = made_by_qemu(&tool, &scratch, &["-o", "cluster_size=4k"]);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[88] |= 0x80;
    let sim = Sim::new(8, SimConfig::default());
    sim.put_file(IMAGE, &bytes);
    let graph = graph(&sim);
    sim.block_on(async {
        let (node, backend) = open(&graph, options()).await;
        read(&backend, 0, 4096).await.unwrap();
        backend.flush().await.unwrap();
        assert!(sim.snapshot_file(IMAGE) == bytes, "opened and read, but changed");
        write(&backend, 0, &[1; 512]).await.unwrap();
        assert_eq!(sim.durable_file(IMAGE)[88..96], [0; 8]);
        close(&graph, node, backend).await;
    });
}

/// A cluster that both data and metadata use: the write is refused, the corrupt bit set, the node
/// unusable.
#[test]
fn a_write_over_metadata_is_refused_and_marks_the_image() {
    let Some(tool) = qemu_img() else { return };
    let scratch = Scratch::new();
    let image = made_by_qemu(&tool, &scratch, &["-o", "cluster_size=4k"]);
    let mut bytes = std::fs::read(&image).unwrap();
    let be = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
    };
    // The first data cluster is mapped onto the refcount table.
    let l2 = be(&bytes, be(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    let reftable = be(&bytes, 48) as u64;
    bytes[l2..l2 + 8].copy_from_slice(&(reftable | 1 << 63).to_be_bytes());
    let sim = Sim::new(8, SimConfig::default());
    sim.put_file(IMAGE, &bytes);
    let graph = graph(&sim);
    sim.block_on(async {
        let (node, backend) = open(&graph, options()).await;
        let error = write(&backend, 0, &[1; 512]).await.unwrap_err();
        assert_eq!(error.kind(), bds_core::ErrorKind::Corrupt, "{error}");
        let error = read(&backend, 0, 512).await.unwrap_err();
        assert_eq!(error.kind(), bds_core::ErrorKind::Corrupt, "{error}");
        drop(backend);
        drop(node);
        graph.reap().await;
    });
    let now = sim.snapshot_file(IMAGE);
    assert_eq!(now[79] & 2, 2, "the corrupt bit");
    bytes[79] |= 2;
    assert!(now == bytes, "nothing else was written");
}

/// Wrong options are refused by name.
#[test]
fn options_are_checked() {
    let sim = Sim::new(8, SimConfig::calm());
    super::harness::make(&sim, &super::harness::Shape::default());
    let cases: [(&str, serde_json::Value); 6] = [
        ("l2-cache-entry-size", 1000.into()),
        ("l2-cache-entry-size", 8192.into()),
        ("overlap-check", "most".into()),
        ("data-file", "x".into()),
        ("cache-size", "128G".into()),
        ("lazy-refcount", true.into()),
    ];
    for (key, value) in cases {
        let graph = graph(&sim);
        let how: Options = options().with(key, value.clone());
        let error = sim.block_on(graph.open(how)).unwrap_err().to_string();
        assert!(error.contains(key), "{key}={value}: {error}");
    }
}

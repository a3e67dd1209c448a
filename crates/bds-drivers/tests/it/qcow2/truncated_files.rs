//! Truncated files: clusters behind the end are errors, never zeros; the rest stays readable.

use bds_core::driver::{
    Driver, OpenFlags, Prealloc, Precision, ReadFlags, StatusFlags, Truncate, WriteFlags,
};
use bds_core::options::Options;
use bds_core::request::Backend;
use bds_core::{ErrorKind, Result};
use bds_drivers::format::qcow2::fuzzing::{self, MemPort, open_image};
use bds_io::{Buf, OpenOptions, Sim, SimConfig};
use bds_testkit::pattern;

use super::harness::{
    DATA, IMAGE, Shape, close, graph, make, open, options, read as read_backend, write,
};
use crate::kit::block_on_sim;

const LEN: usize = 256 << 10;

/// A full disk; each cluster differs from the others and none is zeros.
fn content() -> Vec<u8> {
    let mut bytes = pattern(3, 0, LEN);
    // Makes it compressible.
    for sector in bytes.chunks_mut(512) {
        let byte = sector[9] | 1;
        sector[64..].fill(byte);
    }
    bytes
}

fn filled(options: Options, is_compressed: bool) -> Vec<u8> {
    let file = MemPort::default();
    let cluster = usize::try_from(options.peek("cluster_size").unwrap().as_u64().unwrap()).unwrap();
    fuzzing::create(options.with("size", LEN as u64), &file, None).unwrap();
    block_on_sim(async {
        let image = open_image(&file, None, None, OpenFlags::default()).await.unwrap();
        for (i, piece) in content().chunks(cluster).enumerate() {
            let (at, iov) = ((i * cluster) as u64, Buf::from_slice(piece).iov());
            match is_compressed {
                true => image.write_compressed(at, iov).await.unwrap(),
                false => image.write(at, iov, WriteFlags::empty()).await.unwrap(),
            }
        }
        image.flush_to_os().await.unwrap();
        image.close().await.unwrap();
    });
    file.bytes()
}

async fn read(image: &dyn Driver, at: usize, len: usize) -> Result<Vec<u8>> {
    let iov = Buf::from_slice(&vec![0xee; len]).iov();
    let at = at as u64;
    if let Some(result) = image.try_read(at, &iov) {
        result?;
    } else {
        image.read(at, iov.clone(), ReadFlags::empty()).await?;
    }
    Ok(iov.to_vec(0..len))
}

fn read_only() -> OpenFlags {
    OpenFlags { read_only: true, ..OpenFlags::default() }
}

/// Reads every sector of an image cut to `len` bytes: each is right, or an error, or in the one
/// cluster that is cut.
fn expect_right_or_failed(whole: &[u8], len: usize, cluster: usize, is_compressed: bool) -> usize {
    let file = MemPort::new(whole[..len].to_vec());
    let expected = content();
    let mut failed = 0;
    let mut zeros_at = Vec::new();
    block_on_sim(async {
        let Ok(image) = open_image(&file, None, None, read_only()).await else {
            failed = LEN / 512;
            return;
        };
        for at in (0..LEN).step_by(512) {
            match read(&*image, at, 512).await {
                Ok(bytes) if bytes == expected[at..at + 512] => {}
                Ok(bytes) => {
                    assert!(!is_compressed, "cut to {len}: wrong bytes at {at:#x}");
                    let there = bytes.iter().zip(&expected[at..]).take_while(|(a, b)| a == b);
                    let there = there.count();
                    assert!(bytes[there..].iter().all(|b| *b == 0), "cut to {len}, {at:#x}");
                    zeros_at.push(at / cluster);
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                    let run = image.block_status(at as u64, 512, Precision::Exact).await;
                    let is_zero = run.is_ok_and(|run| run.flags.contains(StatusFlags::ZERO));
                    assert!(!is_zero, "cut to {len}: {at:#x} fails and is called zeros");
                    failed += 1;
                }
            }
        }
    });
    zeros_at.dedup();
    assert!(zeros_at.len() <= 1, "cut to {len}: zeros in clusters {zeros_at:?}");
    failed
}

#[test]
fn a_cut_image_reads_right_or_not_at_all() {
    for (cluster, is_extended, compressed) in [
        (512, false, None),
        (4096, false, None),
        (16384, true, None),
        (65536, false, None),
        (4096, false, Some("zlib")),
        (4096, false, Some("zstd")),
        (65536, false, Some("zlib")),
        (16384, true, Some("zstd")),
    ] {
        let shape = Options::new()
            .with("cluster_size", cluster as u64)
            .with("extended_l2", is_extended)
            .with("compression_type", compressed.unwrap_or("zlib"));
        let whole = filled(shape, compressed.is_some());
        assert_eq!(expect_right_or_failed(&whole, whole.len(), cluster, compressed.is_some()), 0);
        let step = (whole.len() / 24).next_multiple_of(512);
        let mut last = 0;
        for cut in (0..whole.len()).step_by(step).rev() {
            for len in [cut, cut + 1, cut + 511] {
                let failed = expect_right_or_failed(&whole, len, cluster, compressed.is_some());
                last = last.max(failed);
            }
        }
        assert_eq!(last, LEN / 512, "{cluster} {compressed:?}: the shortest is not readable");
    }
}

/// The file may end inside its last cluster, as many images do.
#[test]
fn a_last_cluster_that_the_file_ends_in_is_whole() {
    let whole = filled(Options::new().with("cluster_size", 4096_u64), false);
    for short in [1, 511, 4095] {
        let file = MemPort::new(whole[..whole.len() - short].to_vec());
        block_on_sim(async {
            let image = open_image(&file, None, None, OpenFlags::default()).await.unwrap();
            let mut expected = content();
            expected[LEN - short..].fill(0);
            assert!(read(&*image, 0, LEN).await.unwrap() == expected, "{short}");
            let one = Buf::from_slice(&[7; 512]).iov();
            image.write(LEN as u64 - 512, one, WriteFlags::empty()).await.unwrap();
            expected[LEN - 512..].fill(7);
            assert!(read(&*image, 0, LEN).await.unwrap() == expected, "{short}");
            image.close().await.unwrap();
        });
    }
}

#[test]
fn a_cut_image_is_not_opened_for_writing() {
    let cluster = Options::new().with("cluster_size", 4096_u64);
    for (whole, is_compressed) in [
        (filled(cluster.clone(), false), false),
        (filled(cluster.with("compression_type", "zstd"), true), true),
    ] {
        for clusters in 1..(whole.len() / 4096 - 6) {
            let len = whole.len() - clusters * 4096;
            let file = MemPort::new(whole[..len].to_vec());
            let error = block_on_sim(open_image(&file, None, None, OpenFlags::default()))
                .err()
                .unwrap_or_else(|| panic!("cut to {len}, compressed: {is_compressed}: opened"));
            let text = error.to_string();
            assert!(text.contains("cut short") && text.contains("--salvage"), "{text}");
            assert_eq!(file.writes(), 0);
        }
    }
}

/// After a crash, refcounts may exist for clusters that the file never got. Nothing points there,
/// so nothing is lost.
#[test]
fn counts_behind_the_end_alone_are_leaks_and_no_obstacle() {
    let mut bytes = filled(Options::new().with("cluster_size", 4096_u64), false);
    let end = bytes.len().div_ceil(4096);
    for cluster in [end, end + 7, end + 900] {
        bytes[0x2000 + 2 * cluster..][..2].copy_from_slice(&[0, 1]);
    }
    let file = MemPort::new(bytes);
    block_on_sim(async {
        let image = open_image(&file, None, None, OpenFlags::default()).await.unwrap();
        assert!(read(&*image, 0, LEN).await.unwrap() == content());
        image.close().await.unwrap();
    });
}

async fn open_reader(graph: &bds_core::graph::Graph, options: Options) -> Result<Backend> {
    let node = graph.open(options.with("read-only", true).with("node-name", "disk")).await?;
    Backend::new(&node, Default::default())
}

#[test]
fn the_error_names_node_file_place_and_remedy() {
    let sim = Sim::new(12, SimConfig::calm());
    let whole = filled(Options::new().with("cluster_size", 4096_u64), false);
    sim.put_file(IMAGE, &whole[..whole.len() - 8192]);
    let graph = graph(&sim);
    sim.block_on(async {
        let disk = open_reader(&graph, options()).await.unwrap();
        let at = LEN as u64 - 4096;
        let text = read_backend(&disk, at, 512).await.unwrap_err().to_string();
        for word in ["disk", IMAGE, "0x3f000", "cut short", "--salvage"] {
            assert!(text.contains(word), "'{word}' is missing: {text}");
        }
        let run = disk.block_status(at, 4096, Precision::Exact).await.unwrap();
        assert!(run.flags.contains(StatusFlags::DATA), "{run:?}");
        drop(disk);
        graph.reap().await;
    });
}

#[test]
fn a_cut_data_file_is_an_error_and_is_not_written() {
    let shape = Shape { size: LEN as u64, data_file: true, ..Shape::default() };
    let sim = Sim::new(13, SimConfig::calm());
    make(&sim, &shape);
    let graph = graph(&sim);
    let half = LEN / 2;
    sim.block_on(async {
        let (node, backend) = open(&graph, options()).await;
        write(&backend, 0, &content()[..half]).await.unwrap();
        close(&graph, node, backend).await;
    });
    // Clusters that nothing points at need not exist.
    sim.put_file(DATA, &sim.snapshot_file(DATA)[..half]);
    sim.block_on(async {
        let (node, backend) = open(&graph, options()).await;
        let mut expected = content();
        expected[half..].fill(0);
        assert!(read_backend(&backend, 0, LEN).await.unwrap() == expected);
        close(&graph, node, backend).await;
    });
    sim.put_file(DATA, &sim.snapshot_file(DATA)[..half - 8192]);
    sim.block_on(async {
        let error = graph.open(options()).await.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("cut short"), "{error}");
        let disk = open_reader(&graph, options()).await.unwrap();
        let there = read_backend(&disk, 0, half - 8192).await.unwrap();
        assert!(there == content()[..half - 8192]);
        let text = read_backend(&disk, half as u64 - 8192, 512).await.unwrap_err().to_string();
        assert!(text.contains(DATA) && text.contains("cut short"), "{text}");
        drop(disk);
        graph.reap().await;
    });
}

#[test]
fn a_file_cut_while_open_does_not_become_zeros() {
    for is_read_only in [false, true] {
        let sim = Sim::new(14, SimConfig::calm());
        let whole = filled(Options::new().with("cluster_size", 4096_u64), false);
        sim.put_file(IMAGE, &whole);
        let graph = graph(&sim);
        sim.block_on(async {
            let node = graph.open(options().with("read-only", is_read_only)).await.unwrap();
            let disk = Backend::new(&node, Default::default()).unwrap();
            assert!(read_backend(&disk, 0, LEN).await.unwrap() == content());
            let writable = OpenOptions { write: true, ..Default::default() };
            let other = sim.fs().open(std::path::Path::new(IMAGE), &writable).unwrap();
            other.set_len(whole.len() as u64 - 8192).await.unwrap();
            for _ in 0..2 {
                let text = read_backend(&disk, LEN as u64 - 4096, 4096).await.unwrap_err();
                assert!(text.to_string().contains("cut short"), "{text}");
            }
            assert!(read_backend(&disk, 0, LEN - 8192).await.unwrap() == content()[..LEN - 8192]);
            drop((disk, node));
            graph.reap().await;
        });
    }
}

/// Preallocated clusters are in the file before anything points at them, at every power cut.
#[test]
fn preallocated_clusters_are_in_the_file_before_they_are_linked() {
    let mut cuts = 0;
    for n in 0.. {
        let sim = Sim::new(15, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
        make(&sim, &Shape { size: 64 << 10, cluster: 512, ..Shape::default() });
        sim.cut_after_writes(Some(n));
        let graph = graph(&sim);
        let done = sim.run_until_cut(async {
            let small = options().with("cache-size", 4096_u64);
            let (node, backend) = open(&graph, small).await;
            let to = Truncate {
                len: 512 << 10,
                exact: true,
                prealloc: Prealloc::Metadata,
                zero_new: false,
            };
            backend.truncate(to).await.unwrap();
            close(&graph, node, backend).await;
        });
        if done.is_some() {
            break;
        }
        cuts += 1;
        let after = MemPort::new(sim.after_cut(n).snapshot_file(IMAGE));
        let report =
            block_on_sim(bds_drivers::format::qcow2::check_image(&after, None, &|_, _| {}));
        let report = report.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "cut {n}: {report:?}");
    }
    assert!(cuts > 10, "{cuts} cuts");
}

//! External data files: clusters freed in the image file are never discarded in the data file.

use bds_core::driver::ZeroFlags;
use bds_core::options::Options;
use bds_io::{Sim, SimConfig};
use bds_testkit::pattern;

use super::harness::{DATA, IMAGE, Shape, close, graph, make, open, options, read, write};
use crate::kit::resize_to;

/// Bytes of data at the start of the disk; every table that the tests free lies below this offset
/// in the image file.
const FILLED: usize = 1 << 20;

fn shape(size: u64) -> Shape {
    Shape { size, cluster: 512, refcount_bits: 64, data_file: true, ..Shape::default() }
}

/// Freed metadata is discarded, in the image file; so is data, in the data file.
fn all_discards() -> Options {
    let data = serde_json::json!({"driver": "file", "filename": DATA, "discard": "unmap"});
    options().with("pass-discard-other", true).with("data-file", data)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Fills the start of the disk in `sim`, does `work`, and checks that no byte of it was lost.
fn keeps_data(sim: &Sim, work: impl AsyncFn(&bds_core::request::Backend)) {
    let filled = pattern(9, 0, FILLED);
    let graph = graph(sim);
    sim.block_on(async {
        let (node, backend) = open(&graph, all_discards()).await;
        write(&backend, 0, &filled).await.unwrap();
        backend.flush().await.unwrap();
        work(&backend).await;
        backend.flush().await.unwrap();
        assert!(read(&backend, 0, FILLED).await.unwrap() == filled, "read before close");
        close(&graph, node, backend).await;
    });
    assert!(sim.snapshot_file(DATA)[..FILLED] == filled, "the data file lost bytes");
}

#[test]
fn a_grown_l1_table_is_discarded_in_the_image_file_only() {
    let sim = Sim::new(33, SimConfig::calm());
    make(&sim, &shape(8 << 20));
    let old_l1 = usize::try_from(word(&sim.snapshot_file(IMAGE), 40)).unwrap();
    keeps_data(&sim, async |backend| {
        backend.truncate(resize_to(64 << 20)).await.unwrap();
    });
    let image = sim.snapshot_file(IMAGE);
    assert_ne!(usize::try_from(word(&image, 40)).unwrap(), old_l1, "the table did not move");
    assert!(image[old_l1..old_l1 + 512].iter().all(|b| *b == 0), "it was not discarded");
}

#[test]
fn a_moved_refcount_table_is_discarded_in_the_image_file_only() {
    let sim = Sim::new(34, SimConfig::calm());
    make(&sim, &shape(8 << 20));
    let old_table = word(&sim.snapshot_file(IMAGE), 48);
    keeps_data(&sim, async |backend| {
        backend.truncate(resize_to(160 << 20)).await.unwrap();
        // Zeros need tables and no data: enough of them that the refcount table, one cluster long,
        // is too small.
        let zero = backend.write_zeroes(8 << 20, 140 << 20, ZeroFlags::empty());
        let _ = zero.await.unwrap();
    });
    assert_ne!(word(&sim.snapshot_file(IMAGE), 48), old_table, "the table did not move");
}

#[test]
fn a_copied_l2_table_is_discarded_in_the_image_file_only() {
    let sim = Sim::new(35, SimConfig::calm());
    make(&sim, &shape(8 << 20));
    keeps_data(&sim, async |_| {});
    // A table that may be shared is copied before it changes.
    let mut image = sim.snapshot_file(IMAGE);
    let l1 = usize::try_from(word(&image, 40)).unwrap();
    let old_table = word(&image, l1) & !(1 << 63);
    image[l1..l1 + 8].copy_from_slice(&old_table.to_be_bytes());
    sim.put_file(IMAGE, &image);
    let graph = graph(&sim);
    sim.block_on(async {
        let (node, backend) = open(&graph, all_discards()).await;
        let _ = backend.write_zeroes(0, 512, ZeroFlags::empty()).await.unwrap();
        backend.flush().await.unwrap();
        let rest = read(&backend, 512, FILLED - 512).await.unwrap();
        assert!(rest == pattern(9, 0, FILLED)[512..], "the data file lost bytes");
        close(&graph, node, backend).await;
    });
    let image = sim.snapshot_file(IMAGE);
    assert_ne!(word(&image, l1) & !(1 << 63), old_table, "the table was not copied");
}

/// The reverse: discarded data leaves the image file unchanged, and the data file frees only that
/// range.
#[test]
fn discarded_data_is_discarded_in_the_data_file_only() {
    let sim = Sim::new(36, SimConfig::calm());
    make(&sim, &shape(8 << 20));
    keeps_data(&sim, async |_| {});
    let graph = graph(&sim);
    sim.block_on(async {
        let (node, backend) = open(&graph, all_discards()).await;
        backend.discard(0, 1 << 19).await.unwrap();
        backend.flush().await.unwrap();
        close(&graph, node, backend).await;
    });
    let data = sim.snapshot_file(DATA);
    assert!(data[..1 << 19].iter().all(|b| *b == 0), "the discard did not reach the host");
    assert!(data[1 << 19..FILLED] == pattern(9, 0, FILLED)[1 << 19..]);
    let image = sim.snapshot_file(IMAGE);
    assert!(image.starts_with(b"QFI\xfb") && word(&image, 512) != 0, "the image lost its tables");
}

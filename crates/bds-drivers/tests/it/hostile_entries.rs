//! L2 entries that no writer made: clusters behind the end of the file, or with refcount zero.
//! Nothing is read, written, zeroed or discarded there, the file keeps its length, and a writable
//! image is marked corrupt.

use bds_core::driver::{Attempt, Driver, OpenFlags, ReadFlags, WriteFlags, ZeroFlags};
use bds_core::options::Options;
use bds_core::{Error, ErrorKind, Result};
use bds_drivers::format::qcow2::fuzzing::{self, MemPort, open_image};
use bds_io::Buf;

use crate::kit::block_on_sim;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// An image with all clusters mapped, and the positions of its first L2 entry, first data cluster
/// and that cluster's refcount.
struct Shape {
    bytes: Vec<u8>,
    cluster: usize,
    entry: usize,
    data: usize,
    count: usize,
    is_extended: bool,
}

fn mapped(cluster: usize, is_extended: bool) -> Shape {
    let options = Options::new()
        .with("size", 64 * 4096_u64)
        .with("cluster_size", cluster as u64)
        .with("extended_l2", is_extended)
        .with("preallocation", "metadata");
    let file = MemPort::default();
    fuzzing::create(options, &file, None).unwrap();
    let mut bytes = file.bytes();
    // Header, refcount table, refcount block, L1, L2, data.
    let (entry, data, count) = (4 * cluster, 5 * cluster, 2 * cluster + 2 * 5);
    bytes[data..].fill(0x5a);
    Shape { bytes, cluster, entry, data, count, is_extended }
}

fn shapes() -> [Shape; 2] {
    [mapped(4096, false), mapped(16384, true)]
}

impl Shape {
    /// The image with another first entry. For standard entries the bitmap gives the flag.
    fn with_entry(&self, word: u64, bitmap: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let is_zero = !self.is_extended && bitmap >> 32 != 0;
        let word = word | if is_zero { ZERO } else { 0 };
        bytes[self.entry..self.entry + 8].copy_from_slice(&word.to_be_bytes());
        if self.is_extended {
            bytes[self.entry + 8..self.entry + 16].copy_from_slice(&bitmap.to_be_bytes());
        }
        bytes
    }

    fn with_count(&self, count: u16) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[self.count..self.count + 2].copy_from_slice(&count.to_be_bytes());
        bytes
    }
}

/// A request to the start of the disk.
#[derive(Clone, Copy, Debug)]
enum TryOp {
    Write,
    WriteCluster,
    Zero,
    Unmap,
    Discard,
}

const ALL: [TryOp; 5] =
    [TryOp::Write, TryOp::WriteCluster, TryOp::Zero, TryOp::Unmap, TryOp::Discard];

async fn attempt(image: &dyn Driver, what: TryOp, cluster: usize) -> Result<()> {
    let bytes = |len| Buf::from_slice(&vec![0xff; len]).iov();
    let len = cluster as u64;
    match what {
        TryOp::Write => image.write(100, bytes(1000), WriteFlags::empty()).await,
        TryOp::WriteCluster => image.write(0, bytes(cluster), WriteFlags::empty()).await,
        TryOp::Zero => image.write_zeroes(0, len, ZeroFlags::empty()).await.map(expect_done),
        TryOp::Unmap => image.write_zeroes(0, len, ZeroFlags::MAY_UNMAP).await.map(expect_done),
        TryOp::Discard => image.discard(0, len).await.map(expect_done),
    }
}

fn expect_done(attempt: Attempt) {
    assert_eq!(attempt, Attempt::Done);
}

/// Opens `bytes` for writing, runs `what`, and closes. Returns the file afterwards and the result.
fn tried(bytes: &[u8], what: TryOp, cluster: usize) -> (Vec<u8>, Result<()>) {
    let file = MemPort::new(bytes.to_vec());
    let outcome = block_on_sim(async {
        let image = open_image(&file, None, None, OpenFlags::default()).await?;
        let outcome = attempt(&*image, what, cluster).await;
        let _ = image.flush_to_os().await;
        let _ = image.flush_to_disk().await;
        let _ = image.close().await;
        outcome
    });
    (file.bytes(), outcome)
}

/// Only the corrupt bit may have changed.
fn expect_untouched(before: &[u8], after: &[u8], what: &str) {
    assert_eq!(after.len(), before.len(), "{what}: the file changed its length");
    let mut after = after.to_vec();
    assert_eq!(after[79] & 2, 2, "{what}: not marked corrupt");
    after[79] = before[79];
    assert!(after == before, "{what}: the file changed");
}

fn expect_corrupt(outcome: Result<()>, word: &str, what: &str) {
    let error: Error = outcome.expect_err(what);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
    assert!(error.to_string().contains(word), "{what}: {error}");
}

#[test]
fn entries_behind_the_end_are_not_written_through() {
    for shape in shapes() {
        let end = shape.bytes.len().next_multiple_of(shape.cluster) as u64;
        let places = [end, end + (1 << 20), 1 << 40, (1 << 56) - shape.cluster as u64];
        // All data, all zeros, and (extended) a place without either.
        for bitmap in [0xffff_ffff, 0xffff_ffff << 32, 0xff] {
            for place in places {
                let bytes = shape.with_entry(place | COPIED, bitmap);
                for what in ALL {
                    let is_zero = bitmap >> 32 != 0;
                    if is_zero && matches!(what, TryOp::Zero) {
                        continue; // nothing changes
                    }
                    let name = format!("{what:?} {place:#x} {bitmap:#x}");
                    let (after, outcome) = tried(&bytes, what, shape.cluster);
                    expect_corrupt(outcome, "behind the end of the file", &name);
                    expect_untouched(&bytes, &after, &name);
                }
            }
        }
    }
}

#[test]
fn a_cluster_with_refcount_zero_is_not_changed_in_place() {
    for shape in shapes() {
        let bytes = shape.with_count(0);
        for what in ALL {
            let name = format!("{what:?} with refcount 0");
            let (after, outcome) = tried(&bytes, what, shape.cluster);
            expect_corrupt(outcome, "refcount 0", &name);
            expect_untouched(&bytes, &after, &name);
        }
    }
}

/// COPIED on a cluster with refcount two: it may hold bytes of a snapshot.
#[test]
fn a_cluster_with_refcount_two_is_copied_before_a_write() {
    for shape in shapes() {
        let mut bytes = shape.with_count(2);
        if shape.is_extended {
            bytes[shape.entry + 8..shape.entry + 16]
                .copy_from_slice(&u64::from(u32::MAX).to_be_bytes());
        }
        for what in [TryOp::Write, TryOp::WriteCluster] {
            let (after, outcome) = tried(&bytes, what, shape.cluster);
            outcome.unwrap();
            let range = shape.data..shape.data + shape.cluster;
            assert!(after[range.clone()] == bytes[range], "{what:?}: written in place");
            let file = MemPort::new(after);
            let iov = Buf::zeroed(2000, 4096).iov();
            block_on_sim(async {
                let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
                let image = open_image(&file, None, None, flags).await.unwrap();
                image.read(0, iov.clone(), ReadFlags::empty()).await.unwrap();
            });
            let shown = iov.to_vec(0..2000);
            assert!(shown[100..1100].iter().all(|b| *b == 0xff), "{what:?}");
            let around = if matches!(what, TryOp::Write) { 0x5a } else { 0xff };
            assert!(shown[..100].iter().chain(&shown[1100..]).all(|b| *b == around), "{what:?}");
        }
    }
}

/// A second write uses an entry that was checked, and a new cluster at a place that was freed.
#[test]
fn writes_to_checked_and_to_reallocated_clusters_succeed() {
    for shape in shapes() {
        let file = MemPort::new(shape.bytes.clone());
        block_on_sim(async {
            let image = open_image(&file, None, None, OpenFlags::default()).await.unwrap();
            for what in [
                TryOp::Write,
                TryOp::WriteCluster,
                TryOp::Unmap,
                TryOp::Write,
                TryOp::Zero,
                TryOp::Write,
            ] {
                attempt(&*image, what, shape.cluster).await.unwrap();
            }
            image.flush_to_os().await.unwrap();
            image.close().await.unwrap();
        });
        let report = block_on_sim(bds_drivers::format::qcow2::check_image(&file, None, &|_, _| {}));
        assert!(report.as_ref().is_ok_and(bds_core::driver::CheckReport::is_clean), "{report:?}");
    }
}

#[test]
fn compressed_bytes_behind_the_end_are_neither_read_nor_freed() {
    let shape = mapped(4096, false);
    let end = shape.bytes.len() as u64;
    for place in [end, end + 100, 1 << 40, (1 << 56) - 4096] {
        let bytes = shape.with_entry(COMPRESSED | place, 0);
        for what in [TryOp::Unmap, TryOp::Discard] {
            let name = format!("{what:?} {place:#x}");
            let (after, outcome) = tried(&bytes, what, shape.cluster);
            expect_corrupt(outcome, "behind the end of the file", &name);
            expect_untouched(&bytes, &after, &name);
        }
        let (_, outcome) = tried(&bytes, TryOp::Write, shape.cluster);
        expect_corrupt(outcome, "behind the end of the file", "the copied bytes are lost");
    }
}

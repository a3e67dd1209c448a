//! Tests building from pieces of a copy, verification of damaged images, and chains of manifests.

use std::sync::Arc;

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::graph::{Graph, GraphConfig};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Options, Result};
use bds_io::IoVec;
use bds_testkit::Chance;

use super::{ContentHash, Manifest, ManifestBuilder};

const CHUNK: u64 = ManifestBuilder::CHUNK_LEN;

fn graph() -> Graph {
    Graph::new(GraphConfig::new(Arc::new(bds_drivers::registry())))
}

async fn disk(graph: &Graph, len: u64) -> Result<Backend> {
    let node = graph.open(Options::parse(&format!("driver=mem,size={len}"))?).await?;
    Backend::new(&node, BackendOptions { writable: true, ..Default::default() })
}

/// Writes random bytes at random places, many chunks stay zero.
async fn fill(disk: &Backend, chance: &mut Chance) -> Result<()> {
    for _ in 0..20 {
        let len = 1 + chance.below(3 * CHUNK);
        let offset = chance.below(disk.len() - len);
        let byte = u8::try_from(chance.below(256)).expect("below 256");
        let data = IoVec::from(vec![byte; usize::try_from(len).expect("short")]);
        disk.write(offset, data, WriteFlags::empty()).await?;
    }
    Ok(())
}

#[test]
fn pieces_of_any_size_and_order_give_the_manifest_of_a_full_read() {
    for seed in 0..20 {
        let graph = graph();
        bds_io::block_on(async {
            let mut chance = Chance::new(seed);
            let disk = disk(&graph, 40 * CHUNK + 513).await?;
            fill(&disk, &mut chance).await?;
            let expected =
                ManifestBuilder::new(disk.len())?.finish(&disk, None, "", |_, _| true).await?;

            let builder = ManifestBuilder::new(disk.len())?;
            for _ in 0..chance.below(30) {
                let offset = chance.below(disk.len());
                let len = (1 + chance.below(4 * CHUNK)).min(disk.len() - offset);
                let data = IoVec::from(vec![0; usize::try_from(len).expect("short")]);
                disk.read(offset, data.clone()).await?;
                match data.is_zero(0..data.len()) {
                    true => builder.saw_zeros(offset..offset + len),
                    false => builder.saw(offset, &data),
                }
            }
            let built = builder.finish(&disk, None, "", |_, _| true).await?;
            assert_eq!(built, expected, "seed {seed}");
            assert_eq!(Manifest::parse(&built.to_bytes())?, expected);
            Ok::<(), bds_core::Error>(())
        })
        .unwrap();
        bds_io::block_on(graph.shutdown()).check_leaks().unwrap();
    }
}

#[test]
fn every_flipped_bit_is_found_in_its_chunk() {
    let graph = graph();
    bds_io::block_on(async {
        let disk = disk(&graph, 8 * CHUNK).await?;
        fill(&disk, &mut Chance::new(7)).await?;
        let manifest =
            ManifestBuilder::new(disk.len())?.finish(&disk, None, "", |_, _| true).await?;
        let mut chance = Chance::new(8);
        for _ in 0..50 {
            let at = chance.below(disk.len());
            let mut byte = [0];
            disk.read_at(at, &mut byte)?;
            disk.write_at(at, &[byte[0] ^ (1 << chance.below(8))])?;
            let report = manifest.verify(&disk, |_, _| true).await?;
            let chunk = at / CHUNK * CHUNK;
            assert_eq!(report.bad, vec![chunk..chunk + CHUNK], "byte {at}");
            disk.write_at(at, &byte)?;
        }
        assert!(manifest.verify(&disk, |_, _| true).await?.is_good());
        Ok::<(), bds_core::Error>(())
    })
    .unwrap();
}

#[test]
fn a_lost_write_of_zeros_is_found_and_progress_can_stop_the_verification() {
    let graph = graph();
    bds_io::block_on(async {
        let disk = disk(&graph, 4 * CHUNK).await?;
        fill(&disk, &mut Chance::new(3)).await?;
        disk.write_at(CHUNK, &[9; 4096])?;
        disk.write_at(2 * CHUNK, &[9; 4096])?;
        let manifest =
            ManifestBuilder::new(disk.len())?.finish(&disk, None, "", |_, _| true).await?;
        let _attempt = disk.write_zeroes(CHUNK, 2 * CHUNK, ZeroFlags::empty()).await?;
        assert_eq!(manifest.verify(&disk, |_, _| true).await?.bad, vec![CHUNK..3 * CHUNK]);
        let stopped = manifest.verify(&disk, |done, _| done < CHUNK).await.unwrap_err();
        assert_eq!(stopped.kind(), ErrorKind::Cancelled);
        Ok::<(), bds_core::Error>(())
    })
    .unwrap();
}

#[test]
fn an_increment_describes_the_whole_image_and_names_its_base() {
    let graph = graph();
    bds_io::block_on(async {
        let mut chance = Chance::new(5);
        let disk = disk(&graph, 30 * CHUNK + 100).await?;
        fill(&disk, &mut chance).await?;
        let full =
            ManifestBuilder::new(disk.len())?.finish(&disk, None, "full", |_, _| true).await?;

        disk.write_at(5 * CHUNK + 17, b"changed")?;
        let increment = ManifestBuilder::new(disk.len())?;
        let data = IoVec::from(vec![0; usize::try_from(CHUNK).expect("64 KiB")]);
        disk.read(5 * CHUNK, data.clone()).await?;
        increment.saw(5 * CHUNK, &data);
        // Only a part of this chunk passes by: it is read again, the base's hash is old.
        disk.write_at(9 * CHUNK + 17, b"changed too")?;
        increment.saw(9 * CHUNK, &data.slice(0..4096));
        increment.fill_from(&full)?;
        let increment = increment.finish(&disk, Some(full.root()), "first", |_, _| true).await?;
        assert!(increment.verify(&disk, |_, _| true).await?.is_good());
        increment.check_parent(&full)?;

        let other =
            ManifestBuilder::new(disk.len())?.finish(&disk, None, "other", |_, _| true).await?;
        let error = increment.check_parent(&other).unwrap_err().to_string();
        assert!(error.contains(&full.root().to_string()), "{error}");
        assert!(error.contains(&other.root().to_string()), "{error}");
        assert_eq!(full.check_parent(&other).unwrap_err().kind(), ErrorKind::InvalidInput);
        Ok::<(), bds_core::Error>(())
    })
    .unwrap();
}

#[test]
fn another_length_is_refused_before_anything_is_read() {
    let graph = graph();
    bds_io::block_on(async {
        let disk = disk(&graph, 2 * CHUNK).await?;
        let manifest = Manifest::new(CHUNK, 16, vec![ContentHash::ZERO], None, String::new())?;
        let error = manifest.verify(&disk, |_, _| true).await.unwrap_err();
        assert!(error.to_string().contains("bytes long, its manifest"), "{error}");
        let error =
            ManifestBuilder::new(CHUNK)?.finish(&disk, None, "", |_, _| true).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        Ok::<(), bds_core::Error>(())
    })
    .unwrap();
}

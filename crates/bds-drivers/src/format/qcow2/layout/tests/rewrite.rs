//! Random rewrites of cluster 0, cut at every write with every sector old or new.

use bds_testkit::Chance;

use super::super::cluster0::{Parsed, Strictness};
use super::super::extension::{Extensions, UnknownExtension};
use super::super::header::Header;
use super::super::units::Geometry;
use super::*;

const FILE_LEN: u64 = 1 << 30;

fn parse(bytes: &[u8]) -> Cluster0 {
    match Cluster0::parse(bytes, FILE_LEN, Strictness::Use).unwrap() {
        Parsed::Complete(found) => *found,
        Parsed::NeedMore(n) => panic!("{n} bytes of {}", bytes.len()),
    }
}

/// As readers see it: padding says nothing, nor does a format without a name.
fn meaning(mut image: Cluster0) -> Cluster0 {
    image.extensions.unknown.retain(|extension| extension.kind != PADDING);
    if image.backing_name.is_none() {
        image.extensions.backing_format = None;
    }
    image
}

fn sample(chance: &mut Chance) -> Cluster0 {
    let version = if chance.one_in(4) { 2 } else { 3 };
    let cluster_bits = u32::try_from(chance.between(9, 14)).unwrap();
    let mut header = Header::new(version, Geometry::new(cluster_bits, false, 4).unwrap());
    header.size = 4096;
    header.l1_size = 1;
    header.l1_offset = 0x30000;
    header.reftable_offset = 0x10000;
    header.reftable_clusters = 1;
    let mut extensions = Extensions::default();
    if chance.one_in(2) {
        extensions.feature_names = Some(Extensions::known_feature_names());
    }
    for kind in 0..chance.below(3) {
        let data = vec![7; usize::try_from(chance.below(600)).unwrap()];
        let kind = 0x1000 + u32::try_from(kind).unwrap();
        extensions.unknown.push(UnknownExtension { kind, data });
    }
    let mut image = Cluster0 { header, extensions, backing_name: None };
    record(&mut image, chance);
    image
}

fn record(image: &mut Cluster0, chance: &mut Chance) {
    let len = usize::try_from(chance.between(1, 300)).unwrap();
    let letter = b'a' + u8::try_from(chance.below(26)).unwrap();
    image.backing_name = (!chance.one_in(3)).then(|| vec![letter; len]);
    let format = ["raw", "qcow2", "host_device", "file"][usize::try_from(chance.below(4)).unwrap()];
    let has_format = image.backing_name.is_some() && !chance.one_in(4);
    image.extensions.backing_format = has_format.then(|| format.into());
}

/// What the cluster may hold after a crash during the write: sectors old or new by `picks`.
fn torn(bytes: &[u8], write: &Write, picks: u64) -> Vec<u8> {
    let mut torn = bytes.to_vec();
    for (sector, new) in write.bytes.chunks(SECTOR_LEN).enumerate() {
        if picks >> (sector % 64) & 1 == 1 {
            put(&mut torn, write.offset + sector * SECTOR_LEN, new);
        }
    }
    torn
}

#[test]
fn a_cut_leaves_the_old_record_or_the_new() {
    let (mut rounds, mut refused, mut twice) = (0, 0, 0);
    for seed in 0..1500 {
        let chance = &mut Chance::new(seed);
        let first = sample(chance);
        let Ok(mut bytes) = first.encode() else { continue };
        // Several in a row, so that names lie where earlier rewrites left them.
        for _ in 0..4 {
            let old = parse(&bytes);
            let mut new = old.clone();
            record(&mut new, chance);
            let writes = match plan(&bytes, &old, &new) {
                Ok(writes) => writes,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "seed {seed}");
                    refused += 1;
                    continue;
                }
            };
            rounds += 1;
            twice += usize::from(writes.len() > 2);
            let (is, shall) = (meaning(old), meaning(new));
            for write in &writes {
                for picks in [0, 1, u64::MAX, chance.draw(), chance.draw(), chance.draw()] {
                    let found = meaning(parse(&torn(&bytes, write, picks)));
                    assert!(found == is || found == shall, "seed {seed}: {found:?}");
                }
                bytes = torn(&bytes, write, u64::MAX);
            }
            assert_eq!(meaning(parse(&bytes)), shall, "seed {seed}");
        }
    }
    assert!(rounds > 3000 && twice > 100 && refused > 20, "{rounds} {twice} {refused}");
}

#[test]
fn the_usual_image_needs_one_fill_and_one_switch() {
    let chance = &mut Chance::new(1);
    let mut image = loop {
        let image = sample(chance);
        if image.header.version == 3 && image.header.geometry.cluster_len() == 16384 {
            break image;
        }
    };
    image.extensions.unknown.clear();
    image.extensions.feature_names = Some(Extensions::known_feature_names());
    image.backing_name = Some(b"base.qcow2".to_vec());
    image.extensions.backing_format = Some(b"qcow2".to_vec());
    let mut bytes = image.encode().unwrap();
    for name in ["other", "a/longer/name/than/the/last", "x"] {
        let old = parse(&bytes);
        let mut new = old.clone();
        new.backing_name = Some(name.into());
        let writes = plan(&bytes, &old, &new).unwrap();
        assert_eq!(writes.len(), 2, "{name}");
        writes.iter().for_each(|write| put(&mut bytes, write.offset, &write.bytes));
        assert_eq!(parse(&bytes), new);
        assert!(plan(&bytes, &new, &new).unwrap().is_empty());
    }
}

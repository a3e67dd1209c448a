//! Damaged and hostile directories and tables: nothing panics, readers change nothing, and what a
//! writer stores is right however wrong the rest is.

use bds_core::driver::OpenFlags;
use bds_drivers::format::qcow2::fuzzing::{self, MemPort, open_image};
use bds_io::{Sim, SimConfig};
use bds_testkit::Chance;

use super::kit::{Model, Models, create, load, open, open_read_only, store, store_of, stored};

/// An image with three bitmaps: one with clusters of bits, one all ones, one disabled and clean.
pub(crate) fn with_bitmaps(cluster: u64, len: u64) -> Vec<u8> {
    let file = MemPort::default();
    create(&file, len, cluster);
    let mut mixed = Model::new(len, 512);
    mixed.set(512..len / 2);
    let mut ones = Model::new(len, 512);
    ones.set(0..len);
    let off = Model { is_enabled: false, ..Model::new(len, 4096) };
    let models: Models =
        [("mixed", mixed), ("ones", ones), ("off", off)].map(|(n, m)| (n.to_owned(), m)).into();
    Sim::new(1, SimConfig::calm()).block_on(async {
        let image = open(&file).await;
        load(&*image).await;
        store(&*image, &models).await.unwrap();
        image.close().await.unwrap();
    });
    file.bytes()
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Where the directory lies, and how long it is.
fn directory(bytes: &[u8]) -> (usize, usize) {
    let magic = 0x2385_2875_u32.to_be_bytes();
    let at = bytes.windows(4).position(|four| four == magic).unwrap();
    (usize::try_from(be64(bytes, at + 24)).unwrap(), usize::try_from(be64(bytes, at + 16)).unwrap())
}

/// Words that could do harm in place of an offset, a length or a size.
fn words(bytes: &[u8]) -> Vec<u64> {
    let clusters = (0..=bytes.len() as u64 / 4096 + 1).map(|cluster| cluster * 4096);
    let others = [1, 2, 0x1ff, 513, 1 << 40, 1 << 55, 1 << 56, 1 << 62, 1 << 63, u64::MAX, !0xfff];
    clusters.chain(others).collect()
}

#[test]
fn every_word_of_directory_and_tables_may_be_anything() {
    let bytes = with_bitmaps(4096, 256 << 10);
    let (at, len) = directory(&bytes);
    let first_table = usize::try_from(be64(&bytes, at)).unwrap();
    let mut places: Vec<usize> = (at..at + len).step_by(4).collect();
    places.push(first_table);
    let extension =
        bytes.windows(4).position(|four| four == 0x2385_2875_u32.to_be_bytes()).unwrap();
    places.extend((extension..extension + 32).step_by(4));
    for place in places {
        for word in words(&bytes) {
            let mut changed = bytes.clone();
            changed[place..place + 8].copy_from_slice(&word.to_be_bytes());
            fuzzing::bitmaps(&changed);
        }
    }
}

#[test]
fn single_bytes_at_random() {
    let bytes = with_bitmaps(512, 64 << 10);
    let mut chance = Chance::new(5);
    for _ in 0..400 {
        let mut changed = bytes.clone();
        for _ in 0..chance.between(1, 3) {
            let at = usize::try_from(chance.below(bytes.len() as u64)).unwrap();
            changed[at] = chance.draw().to_be_bytes()[0];
        }
        fuzzing::bitmaps(&changed);
    }
}

/// A bitmap whose table or bits are damaged is inconsistent; the others, and the disk, are as they
/// were, and it can be removed.
#[test]
fn a_damaged_bitmap_does_no_harm_to_others() {
    let good = with_bitmaps(4096, 256 << 10);
    let (at, _) = directory(&good);
    let table = usize::try_from(be64(&good, at)).unwrap();
    let put = |place: usize, value: u64| {
        let mut bytes = good.clone();
        bytes[place..place + 8].copy_from_slice(&value.to_be_bytes());
        bytes
    };
    let end = good.len() as u64;
    for (what, bytes) in [
        ("the table lies behind the end", put(at, end)),
        ("reserved bits in the table", put(table, 1 << 62)),
        ("bits behind the end", put(table, end)),
        ("unaligned bits", put(table, 0x1200)),
    ] {
        let file = MemPort::new(bytes);
        Sim::new(1, SimConfig::calm()).block_on(async {
            let found = stored(&file).await;
            assert_eq!(found["mixed"].dirty, None, "{what}");
            assert!(found["ones"].dirty.is_some() && found["off"].dirty.is_some(), "{what}");
            let image = open(&file).await;
            load(&*image).await;
            store_of(&*image).mark_in_use().await.unwrap();
            store(&*image, &found).await.unwrap();
            assert_eq!(stored(&file).await, found, "{what}");
            store_of(&*image).remove("mixed").await.unwrap();
            image.close().await.unwrap();
            assert_eq!(stored(&file).await.len(), 2, "{what}");
        });
    }
}

/// The header and the tables of the image are not given away, although a bitmap claims them.
#[test]
fn clusters_of_other_tables_are_not_freed() {
    let good = with_bitmaps(4096, 256 << 10);
    let (at, _) = directory(&good);
    let table = usize::try_from(be64(&good, at)).unwrap();
    for claimed in [4096_u64, 8192, 12288] {
        for place in [at, table] {
            let mut bytes = good.clone();
            bytes[place..place + 8].copy_from_slice(&claimed.to_be_bytes());
            let file = MemPort::new(bytes);
            Sim::new(1, SimConfig::calm()).block_on(async {
                let image = open(&file).await;
                load(&*image).await;
                for name in ["mixed", "ones", "off"] {
                    store_of(&*image).remove(name).await.unwrap();
                }
                image.close().await.unwrap();
                let image = open_read_only(&file).await;
                assert!(load(&*image).await.is_empty());
                let counts = &file.bytes()[8192..8192 + 8];
                assert_eq!(counts, [0, 1, 0, 1, 0, 1, 0, 1], "{claimed:#x} at {place:#x}");
            });
        }
    }
}

/// Extra data of bitmaps, whose meaning is not known, survives; it makes a bitmap unusable unless
/// the bitmap says otherwise.
#[test]
fn extra_data_is_kept() {
    let good = with_bitmaps(4096, 256 << 10);
    let (at, len) = directory(&good);
    for is_compatible in [false, true] {
        let mut bytes = good.clone();
        // 24 bytes more in the first entry.
        let tail = bytes[at + 24..at + len].to_vec();
        bytes[at + 20..at + 24].copy_from_slice(&24_u32.to_be_bytes());
        bytes[at + 24..at + 48].copy_from_slice(b"what only its maker knows"[..24].as_ref());
        bytes[at + 48..at + 48 + tail.len()].copy_from_slice(&tail);
        bytes[at + 15] |= u8::from(is_compatible) << 2;
        let magic = 0x2385_2875_u32.to_be_bytes();
        let extension = bytes.windows(4).position(|four| four == magic).unwrap();
        bytes[extension + 16..extension + 24].copy_from_slice(&(len as u64 + 24).to_be_bytes());
        let file = MemPort::new(bytes);
        Sim::new(1, SimConfig::calm()).block_on(async {
            let found = stored(&file).await;
            assert_eq!(found["mixed"].dirty.is_some(), is_compatible);
            let image = open(&file).await;
            load(&*image).await;
            store_of(&*image).remove("ones").await.unwrap();
            image.close().await.unwrap();
            assert_eq!(stored(&file).await["mixed"], found["mixed"]);
            let bytes = file.bytes();
            let (at, len) = directory(&bytes);
            let kept =
                bytes[at..at + len].windows(24).any(|part| part == b"what only its maker know");
            assert!(kept, "the extra data is lost");
        });
    }
}

/// Bitmaps that would need more memory than one image may take are refused as a whole.
#[test]
fn too_many_large_bitmaps_are_refused() {
    let len = 1_u64 << 41;
    let file = MemPort::default();
    create(&file, len, 65536);
    let mut bytes = file.bytes();
    let at = bytes.len().next_multiple_of(65536);
    // A table of zeros, which all of them share.
    bytes.resize(at + (3 << 16), 0);
    let mut directory = Vec::new();
    for number in 0..1000 {
        directory.extend(((at + 65536) as u64).to_be_bytes());
        directory.extend(8192_u32.to_be_bytes());
        directory.extend([0, 0, 0, 2, 1, 9, 0, 8, 0, 0, 0, 0]);
        directory.extend(format!("{number:08}").as_bytes());
    }
    bytes[at..at + directory.len()].copy_from_slice(&directory);
    let mut extension = [0x2385_2875_u32.to_be_bytes(), 24_u32.to_be_bytes()].concat();
    extension.extend(1000_u32.to_be_bytes());
    extension.extend([0; 4]);
    extension.extend((directory.len() as u64).to_be_bytes());
    extension.extend((at as u64).to_be_bytes());
    bytes[112..112 + extension.len()].copy_from_slice(&extension);
    bytes[112 + extension.len()..200].fill(0);
    bytes[95] = 1;
    let file = MemPort::new(bytes);
    Sim::new(1, SimConfig::calm()).block_on(async {
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        let image = open_image(&file, None, None, flags).await.unwrap();
        let error = store_of(&*image).load().await.unwrap_err().to_string();
        assert!(error.contains("1 GiB"), "{error}");
    });
}

//! What cannot be stored is refused before anything is written.

use std::sync::Arc;

use bds_core::bitmap::HBitmap;
use bds_core::driver::{BitmapSpec, BitmapToStore};
use bds_core::options::Options;
use bds_drivers::format::qcow2::fuzzing::{self, MemPort};
use bds_io::{Sim, SimConfig};

use super::kit::{Model, Models, create, expect_clean, load, open, store, store_of, stored};

fn spec(name: &str, granularity: u32, len: u64) -> BitmapSpec {
    BitmapSpec { name: name.into(), granularity, len }
}

#[test]
fn limits_are_checked_before_a_bitmap_becomes_persistent() {
    let file = MemPort::default();
    create(&file, 1 << 20, 65536);
    let v2 = MemPort::default();
    fuzzing::create(Options::new().with("size", 1 << 20).with("compat", "v2"), &v2, None).unwrap();
    Sim::new(1, SimConfig::calm()).block_on(async {
        let image = open(&file).await;
        let can = |new: BitmapSpec, others: &[BitmapSpec]| {
            store_of(&*image).can_store(&new, others).map_err(|error| error.to_string())
        };
        let longest = "n".repeat(1023);
        can(spec("b", 512, 1 << 41), &[]).unwrap();
        can(spec(&longest, 1 << 31, 1 << 40), &[]).unwrap();
        for (new, words) in [
            (spec("", 512, 512), "1 to 1023 bytes"),
            (spec(&"n".repeat(1024), 512, 512), "1 to 1023 bytes"),
            (spec("b", 256, 512), "512 to 2147483648"),
            (spec("b", 512, (1 << 41) + 512), "larger granularity"),
        ] {
            let error = can(new.clone(), &[]).unwrap_err();
            assert!(error.contains(words), "{new:?}: {error}");
        }
        let many = |count: u32, width: usize| -> Vec<BitmapSpec> {
            (0..count).map(|n| spec(&format!("{n:0width$}"), 512, 512)).collect()
        };
        can(spec("b", 512, 512), &many(65_534, 5)).unwrap();
        let error = can(spec("b", 512, 512), &many(65_535, 5)).unwrap_err();
        assert!(error.contains("Maximum number"), "{error}");
        let error = can(spec("b", 512, 512), &many(64_100, 1023)).unwrap_err();
        assert!(error.contains("bitmap directory"), "{error}");
        let old = open(&v2).await;
        let error = store_of(&*old).can_store(&spec("b", 512, 512), &[]).unwrap_err().to_string();
        assert!(error.contains("v2"), "{error}");
        assert!(load(&*old).await.is_empty());
        let mut models = Models::new();
        store(&*old, &models).await.unwrap();
        models.insert("b".into(), Model::new(1 << 20, 512));
        assert!(store(&*old, &models).await.is_err());
    });
    assert_eq!(v2.bytes().len(), {
        let same = MemPort::default();
        let options = Options::new().with("size", 1 << 20).with("compat", "v2");
        fuzzing::create(options, &same, None).unwrap();
        same.bytes().len()
    });
}

#[test]
fn a_bitmap_of_another_length_is_not_stored() {
    let file = MemPort::default();
    create(&file, 1 << 20, 4096);
    Sim::new(1, SimConfig::calm()).block_on(async {
        let image = open(&file).await;
        load(&*image).await;
        let wrong = BitmapToStore {
            name: "b".into(),
            granularity: 512,
            is_enabled: true,
            bits: Some(Arc::new(HBitmap::new(2 << 20, 512).unwrap())),
        };
        let error = store_of(&*image).store(&[wrong]).await.unwrap_err().to_string();
        assert!(error.contains("2097152 bytes"), "{error}");
        image.close().await.unwrap();
        assert!(stored(&file).await.is_empty());
        expect_clean(&file).await;
    });
}

/// Many bitmaps: a directory of several clusters, as many tables.
#[test]
fn a_thousand_bitmaps_with_long_names() {
    let file = MemPort::default();
    create(&file, 1 << 20, 4096);
    let mut models = Models::new();
    for number in 0..1000 {
        let mut model = Model::new(1 << 20, 512);
        model.set(number * 512..(number + 1) * 512);
        model.is_enabled = number % 3 == 0;
        models.insert(format!("{number:0500}"), model);
    }
    Sim::new(1, SimConfig::calm()).block_on(async {
        let image = open(&file).await;
        load(&*image).await;
        store(&*image, &models).await.unwrap();
        image.close().await.unwrap();
        assert_eq!(stored(&file).await, models);
        expect_clean(&file).await;
        let image = open(&file).await;
        load(&*image).await;
        store_of(&*image).mark_in_use().await.unwrap();
        assert!(stored(&file).await.values().all(|model| model.dirty.is_none()));
        store(&*image, &models).await.unwrap();
        image.close().await.unwrap();
        assert_eq!(stored(&file).await, models);
        expect_clean(&file).await;
    });
}

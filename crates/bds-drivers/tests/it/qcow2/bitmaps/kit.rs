//! A driver on a file in memory, and a plain model of its bitmaps.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bds_core::bitmap::HBitmap;
use bds_core::driver::{
    BitmapStore, BitmapToStore, Driver, OpenFlags, StoredBitmap, Truncate, WriteFlags,
};
use bds_core::error::Result;
use bds_core::options::Options;
use bds_drivers::format::qcow2::check_image;
use bds_drivers::format::qcow2::fuzzing::{self, MemPort};
use bds_io::Buf;
use bds_testkit::Chance;

/// What a bitmap must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Model {
    pub granularity: u32,
    pub is_enabled: bool,
    /// Dirty granules; `None`: inconsistent.
    pub dirty: Option<Vec<bool>>,
}

/// The bitmaps of an image, by name.
pub(super) type Models = BTreeMap<String, Model>;

impl Model {
    pub(super) fn new(len: u64, granularity: u32) -> Self {
        let count = usize::try_from(len.div_ceil(u64::from(granularity))).unwrap();
        Self { granularity, is_enabled: true, dirty: Some(vec![false; count]) }
    }

    pub(super) fn set(&mut self, range: Range<u64>) {
        let granularity = u64::from(self.granularity);
        let dirty = self.dirty.as_mut().expect("consistent");
        for granule in range.start / granularity..range.end.div_ceil(granularity) {
            dirty[usize::try_from(granule).unwrap()] = true;
        }
    }

    /// Marks runs at random; some clusters of bits become all ones, some stay clean.
    pub(super) fn scribble(&mut self, chance: &mut Chance) {
        let dirty = self.dirty.as_mut().expect("consistent");
        let count = dirty.len() as u64;
        for _ in 0..chance.below(6) {
            let start = chance.below(count);
            let most = if chance.one_in(3) { count } else { 1 + count / 50 };
            let end = (start + chance.below(most + 1)).min(count);
            let value = !chance.one_in(3);
            dirty[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(value);
        }
    }

    pub(super) fn bits(&self, len: u64) -> Option<HBitmap> {
        let dirty = self.dirty.as_ref()?;
        let bits = HBitmap::new(len, self.granularity).unwrap();
        for granule in (0..dirty.len()).filter(|granule| dirty[*granule]) {
            let at = granule as u64 * u64::from(self.granularity);
            bits.set(at..at + 1);
        }
        Some(bits)
    }

    /// The bits as bytes, as qcow2 and QEMU order them, padded to 64 bits.
    pub(super) fn stream(&self) -> Vec<u8> {
        let dirty = self.dirty.as_ref().expect("consistent");
        let mut bytes = vec![0; dirty.len().div_ceil(64).max(1) * 8];
        for granule in (0..dirty.len()).filter(|granule| dirty[*granule]) {
            bytes[granule / 8] |= 1 << (granule % 8);
        }
        bytes
    }
}

/// For `store`.
pub(super) fn to_store(models: &Models, len: u64) -> Vec<BitmapToStore> {
    let one = |(name, model): (&String, &Model)| BitmapToStore {
        name: name.as_str().into(),
        granularity: model.granularity,
        is_enabled: model.is_enabled,
        bits: model.bits(len).map(Arc::new),
    };
    models.iter().map(one).collect()
}

/// From `load`.
pub(super) fn models_of(loaded: Vec<StoredBitmap>) -> Models {
    let one = |bitmap: StoredBitmap| {
        let StoredBitmap { name, granularity, is_enabled, bits, .. } = bitmap;
        let dirty = bits.map(|bits| {
            let step = u64::from(granularity);
            (0..bits.granules()).map(|granule| bits.is_dirty(granule * step)).collect()
        });
        (name, Model { granularity, is_enabled, dirty })
    };
    loaded.into_iter().map(one).collect()
}

pub(super) fn create(file: &MemPort, len: u64, cluster: u64) {
    let options = Options::new().with("size", len).with("cluster_size", cluster);
    fuzzing::create(options, file, None).unwrap();
}

pub(super) async fn open(file: &MemPort) -> Box<dyn Driver> {
    fuzzing::open_image(file, None, None, OpenFlags::default()).await.unwrap()
}

pub(super) async fn open_read_only(file: &MemPort) -> Box<dyn Driver> {
    let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
    fuzzing::open_image(file, None, None, flags).await.unwrap()
}

pub(super) fn store_of(image: &dyn Driver) -> &dyn BitmapStore {
    image.bitmap_store().expect("qcow2 stores bitmaps")
}

pub(super) async fn load(image: &dyn Driver) -> Models {
    models_of(store_of(image).load().await.unwrap())
}

/// What the image has, without changing it.
pub(super) async fn stored(file: &MemPort) -> Models {
    let writes = file.writes();
    let image = open_read_only(file).await;
    let models = load(&*image).await;
    image.close().await.unwrap();
    assert_eq!(file.writes(), writes, "a reader wrote");
    models
}

pub(super) async fn store(image: &dyn Driver, models: &Models) -> Result<()> {
    store_of(image).store(&to_store(models, image.len())).await
}

pub(super) async fn write(image: &dyn Driver, at: u64, len: usize) -> Result<()> {
    image.write(at, Buf::from_slice(&vec![0x5a; len]).iov(), WriteFlags::empty()).await
}

pub(super) async fn grow(image: &dyn Driver, len: u64) -> Result<()> {
    image.truncate(Truncate { len, ..crate::kit::resize_to(len) }).await
}

/// Fails the test unless a check finds nothing at all.
pub(super) async fn expect_clean(file: &MemPort) {
    let report = check_image(file, None, &|_, _| {}).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// Fails the test unless a check finds leaks at most.
pub(super) async fn expect_leaks_at_most(file: &MemPort) -> u64 {
    let report = check_image(file, None, &|_, _| {}).await.unwrap();
    assert_eq!(report.corruptions, 0, "{report:?}");
    report.leaks
}

/// Opens an image that may name a backing file, which reads as nothing.
pub(super) async fn open_alone(file: &MemPort) -> Box<dyn Driver> {
    let nothing = MemPort::default();
    fuzzing::open_image(file, None, Some(&nothing), OpenFlags::default()).await.unwrap()
}

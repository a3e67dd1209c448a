//! Entry point for fuzzers of persistent bitmaps.

use std::sync::Arc;

use bds_core::bitmap::{HBitmap, StreamState};
use bds_core::driver::{BitmapStore, BitmapToStore, Driver, OpenFlags, StoredBitmap, WriteFlags};
use bds_core::error::Result;
use bds_io::Buf;

use super::{MemPort, open_image};

/// The name of a bitmap that is added to each image.
const ADDED: &str = "added by a fuzzer";

/// Loads, marks, stores and removes the bitmaps of any bytes: a reader changes nothing and sees
/// what a writer sees, what was stored is loaded again, what was removed is gone, and the image
/// still opens.
pub fn bitmaps(data: &[u8]) {
    bds_io::Sim::new(1, bds_io::SimConfig::calm()).block_on(async {
        let file = MemPort::new(data.to_vec());
        let Some(first) = read(&file).await else { return };
        assert_eq!(file.writes(), 0, "a reader wrote");
        let Ok(image) = open(&file, false).await else { return };
        let loaded = store_of(&*image).load().await.expect("a reader could load them");
        assert_eq!(shown(&first), shown(&loaded), "a writer sees other bitmaps than a reader");
        let all = change(&*image, loaded).await;
        let _ = image.close().await;
        let Some(all) = all else { return };
        let again = read(&file).await.expect("it could be opened before");
        compare(&all, &again);
        let Ok(image) = open(&file, false).await else { return };
        let _ = store_of(&*image).load().await;
        for bitmap in &again {
            if store_of(&*image).remove(&bitmap.name).await.is_err() {
                let _ = image.close().await;
                return;
            }
        }
        assert!(read(&file).await.is_some_and(|left| left.is_empty()), "removed bitmaps are back");
        let _ = image.close().await;
    });
}

async fn open(file: &MemPort, read_only: bool) -> Result<Box<dyn Driver>> {
    let flags = OpenFlags { read_only, ..OpenFlags::default() };
    open_image(file, Some(&MemPort::default()), Some(&MemPort::default()), flags).await
}

fn store_of(image: &dyn Driver) -> &dyn BitmapStore {
    image.bitmap_store().expect("qcow2 stores bitmaps")
}

/// What a reader loads. `None`: it cannot be opened.
async fn read(file: &MemPort) -> Option<Vec<StoredBitmap>> {
    let image = open(file, true).await.ok()?;
    let loaded = store_of(&*image).load().await;
    let _ = image.close().await;
    loaded.ok()
}

/// Names, flags and the number of dirty granules.
fn shown(all: &[StoredBitmap]) -> Vec<(&str, bool, Option<u64>)> {
    let one = |bitmap: &StoredBitmap| bitmap.bits.as_ref().map(HBitmap::dirty_granules);
    all.iter().map(|bitmap| (&*bitmap.name, bitmap.is_enabled, one(bitmap))).collect()
}

/// Marks, writes, and stores what was loaded with one bitmap more. `None`: something was refused.
async fn change(image: &dyn Driver, loaded: Vec<StoredBitmap>) -> Option<Vec<BitmapToStore>> {
    let mut all: Vec<BitmapToStore> = loaded
        .into_iter()
        .map(|StoredBitmap { name, granularity, is_enabled, bits, .. }| BitmapToStore {
            name: name.into(),
            granularity,
            is_enabled,
            bits: bits.map(Arc::new),
        })
        .collect();
    store_of(image).mark_in_use().await.ok()?;
    let _ = image.write(0, Buf::from_slice(&[1; 512]).iov(), WriteFlags::empty()).await;
    let bits = HBitmap::new(image.len(), 1 << 31).ok()?;
    bits.set(0..1);
    if !all.iter().any(|bitmap| &*bitmap.name == ADDED) {
        let bits = Some(Arc::new(bits));
        all.push(BitmapToStore {
            name: ADDED.into(),
            granularity: 1 << 31,
            is_enabled: true,
            bits,
        });
    }
    store_of(image).store(&all).await.ok().map(|()| all)
}

fn compare(stored: &[BitmapToStore], loaded: &[StoredBitmap]) {
    assert_eq!(stored.len(), loaded.len(), "a bitmap is lost");
    for (stored, loaded) in stored.iter().zip(loaded) {
        assert_eq!(*stored.name, loaded.name);
        let (Some(was), Some(is)) = (&stored.bits, &loaded.bits) else {
            assert!(stored.bits.is_none() && loaded.bits.is_none(), "{}", loaded.name);
            continue;
        };
        assert_eq!(was.granules(), is.granules());
        for at in (0..was.stream_len()).step_by(4096) {
            let state = was.stream_state(at, 4096);
            assert_eq!(state, is.stream_state(at, 4096));
            if state == StreamState::Mixed {
                let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
                was.read_stream(at, &mut a);
                is.read_stream(at, &mut b);
                assert!(a == b, "{}: the bits differ at {at:#x}", loaded.name);
            }
        }
    }
}

//! Collects the facts that `info` reports, under QEMU's names, from the header and the tables it
//! points at.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use bds_core::driver::{ChildPort, ImageInfo};
use bds_core::error::Result;
use serde_json::{Map, Value, json};

use super::snapshot::SnapshotTable;
use crate::format::qcow2::bitmap::directory::valid_bitmaps;
use crate::format::qcow2::layout::bitmap_directory::BitmapEntry;
use crate::format::qcow2::layout::cluster0::Cluster0;
use crate::format::qcow2::layout::header::{
    Autoclear, Compatible, CryptMethod, Incompatible, MAX_SNAPSHOTS,
};

/// Collects the facts. Reads the snapshot table and the bitmap directory, follows no reference,
/// writes nothing.
pub(crate) async fn info(file: &dyn ChildPort, image: &Cluster0) -> Result<ImageInfo> {
    let header = &image.header;
    let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
    let count = header.snapshot_count.min(MAX_SNAPSHOTS);
    let snapshots = SnapshotTable::read(file, header.snapshots_offset, count).await?;
    Ok(ImageInfo {
        cluster_size: Some(header.geometry.cluster_size()),
        is_dirty: header.incompatible.contains(Incompatible::DIRTY),
        is_corrupt: header.incompatible.contains(Incompatible::CORRUPT),
        is_encrypted: header.crypt != CryptMethod::None,
        is_compressed: false,
        backing_file: image.backing_name.as_ref().map(|name| OsStr::from_bytes(name).to_owned()),
        backing_format: image.extensions.backing_format.as_ref().map(text),
        marks_base: super::base_mark::BaseMark::of_image(image).is_some(),
        format_specific: Some(
            json!({"type": "qcow2", "data": format_specific(file, image).await?}),
        ),
        logged_bitmaps: Vec::new(),
        snapshots: snapshots.entries.iter().map(super::snapshot::Snapshot::to_json).collect(),
    })
}

async fn format_specific(file: &dyn ChildPort, image: &Cluster0) -> Result<Value> {
    let header = &image.header;
    let mut data = Map::new();
    let mut put = |name: &str, value: Value| {
        data.insert(name.to_owned(), value);
    };
    let is_v3 = header.version >= 3;
    put("compat", if is_v3 { "1.1" } else { "0.10" }.into());
    put("compression-type", header.compression.name().into());
    if is_v3 {
        put("lazy-refcounts", header.compatible.contains(Compatible::LAZY_REFCOUNTS).into());
        let bitmaps = valid_bitmaps(file, image).await?;
        if bitmaps.pointer.is_some() {
            put("bitmaps", bitmaps.entries.iter().map(BitmapEntry::to_json).collect());
        }
    }
    put("refcount-bits", header.geometry.refcount_bits().into());
    match header.crypt {
        CryptMethod::None => {}
        CryptMethod::Aes => put("encrypt", json!({"format": "aes"})),
        CryptMethod::Luks => put("encrypt", json!({"format": "luks"})),
    }
    if is_v3 {
        if header.incompatible.contains(Incompatible::DATA_FILE) {
            if let Some(name) = &image.extensions.data_file {
                put("data-file", String::from_utf8_lossy(name).into());
            }
            put("data-file-raw", header.autoclear.contains(Autoclear::RAW_DATA_FILE).into());
        }
        put("corrupt", header.incompatible.contains(Incompatible::CORRUPT).into());
        put("extended-l2", header.geometry.has_extended_l2().into());
    }
    Ok(Value::Object(data))
}

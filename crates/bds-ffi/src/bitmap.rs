//! Dirty bitmaps of nodes: which parts were written since a point in time.

use std::ffi::c_char;

use bds_core::graph::{BitmapInfo, BitmapOptions, NodeRef};
use serde_json::Value;

use crate::abi::bds_status::BDS_ERR_NOT_FOUND;
use crate::abi::{
    BDS_BITMAP_DISABLED, BDS_BITMAP_PERSISTENT, BDS_EXTENT_DATA, bds_extent, bds_node,
};
use crate::context::{check_flags, check_same};
use crate::entry::entry;
use crate::failure::Failure;
use crate::node;
use crate::ptr::{self, Array, Out, Text};

/// Options of a new bitmap, as C gives them.
pub(crate) fn options(name: &str, granularity: u32, flags: u32) -> Result<BitmapOptions, Failure> {
    check_flags(flags, BDS_BITMAP_PERSISTENT | BDS_BITMAP_DISABLED)?;
    Ok(BitmapOptions {
        granularity: (granularity != 0).then_some(granularity),
        persistent: flags & BDS_BITMAP_PERSISTENT != 0,
        disabled: flags & BDS_BITMAP_DISABLED != 0,
        ..BitmapOptions::named(name)
    })
}

fn node_of(node: bds_node) -> Result<NodeRef, Failure> {
    node::find(node, "node")?.node()
}

/// Adds a bitmap to a node. It records writes from now on. [graph]
///
/// `granularity`: bytes that share a bit, a power of two from 512; 0: the default. `flags`:
/// BDS_BITMAP_PERSISTENT: it is stored in the image; BDS_BITMAP_DISABLED: it does not record yet.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_VERSION,
/// BDS_ERR_STATE, BDS_ERR_EXISTS, BDS_ERR_OPTION (name, granularity), -EFBIG; if persistent:
/// BDS_ERR_UNSUPPORTED, BDS_ERR_READ_ONLY, BDS_ERR_INACTIVE, errnos.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_bitmap_add(node: bds_node, name: Text, granularity: u32, flags: u32) -> i32 {
    entry("bds_bitmap_add", || {
        let options = options(name.str("name")?, granularity, flags)?;
        bds_io::block_on(node_of(node)?.add_bitmap(options))?;
        Ok(0)
    })
}

/// Removes a bitmap, from the image too if it is persistent. [graph]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_STATE,
/// BDS_ERR_NOT_FOUND; BDS_ERR_IN_USE: a job uses it; BDS_ERR_READ_ONLY, errnos. It is still there.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_bitmap_remove(node: bds_node, name: Text) -> i32 {
    entry("bds_bitmap_remove", || {
        let name = name.str("name")?;
        bds_io::block_on(node_of(node)?.remove_bitmap(name))?;
        Ok(0)
    })
}

/// Forgets all that a bitmap has recorded. [graph]
///
/// Errors: as bds_bitmap_remove; BDS_ERR_OPTION: it is inconsistent.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_bitmap_clear(node: bds_node, name: Text) -> i32 {
    entry("bds_bitmap_clear", || {
        let name = name.str("name")?;
        bds_io::block_on(node_of(node)?.clear_bitmap(name))?;
        Ok(0)
    })
}

/// Lets a bitmap record (`is_on` 1), or record no more (0). [graph]
///
/// Errors: as bds_bitmap_clear; BDS_ERR_ARGUMENT: neither 0 nor 1.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_bitmap_set_enabled(node: bds_node, name: Text, is_on: i32) -> i32 {
    entry("bds_bitmap_set_enabled", || {
        let name = name.str("name")?;
        let node = node_of(node)?;
        match is_on {
            0 => bds_io::block_on(node.disable_bitmap(name))?,
            1 => bds_io::block_on(node.enable_bitmap(name))?,
            _ => return Err(Failure::argument("is_on is neither 0 nor 1")),
        }
        Ok(0)
    })
}

/// Marks in a bitmap what is dirty in another one, also of another node and granularity. [graph]
///
/// Errors: as bds_bitmap_clear; BDS_ERR_OPTION: the nodes differ in length; BDS_ERR_ARGUMENT:
/// another context.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_bitmap_merge(
    node: bds_node,
    name: Text,
    source: bds_node,
    source_name: Text,
) -> i32 {
    entry("bds_bitmap_merge", || {
        let (name, source_name) = (name.str("name")?, source_name.str("source_name")?);
        let (target, from) = (node::find(node, "node")?, node::find(source, "source")?);
        check_same(&target.context, &from.context)?;
        let (target, from) = (target.node()?, from.node()?);
        bds_io::block_on(target.merge_bitmaps(name, &[(&from, source_name)]))?;
        Ok(0)
    })
}

/// How many bytes a bitmap has recorded, in whole granules. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_STATE,
/// BDS_ERR_NOT_FOUND.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_bitmap_count(node: bds_node, name: Text, bytes_out: Out<u64>) -> i32 {
    entry("bds_bitmap_count", || {
        let out = bytes_out.check("bytes_out")?;
        let name = name.str("name")?;
        let bitmaps = node_of(node)?.bitmaps();
        let found = bitmaps.iter().find(|bitmap| bitmap.name.as_deref() == Some(name));
        let none = || Failure::new(BDS_ERR_NOT_FOUND, format!("there is no bitmap '{name}'"));
        out.set(found.ok_or_else(none)?.count);
        Ok(0)
    })
}

/// The dirty ranges of a bitmap from `offset` on, as it is now. [any]
///
/// Fills at most `capacity` extents (offset, bytes, BDS_EXTENT_DATA); `count_out` gets how many. If
/// the array was filled, call again from the end of the last one.
///
/// Errors: as bds_bitmap_count; BDS_ERR_OPTION: it is inconsistent.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_bitmap_areas(
    node: bds_node,
    name: Text,
    offset: u64,
    extents: Array<bds_extent>,
    capacity: usize,
    count_out: Out<usize>,
) -> i32 {
    entry("bds_bitmap_areas", || {
        let out = count_out.check("count_out")?;
        let extents = extents.check(capacity, "extents")?;
        let bits = node_of(node)?.copy_bitmap(name.str("name")?)?;
        let mut count = 0;
        let range = offset.min(bits.len())..bits.len();
        for area in bits.areas(range).take(extents.len()) {
            let (offset, bytes) = (area.start, area.end - area.start);
            let flags = BDS_EXTENT_DATA;
            extents.write(count, bds_extent { offset, bytes, flags, ..bds_extent::default() });
            count += 1;
        }
        out.set(count);
        Ok(0)
    })
}

/// The node's bitmaps as JSON, with QEMU's names. Free it with bds_free. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_bitmap_query(node: bds_node, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_bitmap_query", || {
        let out = json_out.check("json_out")?;
        let bitmaps: Vec<Value> =
            node_of(node)?.bitmaps().iter().map(BitmapInfo::to_json).collect();
        out.set(ptr::give_text(&Value::Array(bitmaps).to_string())?);
        Ok(0)
    })
}

//! Edits of dirty bitmaps in a graph change: they begin at one point in time with its other edits.

use crate::abi::{bds_change, bds_node};
use crate::bitmap;
use crate::change::{BitmapEdit, Edit, add, id_of};
use crate::entry::entry;
use crate::failure::Failure;
use crate::ptr::Text;

fn add_edit(
    change: bds_change,
    node: bds_node,
    edit: impl FnOnce() -> Result<BitmapEdit, Failure>,
) -> Result<i32, Failure> {
    let edit = edit()?;
    add(change, |c| Ok(Edit::Bitmap(id_of(c, node, "node")?, edit)))
}

/// Adds a bitmap, as bds_bitmap_add; it records from the moment of the change on. [any]
///
/// Errors: as bds_change_append; BDS_ERR_UTF8, BDS_ERR_VERSION.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_bitmap_add(
    change: bds_change,
    node: bds_node,
    name: Text,
    granularity: u32,
    flags: u32,
) -> i32 {
    entry("bds_change_bitmap_add", || {
        let options = bitmap::options(name.str("name")?, granularity, flags)?;
        add_edit(change, node, || Ok(BitmapEdit::Add(options)))
    })
}

/// Removes a bitmap, as bds_bitmap_remove. [any]
///
/// Errors: as bds_change_append; BDS_ERR_UTF8.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_bitmap_remove(change: bds_change, node: bds_node, name: Text) -> i32 {
    entry("bds_change_bitmap_remove", || {
        add_edit(change, node, || Ok(BitmapEdit::Remove(name.str("name")?.to_owned())))
    })
}

/// Forgets what a bitmap has recorded, as bds_bitmap_clear. [any]
///
/// Errors: as bds_change_append; BDS_ERR_UTF8.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_bitmap_clear(change: bds_change, node: bds_node, name: Text) -> i32 {
    entry("bds_change_bitmap_clear", || {
        add_edit(change, node, || Ok(BitmapEdit::Clear(name.str("name")?.to_owned())))
    })
}

/// Lets a bitmap record (`is_on` 1), or record no more (0), as bds_bitmap_set_enabled. [any]
///
/// Errors: as bds_change_append; BDS_ERR_UTF8.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_bitmap_set_enabled(
    change: bds_change,
    node: bds_node,
    name: Text,
    is_on: i32,
) -> i32 {
    entry("bds_change_bitmap_set_enabled", || {
        let name = name.str("name")?.to_owned();
        add_edit(change, node, || match is_on {
            0 => Ok(BitmapEdit::Disable(name)),
            1 => Ok(BitmapEdit::Enable(name)),
            _ => Err(Failure::argument("is_on is neither 0 nor 1")),
        })
    })
}

/// Marks in a bitmap what is dirty in another one, as bds_bitmap_merge. [any]
///
/// Errors: as bds_change_append; BDS_ERR_UTF8.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_bitmap_merge(
    change: bds_change,
    node: bds_node,
    name: Text,
    source: bds_node,
    source_name: Text,
) -> i32 {
    entry("bds_change_bitmap_merge", || {
        let name = name.str("name")?.to_owned();
        let source_name = source_name.str("source_name")?.to_owned();
        add(change, |c| {
            let (target, from) = (id_of(c, node, "node")?, id_of(c, source, "source")?);
            Ok(Edit::Bitmap(target, BitmapEdit::Merge(name, from, source_name)))
        })
    })
}

//! Tests of dirty bitmaps on fake disks: what is recorded, the verbs, leases, changes, resizes,
//! and what images store.

#![expect(clippy::single_range_in_vec_init, reason = "a list of dirty ranges may have one")]

mod changes;
mod leases;
mod model;
mod persistence;
mod recording;
mod resize;
mod schedules;
mod states;
mod threads;

use std::ops::Range;

use crate::graph::{BitmapInfo, BitmapOptions, NodeRef};

/// A bitmap with small granules.
fn fine(name: &str) -> BitmapOptions {
    BitmapOptions { granularity: Some(512), ..BitmapOptions::named(name) }
}

/// A persistent one.
fn persistent(name: &str) -> BitmapOptions {
    BitmapOptions { persistent: true, ..fine(name) }
}

/// The dirty ranges of a bitmap.
fn dirty(node: &NodeRef, name: &str) -> Vec<Range<u64>> {
    node.copy_bitmap(name).unwrap().areas(0..u64::MAX).collect()
}

/// The facts of a bitmap.
fn info(node: &NodeRef, name: &str) -> BitmapInfo {
    let all = node.bitmaps();
    all.into_iter().find(|info| info.name.as_deref() == Some(name)).expect("the bitmap exists")
}

/// All facts and contents of a node's bitmaps.
fn snapshot(node: &NodeRef) -> Vec<(BitmapInfo, Option<Vec<Range<u64>>>)> {
    let contents = |info: &BitmapInfo| {
        let copy = node.copy_bitmap(info.name.as_deref()?).ok()?;
        Some(copy.areas(0..u64::MAX).collect())
    };
    node.bitmaps().into_iter().map(|info| (info.clone(), contents(&info))).collect()
}

//! Hands the source's named dirty bitmaps over to the target, in the change that pivots.
//!
//! The bitmaps are on the source, below the filter, and record until the change: the filter is
//! drained then, so what the target gets is complete, and the target's bitmaps record from the
//! first write after it. Both are edits of the one change: all of them, and the pivot, or none.

use std::sync::Arc;

use bds_core::graph::{BitmapInfo, BitmapOptions, Change, NodeRef};
use bds_core::{Error, ErrorKind, Result};

use super::options::BitmapTransfer;

/// Checks before the job begins that the target could take the bitmaps as they are now.
pub(super) async fn check(
    source: &NodeRef,
    target: &NodeRef,
    transfer: BitmapTransfer,
) -> Result<()> {
    if transfer == BitmapTransfer::None {
        return Ok(());
    }
    let mut trial = source.graph().change();
    for (name, bitmap) in usable(source)? {
        trial = trial.add_bitmap(target, options_of(&name, &bitmap)).remove_bitmap(target, &name);
    }
    trial.commit().await.map(drop)
}

/// Adds the edits that hand the bitmaps over.
pub(super) fn hand_over(
    change: Change,
    source: &NodeRef,
    target: &NodeRef,
    transfer: BitmapTransfer,
) -> Result<Change> {
    if transfer == BitmapTransfer::None {
        return Ok(change);
    }
    let give = |change: Change, (name, bitmap): (Arc<str>, BitmapInfo)| {
        let change = change.add_bitmap(target, options_of(&name, &bitmap)).merge_bitmaps(
            target,
            &name,
            &[(source, &name)],
        );
        match transfer {
            BitmapTransfer::Move => change.remove_bitmap(source, &name),
            BitmapTransfer::Copy | BitmapTransfer::None => change,
        }
    };
    Ok(usable(source)?.into_iter().fold(change, give))
}

fn options_of(name: &str, bitmap: &BitmapInfo) -> BitmapOptions {
    BitmapOptions {
        granularity: Some(bitmap.granularity),
        persistent: bitmap.persistent,
        disabled: !bitmap.recording,
        ..BitmapOptions::named(name)
    }
}

/// The named bitmaps of the source.
///
/// # Errors
/// `InUse`, `InvalidInput`: one of them cannot be handed over.
fn usable(source: &NodeRef) -> Result<Vec<(Arc<str>, BitmapInfo)>> {
    let refuse = |kind, name: &str, why: &str| {
        let message = format!("Bitmap '{name}' cannot be handed to the target: {why}");
        Err(Error::new(kind, message).node(source.name()))
    };
    let mut usable = Vec::new();
    for bitmap in source.bitmaps() {
        let Some(name) = bitmap.name.clone() else { continue };
        if bitmap.busy {
            return refuse(ErrorKind::InUse, &name, "another operation uses it");
        }
        if bitmap.inconsistent {
            return refuse(ErrorKind::InvalidInput, &name, "it is inconsistent; remove it");
        }
        usable.push((name, bitmap));
    }
    Ok(usable)
}

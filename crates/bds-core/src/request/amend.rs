//! Changes format options of an image, as a request of a backend.
//!
//! No other request to the node runs meanwhile: they wait, as for a write to all of it. The bytes
//! that the guest sees stay the same, so no bitmap records anything. A new length (`size`) is set
//! afterwards as by a resize, with its rules.

use super::admit::{Admission, Entered, enter, named};
use super::range::{self, MAX_LEN};
use super::{flush, truncate};
use crate::driver::{Amendment, Truncate};
use crate::error::Result;
use crate::graph::{BlockOps, Edge};

/// The option that the request path itself carries out.
const SIZE: &str = "size";

/// Checks everything, then changes the options, then the length.
pub(super) async fn amend(edge: &Edge, amendment: Amendment) -> Result<()> {
    let node = enter(edge).await?;
    named(&node, amend_entered(edge, &node, amendment).await)
}

async fn amend_entered(edge: &Edge, node: &Entered<'_>, mut amendment: Amendment) -> Result<()> {
    range::may_write(edge, node, 0, range::write_perms(true))?;
    amendment.has_persistent_bitmaps = node.has_persistent_bitmaps();
    let len = amendment.options.clone().take_size(SIZE)?.filter(|len| *len != node.len());
    if let Some(len) = len {
        node.check_allowed(BlockOps::RESIZE)?;
        range::check(0, len)?;
        range::check_resize(edge, node)?;
        node.check_bitmaps_resize(len)?;
    }
    node.driver().check_amend(&amendment).await?;
    amendment.options.take(SIZE);
    if amendment.options.keys().next().is_some() {
        let admission = Admission::write(0..MAX_LEN).unchanged_if(true).serialising();
        let scope = node.admit(admission).await?;
        scope.run(move |node| node.driver().amend(amendment)).await?;
    }
    if let Some(len) = len {
        let change = Truncate { exact: true, ..Truncate::to(len) };
        truncate::truncate_entered(edge, node, change, None).await?;
    }
    flush::flush_entered(node).await
}

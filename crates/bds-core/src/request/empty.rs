//! Empties an image: lets all of it show its backing node, as a request of a backend.

use super::admit::{Admission, enter, named};
use super::range::{self, MAX_LEN};
use crate::error::Result;
use crate::graph::{Edge, Perm};

/// Empties the image. Excludes all other requests to the node meanwhile.
pub(super) async fn make_empty(edge: &Edge) -> Result<()> {
    let node = enter(edge).await?;
    named(&node, range::may_write(edge, &node, 0, Perm::WRITE))?;
    let scope = node.admit(Admission::write(0..MAX_LEN).serialising()).await?;
    named(&node, scope.run(|node| node.driver().make_empty()).await)
}

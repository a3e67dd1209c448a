//! Makes read-only images writable for a job, and read-only again when it ends.

use bds_core::graph::NodeRef;
use bds_core::{Error, ErrorKind, Options, Result};

use super::take_out::Deadline;

/// Images that a job made writable.
#[derive(Debug, Default)]
pub(crate) struct MadeWritable(Vec<NodeRef>);

impl MadeWritable {
    /// Reopens the image for writing, unless it is writable.
    pub(crate) async fn make(&mut self, image: &NodeRef) -> Result<()> {
        if image.could_write() {
            return Ok(());
        }
        // Noted before: a dropped future may have reopened it.
        self.0.push(image.clone());
        image.graph().reopen(image, Options::new().with("read-only", false)).await
    }

    /// Makes them read-only again. Goes on after an error and returns the first. One in which
    /// requests hang until the deadline stays writable.
    pub(crate) async fn restore(&mut self, deadline: Deadline) -> Result<()> {
        let mut first = Ok(());
        while let Some(image) = self.0.pop() {
            if !image.could_write() {
                continue;
            }
            let options = Options::new().with("read-only", true);
            let restored = deadline.limit(image.graph().reopen(&image, options)).await;
            let hangs = || Err(Error::new(ErrorKind::InUse, "requests hang in it"));
            let restored = restored.unwrap_or_else(hangs);
            let words = "the image cannot be made read-only again";
            first = first.and(restored.map_err(|error| error.context(words).node(image.name())));
        }
        first
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

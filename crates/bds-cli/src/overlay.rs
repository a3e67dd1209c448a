//! Computes what an overlay of a given image must contain to read like the source.
//!
//! If the image is one of the source's own chain, that is what the layers above it decide. Any
//! other image may differ anywhere: then source and image are compared, and what differs is copied.

use std::path::Path;
use std::sync::Arc;

use bds_core::driver::{OpenFlags, ReferenceKind};
use bds_core::graph::{Graph, NodeId, NodeRef, gate, walk};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Options, Result};
use serde_json::Value;

use crate::image;
use crate::image_options;

/// The backing image of an output, as it will be opened from there.
pub(crate) struct Base {
    name: String,
    node: NodeRef,
}

/// Which parts of the source are copied into the overlay.
pub(crate) enum Content {
    /// What the layers of the source above this one decide.
    Above(NodeId),
    /// What differs from the data of this backend.
    UnlikeBase(Arc<Backend>),
}

impl Base {
    /// Opens what `backing_file` and `backing_fmt` name, relative to the output's directory; `None`
    /// if nothing is named.
    pub(crate) async fn open(
        graph: &Graph,
        options: &Options,
        output: &Path,
    ) -> Result<Option<Self>> {
        let format = options.peek("backing_fmt").and_then(Value::as_str).map(str::to_owned);
        let (Some(stored), Some(format)) = (options.peek_path("backing_file"), format) else {
            return Ok(None);
        };
        let name = stored.to_string_lossy().into_owned();
        graph.config().registry.format(&format)?;
        let path = gate::resolve(ReferenceKind::Backing, &stored, Some(output));
        let file = image_options::file(&path).into_json();
        let tree = Options::new().with("driver", format).with("file", file);
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        let node = graph
            .open_with(tree, flags)
            .await
            .map_err(|e| e.context(format_args!("cannot open backing file '{name}'")))?;
        Ok(Some(Self { name, node }))
    }

    pub(crate) fn len(&self) -> u64 {
        self.node.len()
    }

    /// What an overlay of this image needs of `source`.
    pub(crate) fn content(&self, source: &NodeRef) -> Result<Content> {
        let mut at = Some(source.clone());
        while let Some(layer) = at {
            if is_same_chain(&layer, &self.node) {
                return Ok(Content::Above(layer.id()));
            }
            at = walk::next_below(&layer);
        }
        Ok(Content::UnlikeBase(Arc::new(image::backend(&self.node, false)?)))
    }

    /// Refuses an existing output that is not an overlay of this image.
    pub(crate) fn refuse_other_overlay(&self, output: &NodeRef) -> Result<()> {
        let below = walk::next_below(&walk::skip_filters(output));
        let message = match &below {
            Some(below) if is_same_chain(below, &self.node) => return Ok(()),
            Some(below) => {
                let file = walk::filename(below).unwrap_or_default();
                format!("is an overlay of '{}', not of '{}'", file.display(), self.name)
            }
            None => format!("is not an overlay of '{}'", self.name),
        };
        let message =
            format!("{message}: leave out -B to copy everything, or -n to make a new output");
        let error = Error::new(ErrorKind::InvalidInput, message);
        Err(error.file(walk::filename(output).unwrap_or_default()))
    }

    /// Ends the use of the image.
    pub(crate) async fn close(self) -> Result<()> {
        self.node.close().await?.into_result()
    }
}

/// Do two nodes show the same because all of what they stand on is the same, files and drivers?
fn is_same_chain(a: &NodeRef, b: &NodeRef) -> bool {
    let mut next = (Some(a.clone()), Some(b.clone()));
    loop {
        match next {
            (None, None) => return true,
            (Some(a), Some(b)) if is_same_image(&a, &b) => {
                next = (walk::next_below(&a), walk::next_below(&b));
            }
            _ => return false,
        }
    }
}

/// The length tells a window of a raw file from the file.
fn is_same_image(a: &NodeRef, b: &NodeRef) -> bool {
    let identity = walk::identity(a);
    identity.is_some()
        && identity == walk::identity(b)
        && a.driver_name() == b.driver_name()
        && a.len() == b.len()
        && walk::files_of_image(a) == walk::files_of_image(b)
}

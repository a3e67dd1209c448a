//! Writes a new image into a node that is open (`blockdev-create` of a format).

use std::sync::Arc;

use super::create::NewImageReport;
use super::create_target::check_rest;
use crate::driver::CreateContext;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, NodeRef};
use crate::options::Options;

/// An image to be written into an open node.
#[derive(Clone, Debug)]
pub struct NodeFormat {
    /// The format's name.
    pub format: String,
    /// The format's create options, `size` among them. A `backing_file` is recorded and not looked
    /// at.
    pub options: Options,
    /// The node of the external data file, whose name `options` has as `data_file`.
    pub data_file: Option<NodeRef>,
}

impl Graph {
    /// Writes a new image into a node: its old content is lost. Other users may read it meanwhile,
    /// if they share everything else.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::NodeFormat;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let file = graph.open(Options::parse("driver=mem,node-name=file,size=0")?).await?;
    /// let (format, options) = ("qcow2".into(), Options::parse("size=1G")?);
    /// let image = NodeFormat { format, options, data_file: None };
    /// assert_eq!(graph.format_node(&file, image).await?.len, 1 << 30);
    /// let disk = graph.open(Options::parse("driver=qcow2,node-name=disk,file=file")?).await?;
    /// assert_eq!(disk.len(), 1 << 30);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing was written: `NotSupported`: images of the format cannot be created; `InvalidInput`:
    /// a wrong option; `InUse`, `ReadOnly`: the node cannot be written. Any other error: the old
    /// content is lost.
    pub async fn format_node(&self, node: &NodeRef, image: NodeFormat) -> Result<NewImageReport> {
        super::open_node::ensure_executor()?;
        let (graph, node) = (self.clone(), node.clone());
        bds_io::spawn_now(async move { graph.write_format(&node, image).await }).await
    }

    async fn write_format(&self, node: &NodeRef, image: NodeFormat) -> Result<NewImageReport> {
        let NodeFormat { format, mut options, data_file } = image;
        let format = Arc::clone(self.config().registry.format(&format)?);
        let mut checked = options.clone();
        let facts = format.check_create(&mut checked, None)?;
        check_rest(&*format, &checked)?;
        if !std::ptr::eq(node.graph().0.as_ref(), self.0.as_ref()) {
            let message = "the node belongs to another graph";
            return Err(Error::new(ErrorKind::InvalidInput, message).node(node.name()));
        }
        let context = CreateContext {
            file: self.child_for_create("file", node)?,
            data_file: match &data_file {
                Some(node) => Some(self.child_for_create("data-file", node)?),
                None => None,
            },
            backing_len: None,
            options: &mut options,
        };
        format.create(context).await.map_err(|error| error.node(node.name()))?;
        check_rest(&*format, &options)?;
        Ok(NewImageReport { len: facts.len })
    }
}

//! The report of a closed node: what failed while it was flushed and closed.

use crate::error::{Error, Result};
use crate::graph::model::node::NodeId;

/// The outcome of closing a node.
#[derive(Debug)]
pub struct CloseReport {
    /// Its id, stale by now.
    pub node: NodeId,
    /// Its name, free by now.
    pub name: String,
    /// Its driver's name.
    pub driver: &'static str,
    /// Why data written earlier may not be durable.
    pub flush_error: Option<Error>,
    /// Why its driver could not close in order.
    pub close_error: Option<Error>,
    /// From [`NodeRef::close`](crate::graph::NodeRef::close): nodes that ended because only this
    /// one held them, in closing order.
    pub below: Vec<CloseReport>,
}

impl CloseReport {
    /// True if nothing failed, here or below.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let layer = "driver=raw,file.driver=blkdebug,file.image.driver=mem,\
    ///     file.image.size=1M,file.inject-error.0.iotype=flush";
    /// let disk = graph.open(Options::parse(layer)?).await?;
    /// # let writer = BackendOptions { writable: true, ..Default::default() };
    /// # Backend::new(&disk, writer)?.write_at(0, b"x")?;
    /// let report = disk.close().await?;
    /// assert!(!report.is_clean(), "its file ended with it, and could not be flushed");
    /// assert_eq!((report.errors().count(), report.below.len()), (1, 2));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn is_clean(&self) -> bool {
        self.errors().next().is_none()
    }

    /// All failures, this node's first, then those below.
    pub fn errors(&self) -> Box<dyn Iterator<Item = &Error> + '_> {
        let own = self.flush_error.iter().chain(&self.close_error);
        Box::new(own.chain(self.below.iter().flat_map(Self::errors)))
    }

    /// The first failure, if there is one, as a result.
    pub fn into_result(self) -> Result<()> {
        let below = self.below.into_iter().map(Self::into_result);
        let own = [self.flush_error, self.close_error].into_iter().flatten().map(Err);
        own.chain(below).collect()
    }
}

//! A graph with all drivers on a simulated disk, for the tests of this crate.

use std::sync::Arc;

use bds_core::driver::WriteFlags;
use bds_core::graph::{Graph, GraphConfig, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::{Buf, Sim, SimConfig};
use serde_json::Value;

/// A graph with all drivers on a simulated disk.
pub(crate) struct House {
    pub(crate) sim: Sim,
    pub(crate) graph: Graph,
}

impl House {
    pub(crate) fn new(seed: u64) -> Self {
        Self::with(Sim::new(seed, SimConfig::default()))
    }

    pub(crate) fn with(sim: Sim) -> Self {
        let registry = Arc::new(bds_drivers::registry());
        let graph = Graph::new(GraphConfig { fs: sim.fs(), ..GraphConfig::new(registry) });
        Self { sim, graph }
    }

    pub(crate) fn node(&self, options: Value) -> Result<NodeRef> {
        let options = Options::from_json(options)?;
        self.sim.block_on(self.graph.open(options))
    }

    /// Opens a node for writing; the backend is its only user.
    pub(crate) fn backend(&self, options: Value) -> Result<Backend> {
        let node = self.node(options)?;
        Backend::new(
            &node,
            BackendOptions {
                name: "test".into(),
                writable: node.is_writable(),
                ..Default::default()
            },
        )
    }

    pub(crate) fn read(&self, backend: &Backend, offset: u64, len: usize) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(len, 4096);
        buf.iov().fill(0..len, 0xee);
        self.sim.block_on(backend.read(offset, buf.iov()))?;
        let mut out = vec![0; len];
        buf.iov().copy_to(0, &mut out);
        Ok(out)
    }

    pub(crate) fn write(&self, backend: &Backend, offset: u64, bytes: &[u8]) -> Result<()> {
        let iov = Buf::from_slice(bytes).iov();
        self.sim.block_on(backend.write(offset, iov, WriteFlags::empty()))
    }
}

//! A graph with all drivers on a simulated disk, for the tests of this crate.

use std::sync::Arc;

use bds_core::driver::{Registry, WriteFlags};
use bds_core::graph::reference_gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::{Buf, Fs, Sim, SimConfig};
use serde_json::Value;

/// A graph with all drivers on a simulated disk.
pub(crate) struct Fixture {
    pub(crate) sim: Sim,
    pub(crate) graph: Graph,
}

impl Fixture {
    pub(crate) fn new(seed: u64) -> Self {
        Self::with(Sim::new(seed, SimConfig::default()))
    }

    pub(crate) fn with(sim: Sim) -> Self {
        Self::with_registry(sim, bds_drivers::registry())
    }

    pub(crate) fn with_registry(sim: Sim, registry: Registry) -> Self {
        let config = GraphConfig { fs: sim.fs(), ..GraphConfig::new(Arc::new(registry)) };
        Self { graph: Graph::new(config), sim }
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

/// A graph with all drivers that opens the files which images name, without probing their formats.
pub(crate) fn trusting_graph(fs: Fs) -> Graph {
    let registry = Arc::new(bds_drivers::registry());
    let gate = Arc::new(TrustAll { may_probe: false });
    Graph::new(GraphConfig { fs, gate, ..GraphConfig::new(registry) })
}

/// Runs a future on a new simulated disk without delays.
#[cfg(feature = "qcow2")]
pub(crate) fn block_on_sim<T>(work: impl Future<Output = T>) -> T {
    Sim::new(1, SimConfig::calm()).block_on(work)
}

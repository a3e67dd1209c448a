//! Applies the requests of a cell's script through the library: graph and backend, as a program
//! uses them.

use std::path::Path;
use std::sync::Arc;

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::graph::gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::Buf;
use serde_json::json;

use super::script::Act;

/// Opens the image, applies the requests and closes it.
pub(crate) fn apply(image: &Path, acts: &[Act]) -> Result<()> {
    bds_io::block_on(async {
        let registry = Arc::new(bds_drivers::registry());
        let graph = Graph::new(GraphConfig {
            gate: Arc::new(TrustAll { may_probe: true }),
            ..GraphConfig::new(registry)
        });
        let options = json!({
            "driver": "qcow2",
            "discard": "unmap",
            "file": {"driver": "file", "filename": image},
        });
        let node = graph.open(Options::from_json(options)?).await?;
        let backend = Backend::new(
            &node,
            BackendOptions { name: "test".to_owned(), writable: true, ..Default::default() },
        )?;
        for act in acts {
            request(&backend, act).await.map_err(|e| e.context(format_args!("{act:?}")))?;
        }
        backend.flush().await?;
        drop(backend);
        node.close().await?.into_result()
    })
}

async fn request(backend: &Backend, act: &Act) -> Result<()> {
    let bytes = |len: u64, byte: u8| {
        let len = usize::try_from(len).expect("requests are small");
        Buf::from_slice(&vec![byte; len]).iov()
    };
    match *act {
        Act::Write { at, len, byte } => {
            backend.write(at, bytes(len, byte), WriteFlags::empty()).await
        }
        Act::Compressed { at, len, byte } => {
            let cluster = backend.info().await?.cluster_size.unwrap_or(len);
            for from in (at..at + len).step_by(usize::try_from(cluster).expect("it is small")) {
                let take = cluster.min(at + len - from);
                backend.write_compressed(from, bytes(take, byte)).await?;
            }
            Ok(())
        }
        Act::Zero { at, len, may_unmap } => {
            let flags = if may_unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
            backend.write_zeroes(at, len, flags).await.map(|_| ())
        }
        Act::Discard { at, len } => backend.discard(at, len).await,
    }
}

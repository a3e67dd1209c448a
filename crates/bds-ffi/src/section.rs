//! Drained sections: no request is in flight until the section ends.

use std::sync::Arc;
use std::time::Duration;

use bds_core::graph::Drained;
use bds_core::request::BackendDrained;

use crate::abi::bds_status::{BDS_OK, BDS_STILL_REFERENCED};
use crate::abi::{bds_backend, bds_context, bds_node, bds_section};
use crate::context::{self, Context, check_flags};
use crate::entry::entry;
use crate::failure::Failure;
use crate::ptr::{Checked, Out};
use crate::table::{Object, Ref, Removed, Table};
use crate::{BDS_DRAIN_SUBTREE, backend, node};

static SECTIONS: Table<SectionObject> = Table::new(8);

/// A section, and its context, which must outlive it.
pub(crate) struct SectionObject {
    pub(crate) section: Section,
    pub(crate) context: Arc<Context>,
}

pub(crate) enum Section {
    Nodes(Drained),
    /// Only kept.
    Backend(#[expect(dead_code, reason = "its drop ends the section")] BackendDrained),
}

impl Object for SectionObject {}

fn give(
    section: Section,
    context: &Arc<Context>,
    out: Checked<bds_section>,
) -> Result<i32, Failure> {
    let object = SectionObject { section, context: Arc::clone(context) };
    out.set(bds_section { raw: SECTIONS.insert(object)? });
    Ok(BDS_OK as i32)
}

pub(crate) fn find(section: bds_section) -> Result<Ref<SectionObject>, Failure> {
    SECTIONS.get(section.raw).map_err(|failure| failure.of("section"))
}

/// Waits until no request is in the node nor above it, and keeps new ones waiting until
/// bds_graph_drain_end. [graph]
///
/// Requests that wait do not fail; they go on afterwards. Sections nest. `flags`:
/// BDS_DRAIN_SUBTREE: also everything below. `timeout_ns`: -1: waits as long as it takes (a queue
/// that is only served by the calling thread deadlocks). A section keeps its node and context.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_VERSION, BDS_ERR_STATE;
/// -EAGAIN: requests were still in flight after the timeout; nothing is drained then.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_graph_drain_begin(
    node: bds_node,
    flags: u32,
    timeout_ns: i64,
    out: Out<bds_section>,
) -> i32 {
    entry("bds_graph_drain_begin", || {
        let out = out.check("out")?;
        check_flags(flags, BDS_DRAIN_SUBTREE)?;
        let object = node::find(node, "node")?;
        let (node, graph) = (object.node()?, &object.context.graph);
        let is_subtree = flags & BDS_DRAIN_SUBTREE != 0;
        let drained = match (is_subtree, u64::try_from(timeout_ns)) {
            (false, Err(_)) => bds_io::block_on(graph.drain(&node)),
            (true, Err(_)) => bds_io::block_on(graph.drain_subtree(&node)),
            (false, Ok(limit)) => {
                bds_io::block_on(graph.drain_within(&node, Duration::from_nanos(limit)))?
            }
            (true, Ok(_)) => return Err(Failure::argument("a subtree has no timeout; pass -1")),
        };
        give(Section::Nodes(drained), &object.context, out)
    })
}

/// As bds_graph_drain_begin, for all nodes of the context. [graph]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_graph_drain_all(context: bds_context, out: Out<bds_section>) -> i32 {
    entry("bds_graph_drain_all", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let drained = bds_io::block_on(context.graph.drain_all());
        give(Section::Nodes(drained), &context, out)
    })
}

/// Waits until none of the backend's own requests is in flight, and keeps new ones waiting until
/// bds_graph_drain_end; other users of the node go on. [graph]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_POISONED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_drain(backend: bds_backend, out: Out<bds_section>) -> i32 {
    entry("bds_backend_drain", || {
        let out = out.check("out")?;
        let object = backend::find(backend, "backend")?;
        let drained = bds_io::block_on(object.shared.backend.drain());
        give(Section::Backend(drained), &object.shared.context, out)
    })
}

/// Ends a drained section and releases its handle. [any]
///
/// BDS_STILL_REFERENCED: a change that is just being made inside the section ends it.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_graph_drain_end(section: bds_section) -> i32 {
    entry("bds_graph_drain_end", || match SECTIONS.remove(section.raw)? {
        Removed::Taken(_) => Ok(BDS_OK as i32),
        Removed::InUse => Ok(BDS_STILL_REFERENCED as i32),
    })
}

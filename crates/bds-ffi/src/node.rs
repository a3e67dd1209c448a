//! Nodes: open, references, weak ids, close, facts.

use std::ffi::c_char;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::Options;
use bds_core::graph::{
    BlockOps, CloseError, EdgeFacts, Holder, HolderKind, NodeId, NodeRef, Release, walk,
};
use serde_json::{Value, json};

use crate::abi::bds_status::{
    BDS_ERR_IN_USE, BDS_ERR_NOT_FOUND, BDS_ERR_STATE, BDS_OK, BDS_STILL_REFERENCED,
};
use crate::abi::{
    BDS_OPEN_AUTO_READ_ONLY, BDS_OPEN_DIRECT, BDS_OPEN_FORCE_SHARE, BDS_OPEN_PROBE,
    BDS_OPEN_READ_ONLY, BDS_OPEN_UNMAP, bds_context, bds_limits, bds_node,
};
use crate::context::{self, Context, check_flags, close_json};
use crate::entry::entry;
use crate::failure::Failure;
use crate::fault;
use crate::option_text;
use crate::ptr::{self, InOut, Out, Text};
use crate::table::{Object, Ref, Removed, Table};

pub(crate) static NODES: Table<NodeObject> = Table::new(4);

/// C's reference to a node.
pub(crate) struct NodeObject {
    pub(crate) context: Arc<Context>,
    id: NodeId,
    /// `None` once the node was closed through this handle, and while it is being closed.
    node: Mutex<Option<NodeRef>>,
}

impl Object for NodeObject {
    fn poison(&self) {
        if let Some(node) = &*self.lock() {
            node.poison();
        }
    }
}

impl NodeObject {
    fn lock(&self) -> MutexGuard<'_, Option<NodeRef>> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the node without taking a reference.
    fn with<T>(&self, look: impl FnOnce(&NodeRef) -> T) -> Result<T, Failure> {
        self.lock().as_ref().map(look).ok_or_else(is_closed)
    }

    /// A reference for the length of a call.
    pub(crate) fn node(&self) -> Result<NodeRef, Failure> {
        self.with(NodeRef::clone)
    }

    pub(crate) fn id(&self) -> NodeId {
        self.id
    }

    pub(crate) fn name(&self) -> Result<String, Failure> {
        self.with(|node| node.name().to_owned())
    }

    /// Takes the reference out; it is put back or has ended.
    pub(crate) fn take(&self) -> Result<NodeRef, Failure> {
        self.lock().take().ok_or_else(is_closed)
    }

    pub(crate) fn put_back(&self, node: NodeRef) {
        *self.lock() = Some(node);
    }
}

impl Drop for NodeObject {
    fn drop(&mut self) {
        fault::point("drop");
        let node = self.node.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if node.is_some_and(|node| node.release() == Release::Last) {
            self.context.reap_later();
        }
    }
}

fn is_closed() -> Failure {
    Failure::new(BDS_ERR_STATE, "the node was closed through this handle; release the handle")
}

/// The entry of a node's handle.
pub(crate) fn find(node: bds_node, what: &str) -> Result<Ref<NodeObject>, Failure> {
    NODES.get(node.raw).map_err(|failure| failure.of(what))
}

/// Gives C a reference.
pub(crate) fn give(
    context: &Arc<Context>,
    node: NodeRef,
    out: ptr::Checked<bds_node>,
) -> Result<i32, Failure> {
    let id = node.id();
    let node = Mutex::new(Some(node.held_as(Holder::new(HolderKind::User, "C handle"))));
    let object = NodeObject { context: Arc::clone(context), id, node };
    out.set(bds_node { raw: NODES.insert(object)? });
    Ok(BDS_OK as i32)
}

/// Opens a node, as QEMU's blockdev-add describes it. [io]
///
/// `options`: JSON or `key=value,…`: "driver", "node-name", the common options, the driver's own,
/// and children inline ("file.driver") or by node name ("backing"). The handle is the node's only
/// reference.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_JSON, BDS_ERR_OPTION,
/// BDS_ERR_EXISTS (the name), BDS_ERR_NOT_FOUND (a child), BDS_ERR_IN_USE (a lock, permissions),
/// BDS_ERR_REFERENCE, BDS_ERR_CORRUPT, BDS_ERR_UNSUPPORTED, BDS_ERR_CANCELLED (the context was shut
/// down); -ENOENT, -EACCES and other errnos of the system. Nothing remains open.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_open(context: bds_context, options: Text, out: Out<bds_node>) -> i32 {
    entry("bds_node_open", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let options = option_text::parse(options, "options")?;
        let node = bds_io::block_on(context.graph.open(options))?;
        give(&context, node, out)
    })
}

/// Opens an image file. [io]
///
/// `driver`: "qcow2", "raw", …, or "file" for the file itself; NULL with BDS_OPEN_PROBE: the format
/// is guessed. `flags`: `BDS_OPEN_`.
///
/// Errors: as bds_node_open; BDS_ERR_VERSION: an unknown flag.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_open_path(
    context: bds_context,
    path: Text,
    driver: Text,
    flags: u32,
    out: Out<bds_node>,
) -> i32 {
    entry("bds_node_open_path", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let node = open_path(&context, path.path("path")?, driver.optional("driver")?, flags)?;
        give(&context, node, out)
    })
}

fn open_path(
    context: &Context,
    path: &Path,
    driver: Option<&str>,
    flags: u32,
) -> Result<NodeRef, Failure> {
    let known = BDS_OPEN_READ_ONLY
        | BDS_OPEN_AUTO_READ_ONLY
        | BDS_OPEN_FORCE_SHARE
        | BDS_OPEN_DIRECT
        | BDS_OPEN_UNMAP
        | BDS_OPEN_PROBE;
    check_flags(flags, known)?;
    bds_io::block_on(async {
        let driver = driver_of(context, path, driver, flags).await?;
        let mut options = Options::new();
        let switches = [
            (BDS_OPEN_READ_ONLY, "read-only", "on"),
            (BDS_OPEN_AUTO_READ_ONLY, "auto-read-only", "on"),
            (BDS_OPEN_FORCE_SHARE, "force-share", "on"),
            (BDS_OPEN_UNMAP, "discard", "unmap"),
        ];
        for (flag, key, value) in switches {
            if flags & flag != 0 {
                options.set(key, value);
            }
        }
        if flags & BDS_OPEN_DIRECT != 0 {
            options.set("cache", json!({"direct": true}));
        }
        options.set("driver", &*driver);
        if driver == "file" {
            options.set_path("filename", path);
        } else {
            let mut file = Options::new().with("driver", "file");
            file.set_path("filename", path);
            options.set("file", file.into_json());
        }
        Ok(context.graph.open(options).await?)
    })
}

/// The driver that was named, or the one guessed.
pub(crate) async fn driver_of(
    context: &Context,
    path: &Path,
    driver: Option<&str>,
    flags: u32,
) -> Result<String, Failure> {
    match driver {
        Some(driver) => Ok(driver.to_owned()),
        None if flags & BDS_OPEN_PROBE != 0 => {
            Ok(context.graph.guess_file(path).await?.best()?.to_owned())
        }
        None => Err(Failure::argument("driver is NULL; guessing it takes BDS_OPEN_PROBE")),
    }
}

/// A new handle for the node of this name. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_NOT_FOUND.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_find(context: bds_context, name: Text, out: Out<bds_node>) -> i32 {
    entry("bds_node_find", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let node = context.graph.find(name.str("name")?)?;
        give(&context, node, out)
    })
}

/// A new handle for the node of this id, if the node lives. [any]
///
/// This is the way to ask "is it still valid?" that has a stable answer: success gives a reference,
/// and BDS_ERR_STALE is final, because no other node ever gets that id.
///
/// Errors: BDS_ERR_STALE: the node has ended, or the context has. BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_acquire(context: bds_context, id: u64, out: Out<bds_node>) -> i32 {
    entry("bds_node_acquire", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let node = context.graph.acquire(NodeId::from_u64(id))?;
        give(&context, node, out)
    })
}

/// Another reference to the node: a new handle, for another owner. [any]
///
/// Each handle is released on its own. The handles of a node differ; compare bds_node_id.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT; BDS_ERR_STATE: the node is closed.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_ref(node: bds_node, out: Out<bds_node>) -> i32 {
    entry("bds_node_ref", || {
        let out = out.check("out")?;
        let node = find(node, "node")?;
        give(&node.context, node.node()?, out)
    })
}

/// Releases this reference, whatever others hold. [any]
///
/// BDS_OK: it was the node's last reference. The node is closed in the background: flush, driver,
/// children; what fails goes to the log and to BDS_EVENT_NODE_CLOSED. Call bds_node_close first to
/// see errors. BDS_STILL_REFERENCED: others hold the node (see bds_node_query), or the graph looks
/// at it at this moment because another thread closes or changes nodes; it is closed after that.
/// The handle is stale in both cases, and a second release is BDS_ERR_STALE and changes nothing.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_unref(node: bds_node) -> i32 {
    entry("bds_node_unref", || {
        let Removed::Taken(object) = NODES.remove(node.raw)? else {
            return Ok(BDS_STILL_REFERENCED as i32);
        };
        match object.take().map(NodeRef::release) {
            Ok(Release::NotLast) => Ok(BDS_STILL_REFERENCED as i32),
            Ok(Release::Last) => {
                object.context.reap_later();
                Ok(BDS_OK as i32)
            }
            // It was closed through this handle.
            Err(_) => Ok(BDS_OK as i32),
        }
    })
}

/// Closes the node if this is its only reference: flushes, closes, also what only it held. [graph]
///
/// The handle still has to be released; until then it names a closed node. `report_json_out` may
/// be NULL; it is written if the node was closed, also when a flush failed, and then has to be
/// freed.
///
/// Errors: BDS_ERR_IN_USE names the other holders, BDS_ERR_STATE: it is closed already, or just
/// being closed; nothing has changed in both cases. Otherwise the node is closed, and the error,
/// as -EIO or -ENOSPC, says that data written earlier may be lost.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_close(node: bds_node, report_json_out: Out<*mut c_char>) -> i32 {
    entry("bds_node_close", || {
        let out = report_json_out.check_optional("report_json_out")?;
        let object = NODES.find(node.raw)?;
        let node = object.take()?;
        match bds_io::block_on(node.close()) {
            Err(error) => {
                let words = error.to_string();
                let CloseError::InUse { node, .. } = error;
                object.put_back(node);
                Err(Failure::new(BDS_ERR_IN_USE, words))
            }
            Ok(report) => {
                if let Some(out) = out {
                    out.set(ptr::give_text(&close_json(&report).to_string())?);
                }
                report.into_result()?;
                Ok(0)
            }
        }
    })
}

/// The node's id: the same for all handles of the node, and never that of another node. [any]
///
/// It keeps nothing alive. Use it to compare and hash nodes, and with bds_node_acquire.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_id(node: bds_node, id_out: Out<u64>) -> i32 {
    entry("bds_node_id", || {
        let out = id_out.check("id_out")?;
        out.set(NODES.find(node.raw)?.id.to_u64());
        Ok(0)
    })
}

/// The node's name. Free it with bds_free. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_name(node: bds_node, name_out: Out<*mut c_char>) -> i32 {
    entry("bds_node_name", || {
        let out = name_out.check("name_out")?;
        out.set(ptr::give_text(&NODES.find(node.raw)?.name()?)?);
        Ok(0)
    })
}

/// Names this reference in "in use" messages, queries and leak reports. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_set_holder(node: bds_node, name: Text) -> i32 {
    entry("bds_node_set_holder", || {
        let name = name.str("name")?.to_owned();
        let object = find(node, "node")?;
        let mut place = object.lock();
        let node = place.take().ok_or_else(is_closed)?;
        *place = Some(node.held_as(Holder::new(HolderKind::User, name)));
        Ok(0)
    })
}

/// Facts about the node as JSON: id, name, driver, file, length, state, the job that works on it,
/// why operations are blocked, count, holders, users with their permissions and freezes, children.
/// Free it with bds_free. [any]
///
/// "holders" is the answer to "who keeps my file open?".
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_query(node: bds_node, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_node_query", || {
        let out = json_out.check("json_out")?;
        let facts = NODES.find(node.raw)?.with(facts)?;
        out.set(ptr::give_text(&facts.to_string())?);
        Ok(0)
    })
}

fn facts(node: &NodeRef) -> Value {
    let edge = |edge: &EdgeFacts| {
        json!({
            "name": edge.name,
            "user": edge.holder,
            "child": edge.child_name,
            "child-id": edge.child.to_u64(),
            "uses": edge.access.perm.words().collect::<Vec<_>>(),
            "shares": edge.access.shared.words().collect::<Vec<_>>(),
            "frozen-by": edge.frozen_by,
            "drained": edge.is_drained,
        })
    };
    json!({
        "id": node.id().to_u64(),
        "name": node.name(),
        "driver": node.driver_name(),
        "filename": walk::filename(node).map(|path| path.to_string_lossy().into_owned()),
        "length": node.len(),
        "writable": node.is_writable(),
        "active": node.is_active(),
        "poisoned": node.is_poisoned(),
        "drained": node.quiesce_count() > 0,
        "monitor": node.graph().is_owned(node.id()),
        "job": node.job().as_deref(),
        "blocked": node.blocked(BlockOps::all()).iter().map(|why| json!(**why)).collect::<Vec<_>>(),
        "in-flight": node.in_flight(),
        "count": node.count(),
        "holders": holders_json(node, 0),
        "users": node.edges_above().iter().map(edge).collect::<Vec<_>>(),
        "children": node.edges_below().iter().map(edge).collect::<Vec<_>>(),
    })
}

/// The holders of a node, without the `own` newest ones, which are the caller's.
pub(crate) fn holders_json(node: &NodeRef, own: usize) -> Value {
    let mut holders = node.graph().holders(node.id());
    holders.truncate(holders.len().saturating_sub(own));
    let holder = |h: &bds_core::graph::HolderInfo| {
        let holder = Holder { kind: h.kind, name: h.name.clone() };
        json!(holder.to_string())
    };
    holders.iter().map(holder).collect()
}

/// Length and limits of requests. Set `limits_out->struct_size` first. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_VERSION, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_limits(node: bds_node, limits_out: InOut<bds_limits>) -> i32 {
    entry("bds_node_limits", || {
        let out = limits_out.check("limits_out")?;
        let (limits, length) = NODES.find(node.raw)?.with(|node| (node.limits(), node.len()))?;
        out.set(&bds_limits {
            struct_size: 0,
            request_alignment: limits.request_alignment,
            memory_alignment: limits.memory_alignment,
            max_iov: limits.max_iov,
            discard_alignment: limits.discard_alignment,
            zero_alignment: limits.zero_alignment,
            reserved: 0,
            length,
            max_transfer: limits.max_transfer,
            opt_transfer: limits.opt_transfer,
            max_discard: limits.max_discard,
            max_zero: limits.max_zero,
        });
        Ok(0)
    })
}

/// Gives the node other options; those that are not named stay. [graph]
///
/// Errors: as bds_change_commit. Nothing has changed then.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_reopen(node: bds_node, options: Text) -> i32 {
    entry("bds_node_reopen", || {
        let object = find(node, "node")?;
        let (node, options) = (object.node()?, option_text::parse(options, "options")?);
        bds_io::block_on(object.context.graph.reopen(&node, options))?;
        Ok(0)
    })
}

/// Hands the image over to another process (`active` 0), or takes it back (1). [graph]
///
/// Inactive: everything is written out, locks are given up, nothing is written. Active: what
/// another process may have changed is read anew. Works on the node and what lies below it.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT (not 0 or 1), BDS_ERR_STATE;
/// BDS_ERR_IN_USE: an active node lies above; BDS_ERR_INACTIVE: a user has permission to write;
/// errnos of the driver. All is as active as before.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_set_active(node: bds_node, active: i32) -> i32 {
    entry("bds_node_set_active", || {
        let object = find(node, "node")?;
        let node = object.node()?;
        let graph = &object.context.graph;
        match active {
            0 => bds_io::block_on(graph.inactivate(&node))?,
            1 => bds_io::block_on(graph.activate(&node))?,
            _ => return Err(Failure::argument("active is neither 0 nor 1")),
        }
        Ok(0)
    })
}

/// The first write that ends beyond `bytes` emits BDS_EVENT_WRITE_THRESHOLD; 0: none does. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_set_write_threshold(node: bds_node, bytes: u64) -> i32 {
    entry("bds_node_set_write_threshold", || {
        find(node, "node")?.with(|node| node.set_write_threshold(Some(bytes)))?;
        Ok(0)
    })
}

/// Gives the node up, because requests inside it never end: drains and closes do not wait for
/// them, new requests fail. [any]
///
/// Memory of stuck requests stays theirs: their completions do not come until the device answers.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_poison(node: bds_node) -> i32 {
    entry("bds_node_poison", || {
        NODES.find(node.raw)?.with(NodeRef::poison)?;
        Ok(0)
    })
}

/// A new handle for a child: `name` is "file", "backing", …; NULL: the next node down the chain
/// (the backing or filtered child). [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_STATE;
/// BDS_ERR_NOT_FOUND: no such child.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_graph_child(parent: bds_node, name: Text, out: Out<bds_node>) -> i32 {
    entry("bds_graph_child", || {
        let out = out.check("out")?;
        let object = find(parent, "parent")?;
        let parent = object.node()?;
        let child = match name.optional("name")? {
            Some(name) => walk::child(&parent, name).map(|(child, _)| child),
            None => walk::next_below(&parent),
        };
        let child = child.ok_or_else(|| Failure::new(BDS_ERR_NOT_FOUND, "no such child"))?;
        give(&object.context, child, out)
    })
}

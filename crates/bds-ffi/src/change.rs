//! Graph changes: edits that are collected in a builder and take effect together.
//!
//! The builder keeps no node: it notes ids, and looks them up when it is committed. So it never is
//! one of the holders that a removal would wait for.

use std::ffi::c_char;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::Options;
use bds_core::graph::{BitmapOptions, Change, ChangeReport, NodeId, NodeRef};
use serde_json::json;

use crate::abi::bds_status::{BDS_ERR_STATE, BDS_OK, BDS_STILL_REFERENCED};
use crate::abi::{bds_backend, bds_change, bds_context, bds_node, bds_section};
use crate::backend::{self, BackendShared};
use crate::context::{self, Context, check_same, close_json};
use crate::entry::entry;
use crate::failure::Failure;
use crate::node::{self, NODES};
use crate::option_text;
use crate::ptr::{self, Out, Text};
use crate::section::{self, Section};
use crate::table::{Object, Removed, Table};

static CHANGES: Table<ChangeObject> = Table::new(7);

struct ChangeObject {
    context: Arc<Context>,
    edits: Mutex<Vec<Edit>>,
}

impl Object for ChangeObject {}

impl ChangeObject {
    fn lock(&self) -> MutexGuard<'_, Vec<Edit>> {
        self.edits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One edit, as C described it.
#[derive(Clone)]
pub(crate) enum Edit {
    Append(NodeId, NodeId),
    Replace(NodeId, NodeId),
    ReplaceChild(NodeId, String, NodeId),
    InsertFilter(NodeId, NodeId),
    DropFilter(NodeId),
    SetBacking(NodeId, Option<NodeId>),
    /// The handle, whose reference the change takes.
    Remove(bds_node),
    Reopen(NodeId, Options),
    Rename(NodeId, String),
    Own(NodeId),
    Disown(NodeId),
    Insert(Arc<BackendShared>, NodeId),
    Eject(Arc<BackendShared>),
    Within(bds_section),
    Bitmap(NodeId, BitmapEdit),
}

/// One edit of a node's bitmaps.
#[derive(Clone)]
pub(crate) enum BitmapEdit {
    Add(BitmapOptions),
    Remove(String),
    Clear(String),
    Enable(String),
    Disable(String),
    Merge(String, NodeId, String),
}

/// Makes an empty change. [any]
///
/// Add edits with the functions below, then call bds_change_commit. Release the handle with
/// bds_change_unref; a change that is released without a commit has done nothing. It keeps none of
/// the nodes it names: they must live when it is committed.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_create(context: bds_context, out: Out<bds_change>) -> i32 {
    entry("bds_change_create", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let object = ChangeObject { context, edits: Mutex::new(Vec::new()) };
        out.set(bds_change { raw: CHANGES.insert(object)? });
        Ok(0)
    })
}

/// Adds an edit that `make` makes out of the change's context.
pub(crate) fn add(
    change: bds_change,
    make: impl FnOnce(&Arc<Context>) -> Result<Edit, Failure>,
) -> Result<i32, Failure> {
    let object = CHANGES.get(change.raw).map_err(|failure| failure.of("change"))?;
    let edit = make(&object.context)?;
    object.lock().push(edit);
    Ok(0)
}

/// The id of a node of this context.
pub(crate) fn id_of(context: &Arc<Context>, node: bds_node, what: &str) -> Result<NodeId, Failure> {
    let object = node::find(node, what)?;
    check_same(context, &object.context)?;
    // Refuses a closed one.
    object.name()?;
    Ok(object.id())
}

/// All users of `top` use `overlay` from then on, and `overlay` is backed by `top`. [any]
///
/// `overlay` was opened on `top`, or without a backing node. This is a live snapshot.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_STATE; BDS_ERR_ARGUMENT: another context.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_append(change: bds_change, top: bds_node, overlay: bds_node) -> i32 {
    entry("bds_change_append", || {
        add(change, |c| Ok(Edit::Append(id_of(c, top, "top")?, id_of(c, overlay, "overlay")?)))
    })
}

/// All users of `from` use `to` from then on, except those at or below `to`, and jobs. [any]
///
/// Errors: as bds_change_append.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_replace(change: bds_change, from: bds_node, to: bds_node) -> i32 {
    entry("bds_change_replace", || {
        add(change, |c| Ok(Edit::Replace(id_of(c, from, "from")?, id_of(c, to, "to")?)))
    })
}

/// The child `child` ("file", "backing") of `parent` is `to` from then on. [any]
///
/// Errors: as bds_change_append; BDS_ERR_UTF8.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_replace_child(
    change: bds_change,
    parent: bds_node,
    child: Text,
    to: bds_node,
) -> i32 {
    entry("bds_change_replace_child", || {
        let child = child.str("child")?.to_owned();
        add(change, |c| {
            Ok(Edit::ReplaceChild(id_of(c, parent, "parent")?, child, id_of(c, to, "to")?))
        })
    })
}

/// `filter`, which was opened on `node`, takes over all other users of `node`. [any]
///
/// Errors: as bds_change_append.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_insert_filter(
    change: bds_change,
    node: bds_node,
    filter: bds_node,
) -> i32 {
    entry("bds_change_insert_filter", || {
        add(change, |c| {
            Ok(Edit::InsertFilter(id_of(c, node, "node")?, id_of(c, filter, "filter")?))
        })
    })
}

/// All users of `filter` use the node it filters from then on. [any]
///
/// The filter itself lives until its last reference goes; with bds_change_remove in the same change
/// it goes at once.
///
/// Errors: as bds_change_append.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_drop_filter(change: bds_change, filter: bds_node) -> i32 {
    entry("bds_change_drop_filter", || {
        add(change, |c| Ok(Edit::DropFilter(id_of(c, filter, "filter")?)))
    })
}

/// `node` gets another backing node; a handle of 0: none. [any]
///
/// Errors: as bds_change_append.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_set_backing(
    change: bds_change,
    node: bds_node,
    backing: bds_node,
) -> i32 {
    entry("bds_change_set_backing", || {
        add(change, |c| {
            let backing = match backing.raw {
                0 => None,
                _ => Some(id_of(c, backing, "backing")?),
            };
            Ok(Edit::SetBacking(id_of(c, node, "node")?, backing))
        })
    })
}

/// Removes a node: it is closed with the change. [any]
///
/// `node` must be its only reference, apart from the monitor's list, users that the change takes
/// away, and edges of filters. When the change succeeds, the handle names a closed node and still
/// has to be released; when it fails, the handle is what it was.
///
/// Errors: as bds_change_append.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_remove(change: bds_change, node: bds_node) -> i32 {
    entry("bds_change_remove", || {
        add(change, |c| {
            id_of(c, node, "node")?;
            Ok(Edit::Remove(node))
        })
    })
}

/// `node` gets other options; those that are not named stay. [any]
///
/// Errors: as bds_change_append; BDS_ERR_JSON, BDS_ERR_OPTION.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_reopen(change: bds_change, node: bds_node, options: Text) -> i32 {
    entry("bds_change_reopen", || {
        let options = option_text::parse(options, "options")?;
        add(change, |c| Ok(Edit::Reopen(id_of(c, node, "node")?, options)))
    })
}

/// `node` gets another name. Nodes may swap names in one change. [any]
///
/// Errors: as bds_change_append; BDS_ERR_UTF8.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_rename(change: bds_change, node: bds_node, name: Text) -> i32 {
    entry("bds_change_rename", || {
        let name = name.str("name")?.to_owned();
        add(change, |c| Ok(Edit::Rename(id_of(c, node, "node")?, name)))
    })
}

/// The monitor's list holds `node` from then on: its name keeps it open. [any]
///
/// Errors: as bds_change_append.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_own(change: bds_change, node: bds_node) -> i32 {
    entry("bds_change_own", || add(change, |c| Ok(Edit::Own(id_of(c, node, "node")?))))
}

/// The monitor's list does not hold `node` any more. [any]
///
/// Errors: as bds_change_append.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_disown(change: bds_change, node: bds_node) -> i32 {
    entry("bds_change_disown", || add(change, |c| Ok(Edit::Disown(id_of(c, node, "node")?))))
}

/// Inserts `node` as the medium of `backend`, which has none by then. [any]
///
/// The change keeps the backend.
///
/// Errors: as bds_change_append; BDS_ERR_POISONED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_insert(
    change: bds_change,
    backend: bds_backend,
    node: bds_node,
) -> i32 {
    entry("bds_change_insert", || {
        add(change, |c| Ok(Edit::Insert(shared(c, backend)?, id_of(c, node, "node")?)))
    })
}

/// Takes the medium of `backend` out, if it has one. [any]
///
/// The change keeps the backend.
///
/// Errors: as bds_change_insert.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_eject(change: bds_change, backend: bds_backend) -> i32 {
    entry("bds_change_eject", || add(change, |c| Ok(Edit::Eject(shared(c, backend)?))))
}

fn shared(context: &Arc<Context>, backend: bds_backend) -> Result<Arc<BackendShared>, Failure> {
    let object = backend::find(backend, "backend")?;
    check_same(context, &object.shared.context)?;
    Ok(Arc::clone(&object.shared))
}

/// The change is made inside this drained section, and may reach nodes that it has drained. [any]
///
/// The section must not have ended when the change is committed.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND; BDS_ERR_ARGUMENT: another context, or a backend's section.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_within(change: bds_change, section: bds_section) -> i32 {
    entry("bds_change_within", || {
        add(change, |c| {
            let object = section::find(section)?;
            check_same(c, &object.context)?;
            match object.section {
                Section::Nodes(_) => Ok(Edit::Within(section)),
                Section::Backend(_) => Err(Failure::argument("the section is a backend's")),
            }
        })
    })
}

/// Makes all edits together, or none. [graph]
///
/// Waits for requests inside the nodes concerned; new ones wait meanwhile. Then the change is
/// empty and can be used again. `report_json_out` may be NULL; otherwise it gets how long requests
/// had to wait ("held-ns") and what was closed, to be freed with bds_free.
///
/// Errors: nothing has changed, and the edits are kept. BDS_ERR_OPTION: an edit is impossible (a
/// loop, no filter); BDS_ERR_IN_USE: a permission conflict, a frozen edge, a blocker, a node with
/// other holders; BDS_ERR_READ_ONLY, BDS_ERR_INACTIVE: a user would write where that is not
/// possible; BDS_ERR_UNSUPPORTED: a driver cannot do it while it is open; BDS_ERR_EXISTS: a name is
/// taken; BDS_ERR_NOT_FOUND, BDS_ERR_STALE: a node or section has ended; BDS_ERR_STATE;
/// BDS_ERR_CANCELLED: the context was shut down; errnos of drivers.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_commit(change: bds_change, report_json_out: Out<*mut c_char>) -> i32 {
    entry("bds_change_commit", || {
        let out = report_json_out.check_optional("report_json_out")?;
        let object = CHANGES.get(change.raw).map_err(|failure| failure.of("change"))?;
        let report = {
            // One commit of a change at a time; adding to it waits as well.
            let mut edits = object.lock();
            let report = commit(&object.context, &edits)?;
            edits.clear();
            report
        };
        // Backends that the edits kept may have ended, and with them nodes.
        object.context.reap_later();
        if let Some(out) = out {
            let closed: Vec<_> = report.closed.iter().map(close_json).collect();
            let held_ns = u64::try_from(report.held.as_nanos()).unwrap_or(u64::MAX);
            let json = json!({"held-ns": held_ns, "closed": closed});
            out.set(ptr::give_text(&json.to_string())?);
        }
        match report.closed.iter().flat_map(|report| report.errors()).next() {
            Some(error) => {
                context_log(&object.context, error);
                Ok(0)
            }
            None => Ok(0),
        }
    })
}

/// A closing that failed is not a failure of the change, which has taken effect.
fn context_log(context: &Context, error: &bds_core::Error) {
    context.log().error("change", &error.to_string());
}

fn commit(context: &Arc<Context>, edits: &[Edit]) -> Result<ChangeReport, Failure> {
    let mut removals = Removals { context, taken: Vec::new() };
    let mut change = context.graph.change();
    for edit in edits {
        change = apply(context, change, edit, &mut removals)?;
    }
    let report = bds_io::block_on(change.commit())?;
    removals.taken.clear();
    Ok(report)
}

fn apply(
    context: &Arc<Context>,
    change: Change,
    edit: &Edit,
    removals: &mut Removals<'_>,
) -> Result<Change, Failure> {
    let node = |id: &NodeId| Ok::<NodeRef, Failure>(context.graph.acquire(*id)?);
    Ok(match edit {
        Edit::Append(top, overlay) => change.append(&node(top)?, &node(overlay)?),
        Edit::Replace(from, to) => change.replace(&node(from)?, &node(to)?),
        Edit::ReplaceChild(parent, name, to) => {
            change.replace_child(&node(parent)?, name, &node(to)?)
        }
        Edit::InsertFilter(below, filter) => change.insert_filter(&node(below)?, &node(filter)?),
        Edit::DropFilter(filter) => change.drop_filter(&node(filter)?),
        Edit::SetBacking(above, backing) => {
            let backing = backing.as_ref().map(node).transpose()?;
            change.set_backing(&node(above)?, backing.as_ref())
        }
        Edit::Remove(handle) => change.remove(removals.take(*handle)?),
        Edit::Reopen(id, options) => change.reopen(&node(id)?, options.clone()),
        Edit::Rename(id, name) => change.rename(&node(id)?, name),
        Edit::Own(id) => change.own(&node(id)?),
        Edit::Disown(id) => change.disown(&node(id)?),
        Edit::Insert(backend, id) => change.insert(&backend.backend, &node(id)?),
        Edit::Eject(backend) => change.eject(&backend.backend),
        Edit::Bitmap(id, edit) => {
            let target = node(id)?;
            match edit {
                BitmapEdit::Add(options) => change.add_bitmap(&target, options.clone()),
                BitmapEdit::Remove(name) => change.remove_bitmap(&target, name),
                BitmapEdit::Clear(name) => change.clear_bitmap(&target, name),
                BitmapEdit::Enable(name) => change.enable_bitmap(&target, name),
                BitmapEdit::Disable(name) => change.disable_bitmap(&target, name),
                BitmapEdit::Merge(name, from, source) => {
                    change.merge_bitmaps(&target, name, &[(&node(from)?, source)])
                }
            }
        }
        Edit::Within(section) => match &section::find(*section)?.section {
            Section::Nodes(drained) => change.within(drained),
            Section::Backend(_) => return Err(Failure::argument("the section is a backend's")),
        },
    })
}

/// Handles whose references a change takes. A change that fails drops them, so each node is held
/// meanwhile by the monitor's list, which does not stand in the way of a removal.
struct Removals<'a> {
    context: &'a Arc<Context>,
    /// The handle, the node, and whether the list held the node already.
    taken: Vec<(bds_node, NodeId, bool)>,
}

impl Removals<'_> {
    fn take(&mut self, handle: bds_node) -> Result<NodeRef, Failure> {
        let object = node::find(handle, "node to remove")?;
        let node = object.take()?;
        let graph = &self.context.graph;
        let was_owned = graph.is_owned(node.id());
        if !was_owned && let Err(error) = graph.own(node.clone()) {
            object.put_back(node);
            return Err(error.into());
        }
        self.taken.push((handle, node.id(), was_owned));
        Ok(node)
    }
}

impl Drop for Removals<'_> {
    /// Gives the references back, in whatever way the change failed.
    fn drop(&mut self) {
        let graph = &self.context.graph;
        for (handle, id, was_owned) in self.taken.drain(..) {
            let Ok(node) = graph.acquire(id) else { continue };
            if !was_owned {
                let disowned = bds_io::block_on(graph.change().disown(&node).commit());
                if let Err(error) = disowned {
                    context_log(self.context, &error);
                }
            }
            match NODES.find(handle.raw) {
                Ok(object) => object.put_back(node),
                Err(_) => drop(node),
            }
        }
    }
}

/// Releases a handle. [any]
///
/// BDS_STILL_REFERENCED: it is just being committed.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_unref(change: bds_change) -> i32 {
    entry("bds_change_unref", || match CHANGES.remove(change.raw)? {
        Removed::Taken(_) => Ok(BDS_OK as i32),
        Removed::InUse => Ok(BDS_STILL_REFERENCED as i32),
    })
}

/// Drops all edits. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND; BDS_ERR_STATE: it is just being committed.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_clear(change: bds_change) -> i32 {
    entry("bds_change_clear", || {
        let object = CHANGES.get(change.raw).map_err(|failure| failure.of("change"))?;
        let Ok(mut edits) = object.edits.try_lock() else {
            return Err(Failure::new(BDS_ERR_STATE, "the change is being committed"));
        };
        edits.clear();
        Ok(0)
    })
}

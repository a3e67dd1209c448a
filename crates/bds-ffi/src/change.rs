//! Graph changes: edits that are collected in a builder and take effect together.
//!
//! The builder keeps no node: it notes ids, and looks them up when it is committed. So it never is
//! one of the holders that a removal would wait for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::Options;
use bds_core::graph::{BitmapOptions, NodeId, Perm};

use crate::abi::bds_status::{BDS_ERR_STATE, BDS_OK, BDS_STILL_REFERENCED};
use crate::abi::{bds_backend, bds_change, bds_context, bds_guard, bds_node, bds_section};
use crate::backend::{self, BackendShared};
use crate::context::{self, Context, check_same};
use crate::entry::entry;
use crate::failure::Failure;
use crate::guard;
use crate::node;
use crate::option_text;
use crate::ptr::{Out, Text};
use crate::section::{self, Section};
use crate::table::{Object, Removed, Table};

pub(crate) static CHANGES: Table<ChangeObject> = Table::new(7);

pub(crate) struct ChangeObject {
    pub(crate) context: Arc<Context>,
    edits: Mutex<Vec<Edit>>,
}

impl Object for ChangeObject {}

impl ChangeObject {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Edit>> {
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
    Thaw(bds_guard),
    SetPermissions(Arc<BackendShared>, Perm, Perm),
    StoreBitmaps(NodeId),
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

/// The edits that follow may move links which this guard keeps frozen. [any]
///
/// For the holder of the guard, who ends what the chain was frozen for: until bds_guard_unref the
/// links stay frozen where they lead then. The guard must not have ended when the change is
/// committed.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND; BDS_ERR_ARGUMENT: another context, or the guard is not that
/// of a frozen chain.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_thaw(change: bds_change, guard: bds_guard) -> i32 {
    entry("bds_change_thaw", || {
        add(change, |c| {
            let object = guard::find(guard)?;
            check_same(c, &object.context)?;
            object.frozen()?;
            Ok(Edit::Thaw(guard))
        })
    })
}

/// Changes the permissions of `backend`, as bds_backend_set_permissions. [any]
///
/// The change keeps the backend.
///
/// Errors: as bds_change_insert; BDS_ERR_VERSION: an unknown permission.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_set_permissions(
    change: bds_change,
    backend: bds_backend,
    uses: u64,
    shares: u64,
) -> i32 {
    entry("bds_change_set_permissions", || {
        let (uses, shares) = (backend::permissions(uses)?, backend::permissions(shares)?);
        add(change, |c| Ok(Edit::SetPermissions(shared(c, backend)?, uses, shares)))
    })
}

/// Stores the persistent bitmaps of `node` in its image, as they are when the change takes effect,
/// its other edits not counted. [any]
///
/// They are stored anyway when the node is closed, handed over or becomes read-only; a crash before
/// that makes bitmaps inconsistent that recorded something.
///
/// Errors: as bds_change_append.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_change_store_bitmaps(change: bds_change, node: bds_node) -> i32 {
    entry("bds_change_store_bitmaps", || {
        add(change, |c| Ok(Edit::StoreBitmaps(id_of(c, node, "node")?)))
    })
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

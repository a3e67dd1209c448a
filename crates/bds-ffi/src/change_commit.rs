//! Makes a graph change out of the edits that C collected.

use std::ffi::c_char;
use std::sync::Arc;

use bds_core::graph::{Change, ChangeReport, CloseReport, NodeId, NodeRef};
use serde_json::{Value, json};

use crate::abi::{bds_change, bds_node};
use crate::change::{BitmapEdit, CHANGES, ChangeObject, Edit};
use crate::context::{Context, check_same, close_json};
use crate::entry::entry;
use crate::failure::Failure;
use crate::guard;
use crate::node::{self, NODES};
use crate::ptr::{self, Out};
use crate::section::{self, Section};
use crate::table::Ref;

/// Makes all edits together, or none. [graph]
///
/// Waits for requests inside the nodes concerned; new ones wait meanwhile. Then the change is
/// empty and can be used again. `report_json_out` may be NULL; otherwise it gets how long requests
/// had to wait ("held-ns"), what was closed, why copies of removed bitmaps are still in their
/// images ("stored-bitmaps-left"), why edits of bitmaps are not in the write-intent log
/// ("bitmaps-not-logged"), and why images that got an overlay could not be flushed ("not-flushed";
/// the next flush tries again), to be freed with bds_free.
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
            let report = commit(&object.context, &edits, |change| change)?;
            edits.clear();
            report
        };
        finish(&object.context, &report);
        if let Some(out) = out {
            out.set(ptr::give_text(&report_json(&report).to_string())?);
        }
        Ok(0)
    })
}

/// What is left to do after a change: closings in the background, and those that failed.
fn finish(context: &Arc<Context>, report: &ChangeReport) {
    // Backends that the edits kept may have ended, and with them nodes.
    context.reap_later();
    for error in report.closed.iter().flat_map(CloseReport::errors) {
        context_log(context, error);
    }
}

fn report_json(report: &ChangeReport) -> Value {
    let texts = |errors: &[bds_core::Error]| -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    };
    json!({
        "held-ns": u64::try_from(report.held.as_nanos()).unwrap_or(u64::MAX),
        "closed": report.closed.iter().map(close_json).collect::<Vec<_>>(),
        "stored-bitmaps-left": texts(&report.stored_bitmaps_left),
        "bitmaps-not-logged": texts(&report.bitmaps_not_logged),
        "not-flushed": texts(&report.not_flushed),
    })
}

/// A closing that failed is not a failure of the change, which has taken effect.
fn context_log(context: &Context, error: &bds_core::Error) {
    context.log().error("change", &error.to_string());
}

/// Makes what `more` adds and the edits, in one change.
fn commit(
    context: &Arc<Context>,
    edits: &[Edit],
    more: impl FnOnce(Change) -> Change,
) -> Result<ChangeReport, Failure> {
    let mut removals = Removals { context, taken: Vec::new() };
    // First `more`: filters of jobs were opened on nodes that the edits may give other users.
    let mut change = more(context.graph.change());
    for edit in edits {
        change = apply(context, change, edit, &mut removals)?;
    }
    let report = bds_io::block_on(change.commit())?;
    removals.taken.clear();
    Ok(report)
}

/// A change that begins jobs: its edits are made in the moment in which they begin.
pub(crate) struct Beginning(Option<Ref<ChangeObject>>);

impl Beginning {
    /// Without edits of C's.
    pub(crate) fn none() -> Self {
        Self(None)
    }

    pub(crate) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// Of this change, or of none (0).
    pub(crate) fn find(context: &Arc<Context>, change: bds_change) -> Result<Self, Failure> {
        if change.raw == 0 {
            return Ok(Self::none());
        }
        let object = CHANGES.get(change.raw).map_err(|failure| failure.of("change"))?;
        check_same(context, &object.context)?;
        Ok(Self(Some(object)))
    }

    /// Makes the change with what `more` adds. On success it is empty and can be used again.
    pub(crate) fn commit(
        &self,
        context: &Arc<Context>,
        more: impl FnOnce(Change) -> Change,
    ) -> Result<(), Failure> {
        let report = match &self.0 {
            None => commit(context, &[], more)?,
            Some(object) => {
                let mut edits = object.lock();
                let report = commit(context, &edits, more)?;
                edits.clear();
                report
            }
        };
        finish(context, &report);
        Ok(())
    }
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
        Edit::Thaw(guard) => change.thaw(guard::find(*guard)?.frozen()?),
        Edit::SetPermissions(backend, uses, shares) => {
            backend.backend.stage_access(change, *uses, *shares)
        }
        Edit::StoreBitmaps(id) => change.store_bitmaps(&node(id)?),
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

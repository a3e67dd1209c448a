//! Guards: frozen chains, blocked operations, copy-on-read. Each holds until its handle is
//! released.

use std::ffi::c_char;
use std::sync::Arc;

use bds_core::graph::{BlockOps, Blocker, Frozen};
use bds_core::request::CopyOnReadGuard;
use serde_json::{Map, Value, json};

use crate::abi::bds_status::{BDS_OK, BDS_STILL_REFERENCED};
use crate::abi::{BDS_BLOCK_ALL, bds_guard, bds_node};
use crate::context::{Context, check_flags, check_same};
use crate::entry::entry;
use crate::failure::Failure;
use crate::node::{self, NODES};
use crate::ptr::{self, Checked, Out, Text};
use crate::table::{Object, Ref, Removed, Table};

static GUARDS: Table<GuardObject> = Table::new(12);

/// A guard, and its context, which must outlive it.
pub(crate) struct GuardObject {
    /// `None` only while it is dropped.
    guard: Option<Guard>,
    pub(crate) context: Arc<Context>,
}

enum Guard {
    Frozen(Frozen),
    /// Only kept.
    Blocker(#[expect(dead_code, reason = "its drop ends the block")] Blocker),
    /// Only kept.
    CopyOnRead(#[expect(dead_code, reason = "its drop ends copy-on-read")] CopyOnReadGuard),
}

impl Object for GuardObject {}

impl GuardObject {
    /// The frozen chain.
    pub(crate) fn frozen(&self) -> Result<&Frozen, Failure> {
        match &self.guard {
            Some(Guard::Frozen(frozen)) => Ok(frozen),
            _ => Err(Failure::argument("the guard is not that of a frozen chain")),
        }
    }
}

impl Drop for GuardObject {
    fn drop(&mut self) {
        drop(self.guard.take());
        // Copy-on-read may have been the node's last user.
        self.context.reap_later();
    }
}

pub(crate) fn find(guard: bds_guard) -> Result<Ref<GuardObject>, Failure> {
    GUARDS.get(guard.raw).map_err(|failure| failure.of("guard"))
}

fn give(guard: Guard, context: &Arc<Context>, out: Checked<bds_guard>) -> Result<i32, Failure> {
    let object = GuardObject { guard: Some(guard), context: Arc::clone(context) };
    out.set(bds_guard { raw: GUARDS.insert(object)? });
    Ok(BDS_OK as i32)
}

/// Keeps the links from `top` down to `base` (backing and filtered children) where they are: no
/// change moves them until bds_guard_unref. All of them, or none. [any]
///
/// `holder` is named in the errors of changes that meet a frozen link: "the exporter". A change
/// that ends what the chain was frozen for moves them with bds_change_thaw. The guard keeps no
/// node open.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_STATE;
/// BDS_ERR_OPTION: `base` does not lie below `top`; BDS_ERR_IN_USE: a link is frozen already, the
/// message says by whom.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_graph_freeze_chain(
    top: bds_node,
    base: bds_node,
    holder: Text,
    out: Out<bds_guard>,
) -> i32 {
    entry("bds_graph_freeze_chain", || {
        let out = out.check("out")?;
        let holder = holder.str("holder")?;
        let (above, below) = (node::find(top, "top")?, node::find(base, "base")?);
        check_same(&above.context, &below.context)?;
        let (top, base) = (above.node()?, below.node()?);
        let frozen = above.context.graph.freeze_chain(&top, &base, holder)?;
        give(Guard::Frozen(frozen), &above.context, out)
    })
}

/// Blocks operations on a node until bds_guard_unref. [any]
///
/// `operations`: `BDS_BLOCK_` flags, at least one. `reason` is what the next user reads: "a copy
/// is being made". Several guards may block the same operation. The guard keeps no node open, and
/// is no hindrance to requests.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT (also for no operation), BDS_ERR_VERSION
/// (an unknown one), BDS_ERR_UTF8, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_block(
    node: bds_node,
    operations: u32,
    reason: Text,
    out: Out<bds_guard>,
) -> i32 {
    entry("bds_node_block", || {
        let out = out.check("out")?;
        let reason = reason.str("reason")?;
        check_flags(operations, BDS_BLOCK_ALL)?;
        let object = node::find(node, "node")?;
        if operations == 0 {
            return Err(Failure::argument("there is no operation to block"));
        }
        let operations = BlockOps::from_bits_truncate(operations);
        let blocker = object.node()?.block(operations, reason);
        give(Guard::Blocker(blocker), &object.context, out)
    })
}

/// Lets reads of a node copy what they got from below into it, until bds_guard_unref. [any]
///
/// What is copied is durable before the image points at it. Guards add up. The guard keeps the
/// node open. (A filter node, driver "copy-on-read", does the same for its users alone.)
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_STATE; BDS_ERR_READ_ONLY,
/// BDS_ERR_INACTIVE: the node cannot be written; BDS_ERR_IN_USE: a user does not share writing.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_copy_on_read(node: bds_node, out: Out<bds_guard>) -> i32 {
    entry("bds_node_copy_on_read", || {
        let out = out.check("out")?;
        let object = node::find(node, "node")?;
        let guard = object.node()?.enable_copy_on_read()?;
        give(Guard::CopyOnRead(guard), &object.context, out)
    })
}

/// The operations that are blocked on a node, each with its reasons, as JSON:
/// `{"resize": ["a copy is being made"]}`. Free it with bds_free. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_STATE.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_node_blockers(node: bds_node, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_node_blockers", || {
        let out = json_out.check("json_out")?;
        let object = NODES.find(node.raw)?;
        let node = object.node()?;
        let mut blocked = Map::new();
        for operation in BlockOps::all().iter() {
            let reasons = node.blocked(operation);
            if !reasons.is_empty() {
                let reasons = reasons.iter().map(|reason| json!(**reason)).collect();
                blocked.insert(operation.to_string(), Value::Array(reasons));
            }
        }
        out.set(ptr::give_text(&Value::Object(blocked).to_string())?);
        Ok(0)
    })
}

/// Ends what the guard holds, and releases its handle. [any]
///
/// BDS_STILL_REFERENCED: a change that is just being made uses the guard, and ends it.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_guard_unref(guard: bds_guard) -> i32 {
    entry("bds_guard_unref", || match GUARDS.remove(guard.raw)? {
        Removed::Taken(_) => Ok(BDS_OK as i32),
        Removed::InUse => Ok(BDS_STILL_REFERENCED as i32),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi;

    #[test]
    fn numbers_of_operations_are_those_of_the_graph() {
        let names = [
            (abi::BDS_BLOCK_BACKUP_SOURCE, BlockOps::BACKUP_SOURCE),
            (abi::BDS_BLOCK_BACKUP_TARGET, BlockOps::BACKUP_TARGET),
            (abi::BDS_BLOCK_COMMIT_SOURCE, BlockOps::COMMIT_SOURCE),
            (abi::BDS_BLOCK_COMMIT_TARGET, BlockOps::COMMIT_TARGET),
            (abi::BDS_BLOCK_DELETE, BlockOps::DELETE),
            (abi::BDS_BLOCK_EJECT, BlockOps::EJECT),
            (abi::BDS_BLOCK_EXTERNAL_SNAPSHOT, BlockOps::EXTERNAL_SNAPSHOT),
            (abi::BDS_BLOCK_INTERNAL_SNAPSHOT, BlockOps::INTERNAL_SNAPSHOT),
            (abi::BDS_BLOCK_MIRROR_SOURCE, BlockOps::MIRROR_SOURCE),
            (abi::BDS_BLOCK_MIRROR_TARGET, BlockOps::MIRROR_TARGET),
            (abi::BDS_BLOCK_RESIZE, BlockOps::RESIZE),
            (abi::BDS_BLOCK_STREAM, BlockOps::STREAM),
            (abi::BDS_BLOCK_REPLACE, BlockOps::REPLACE),
            (abi::BDS_BLOCK_ALL, BlockOps::all()),
        ];
        for (number, operation) in names {
            assert_eq!(number, operation.bits(), "{operation}");
        }
    }
}

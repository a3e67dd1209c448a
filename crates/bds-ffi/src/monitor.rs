//! The monitor's list: nodes and backends that stay because of their names, as QEMU's blockdev-add
//! keeps them.

use std::ffi::c_char;

use bds_core::graph::Release;

use crate::abi::bds_status::{BDS_OK, BDS_STILL_REFERENCED};
use crate::abi::{bds_backend, bds_context};
use crate::backend;
use crate::context::{self, close_json};
use crate::entry::entry;
use crate::option_text;
use crate::ptr::{self, Out, Text};

/// Opens a node that the monitor's list holds: QEMU's blockdev-add. [io]
///
/// `options`: as of bds_node_open, with a "node-name". No handle is needed to keep it open:
/// bds_node_find makes one, bds_monitor_del closes it. `id_out` may be NULL; it gets the node's id.
/// bds_change_own and bds_change_disown put nodes that are open on the list, and take them off.
///
/// Errors: as bds_node_open; BDS_ERR_OPTION also for a missing "node-name". Nothing remains open.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_monitor_add(context: bds_context, options: Text, id_out: Out<u64>) -> i32 {
    entry("bds_monitor_add", || {
        let out = id_out.check_optional("id_out")?;
        let context = context::find(context)?;
        let options = option_text::parse(options, "options")?;
        let id = bds_io::block_on(context.graph.add(options))?;
        if let Some(out) = out {
            out.set(id.to_u64());
        }
        Ok(0)
    })
}

/// Closes a node that the monitor's list holds: QEMU's blockdev-del. [graph]
///
/// `report_json_out` may be NULL; it is written if the node was closed, also when a flush failed,
/// and then has to be freed.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_NOT_FOUND;
/// BDS_ERR_OPTION: the list does not hold it; BDS_ERR_IN_USE names other holders (handles too), or
/// says why deleting is blocked. Nothing has changed in these cases. Otherwise the node is closed,
/// and the error, as -EIO or -ENOSPC, says that data written earlier may be lost.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_monitor_del(
    context: bds_context,
    name: Text,
    report_json_out: Out<*mut c_char>,
) -> i32 {
    entry("bds_monitor_del", || {
        let out = report_json_out.check_optional("report_json_out")?;
        let context = context::find(context)?;
        let report = bds_io::block_on(context.graph.del(name.str("name")?))?;
        if let Some(out) = out {
            out.set(ptr::give_text(&close_json(&report).to_string())?);
        }
        report.into_result()?;
        Ok(0)
    })
}

/// Lets the monitor's list hold a backend that claims its name: it stays without a handle. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_POISONED; BDS_ERR_EXISTS: it is on the list;
/// BDS_ERR_OPTION: it claims no name (BDS_BACKEND_CLAIM_NAME).
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_monitor_add_backend(backend: bds_backend) -> i32 {
    entry("bds_monitor_add_backend", || {
        let object = backend::find(backend, "backend")?;
        object.shared.context.graph.own_backend(object.backend().clone())?;
        Ok(0)
    })
}

/// Takes a backend off the monitor's list. [any]
///
/// BDS_OK: nothing else held it, so it has ended and released its medium. BDS_STILL_REFERENCED:
/// handles hold it, and its name.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_NOT_FOUND;
/// BDS_ERR_OPTION: it is not on the list; BDS_ERR_IN_USE: a device is attached, which is named, or
/// deleting is blocked on its medium.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_monitor_del_backend(context: bds_context, name: Text) -> i32 {
    entry("bds_monitor_del_backend", || {
        let context = context::find(context)?;
        let release = context.graph.del_backend(name.str("name")?)?;
        context.reap_later();
        Ok(match release {
            Release::Last => BDS_OK as i32,
            Release::NotLast => BDS_STILL_REFERENCED as i32,
        })
    })
}

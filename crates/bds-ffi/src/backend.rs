//! Backends: the users of nodes, with media, devices, permissions and error policies.

use std::ffi::c_char;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::graph::{NodeRef, Perm};
use bds_core::request::{Backend, BackendOptions, Device, ErrorPolicies, ErrorPolicy};
use serde_json::{Value, json};

use crate::abi::bds_status::{
    BDS_ERR_NOT_FOUND, BDS_ERR_STATE, BDS_ERR_VERSION, BDS_OK, BDS_STILL_REFERENCED,
};
use crate::abi::{
    BDS_BACKEND_CLAIM_NAME, BDS_BACKEND_WRITABLE, BDS_ON_ERROR_ENOSPC, BDS_ON_ERROR_IGNORE,
    BDS_ON_ERROR_REPORT, BDS_ON_ERROR_STOP, BDS_PERM_ALL, bds_backend, bds_backend_options,
    bds_context, bds_node,
};
use crate::context::{self, Context, check_flags, check_same};
use crate::entry::entry;
use crate::failure::Failure;
use crate::fault;
use crate::node;
use crate::ptr::{self, Checked, In, Out, Text, backend_name};
use crate::table::{Object, Ref, Removed, Table};

static BACKENDS: Table<BackendObject> = Table::new(5);

/// One backend, shared by its handles, its requests in flight, and changes that name it.
pub(crate) struct BackendShared {
    /// Dropped before `_reap`: it may be the last user of a node.
    pub(crate) backend: Backend,
    pub(crate) context: Arc<Context>,
    _reap: ReapOnDrop,
}

struct ReapOnDrop(Arc<Context>);

impl Drop for ReapOnDrop {
    fn drop(&mut self) {
        fault::point("drop");
        self.0.reap_later();
    }
}

/// C's reference to a backend.
pub(crate) struct BackendObject {
    /// Detached before the backend goes.
    device: Mutex<Option<Device>>,
    pub(crate) shared: Arc<BackendShared>,
}

impl Object for BackendObject {
    fn poison(&self) {
        self.shared.poison();
    }
}

impl BackendShared {
    /// Keeps the medium from being written to after a panic.
    pub(crate) fn poison(&self) {
        if let Some(node) = self.backend.node() {
            node.poison();
        }
    }
}

impl BackendObject {
    fn device(&self) -> MutexGuard<'_, Option<Device>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn backend(&self) -> &Backend {
        &self.shared.backend
    }
}

/// The entry of a backend's handle.
#[inline]
pub(crate) fn find(backend: bds_backend, what: &str) -> Result<Ref<BackendObject>, Failure> {
    BACKENDS.get(backend.raw).map_err(|failure| failure.of(what))
}

fn give(shared: Arc<BackendShared>, out: Checked<bds_backend>) -> Result<i32, Failure> {
    let object = BackendObject { device: Mutex::new(None), shared };
    out.set(bds_backend { raw: BACKENDS.insert(object)? });
    Ok(BDS_OK as i32)
}

fn share(backend: Backend, context: Arc<Context>) -> Arc<BackendShared> {
    Arc::new(BackendShared { backend, _reap: ReapOnDrop(Arc::clone(&context)), context })
}

fn read_options(options: In<bds_backend_options>) -> Result<BackendOptions, Failure> {
    let Some(options) = options.read("options")? else { return Ok(BackendOptions::default()) };
    check_flags(options.flags, BDS_BACKEND_CLAIM_NAME | BDS_BACKEND_WRITABLE)?;
    if options.reserved != 0 {
        return Err(Failure::new(BDS_ERR_VERSION, "a reserved word is not 0"));
    }
    let name = backend_name(&options);
    let name = name.optional("options->name")?.unwrap_or_default().to_owned();
    let (perm, shared) = (options.permissions, options.shared_permissions);
    Ok(BackendOptions {
        name,
        writable: options.flags & BDS_BACKEND_WRITABLE != 0,
        perm: if perm == 0 { None } else { Some(permissions(perm)?) },
        shared: if shared == 0 { Perm::all() } else { permissions(shared)? },
        policy: policies(options.on_read_error, options.on_write_error)?,
        claims_name: options.flags & BDS_BACKEND_CLAIM_NAME != 0,
        ..BackendOptions::default()
    })
}

fn permissions(bits: u64) -> Result<Perm, Failure> {
    if bits & !BDS_PERM_ALL != 0 {
        return Err(Failure::new(BDS_ERR_VERSION, format!("unknown permissions {bits:#x}")));
    }
    Ok(Perm::from_bits_truncate(u32::try_from(bits).expect("only known bits are set")))
}

fn policies(read: u32, write: u32) -> Result<Option<ErrorPolicies>, Failure> {
    let policy = |number| match number {
        BDS_ON_ERROR_REPORT => Ok(ErrorPolicy::Report),
        BDS_ON_ERROR_IGNORE => Ok(ErrorPolicy::Ignore),
        BDS_ON_ERROR_STOP => Ok(ErrorPolicy::Stop),
        BDS_ON_ERROR_ENOSPC => Ok(ErrorPolicy::Enospc),
        _ => Err(Failure::new(BDS_ERR_VERSION, format!("unknown error policy {number}"))),
    };
    match (read, write) {
        (0, 0) => Ok(None),
        (0, _) | (_, 0) => Err(Failure::argument("give both error policies or none")),
        (read, write) => Ok(Some(ErrorPolicies { read: policy(read)?, write: policy(write)? })),
    }
}

/// Makes a backend without a medium: an empty drive. [any]
///
/// `options` may be NULL. Insert a medium with bds_backend_insert; permissions are checked then.
/// Release the handle with bds_backend_unref.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_VERSION, BDS_ERR_UTF8;
/// BDS_ERR_EXISTS, BDS_ERR_OPTION: the name it claims.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_create(
    context: bds_context,
    options: In<bds_backend_options>,
    out: Out<bds_backend>,
) -> i32 {
    entry("bds_backend_create", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let backend = Backend::empty(&context.graph, read_options(options)?)?;
        give(share(backend, context), out)
    })
}

/// Makes a backend of a node: the backend has a reference of its own. [any]
///
/// `options` may be NULL: then it only reads.
///
/// Errors: as bds_backend_create; BDS_ERR_READ_ONLY, BDS_ERR_INACTIVE: it writes and the node
/// cannot be written; BDS_ERR_IN_USE: its permissions conflict with another user's, which the
/// message names; BDS_ERR_STATE: the node is closed.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_create_on(
    node: bds_node,
    options: In<bds_backend_options>,
    out: Out<bds_backend>,
) -> i32 {
    entry("bds_backend_create_on", || {
        let out = out.check("out")?;
        let object = node::find(node, "node")?;
        let backend = Backend::new(&object.node()?, read_options(options)?)?;
        give(share(backend, Arc::clone(&object.context)), out)
    })
}

/// A new handle for the backend that claims this name. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_NOT_FOUND.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_find(context: bds_context, name: Text, out: Out<bds_backend>) -> i32 {
    entry("bds_backend_find", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let backend = context.graph.backend(name.str("name")?)?;
        give(share(backend, context), out)
    })
}

/// Another reference to the backend: a new handle, for another owner. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_POISONED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_ref(backend: bds_backend, out: Out<bds_backend>) -> i32 {
    entry("bds_backend_ref", || {
        let out = out.check("out")?;
        give(Arc::clone(&find(backend, "backend")?.shared), out)
    })
}

/// Releases this reference. A device that was attached through this handle is detached. [any]
///
/// BDS_OK: no handle that was made from this one, no request of a queue and no change uses the
/// backend any more, so it releases its medium, without a flush. BDS_STILL_REFERENCED: one does.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_unref(backend: bds_backend) -> i32 {
    entry("bds_backend_unref", || {
        let Removed::Taken(BackendObject { device, shared }) = BACKENDS.remove(backend.raw)? else {
            return Ok(BDS_STILL_REFERENCED as i32);
        };
        drop(device);
        match Arc::into_inner(shared) {
            Some(_) => Ok(BDS_OK as i32),
            None => Ok(BDS_STILL_REFERENCED as i32),
        }
    })
}

/// Inserts `node` as the medium of a backend that has none. [graph]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_STATE, BDS_ERR_POISONED; BDS_ERR_ARGUMENT: another
/// context; BDS_ERR_IN_USE: there is a medium, or permissions conflict; BDS_ERR_READ_ONLY,
/// BDS_ERR_INACTIVE. Nothing has changed then.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_insert(backend: bds_backend, node: bds_node) -> i32 {
    entry("bds_backend_insert", || {
        let (object, node) = with_node(backend, node)?;
        bds_io::block_on(object.backend().insert(&node))?;
        Ok(0)
    })
}

/// Inserts `node` as the medium, in place of the present one if there is one. [graph]
///
/// Errors: as bds_backend_insert.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_replace_medium(backend: bds_backend, node: bds_node) -> i32 {
    entry("bds_backend_replace_medium", || {
        let (object, node) = with_node(backend, node)?;
        bds_io::block_on(object.backend().replace_medium(&node))?;
        object.shared.context.reap_later();
        Ok(0)
    })
}

fn with_node(
    backend: bds_backend,
    node: bds_node,
) -> Result<(Ref<BackendObject>, NodeRef), Failure> {
    let object = find(backend, "backend")?;
    let node = node::find(node, "node")?;
    check_same(&object.shared.context, &node.context)?;
    let node = node.node()?;
    Ok((object, node))
}

/// Takes the medium out: 1 if there was one, 0 if not. Waits for requests in flight. [graph]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_POISONED; BDS_ERR_IN_USE: ejecting is blocked, or
/// the edge is frozen. Nothing has changed then.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_eject(backend: bds_backend) -> i32 {
    entry("bds_backend_eject", || {
        let object = find(backend, "backend")?;
        let medium = bds_io::block_on(object.backend().eject())?;
        let was_there = medium.is_some();
        drop(medium);
        object.shared.context.reap_later();
        Ok(i32::from(was_there))
    })
}

/// Takes the medium away from its user: QEMU's drive_del. [graph]
///
/// A device stays attached; its requests fail with -ENOMEDIUM, stopped ones too.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_POISONED; BDS_ERR_IN_USE: deleting is blocked, or
/// the edge is frozen.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_revoke(backend: bds_backend) -> i32 {
    entry("bds_backend_revoke", || {
        let object = find(backend, "backend")?;
        bds_io::block_on(object.backend().revoke())?;
        object.shared.context.reap_later();
        Ok(0)
    })
}

/// A new handle for the medium. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_POISONED; BDS_ERR_NOT_FOUND:
/// there is none.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_node(backend: bds_backend, out: Out<bds_node>) -> i32 {
    entry("bds_backend_node", || {
        let out = out.check("out")?;
        let object = find(backend, "backend")?;
        let none = || Failure::new(BDS_ERR_NOT_FOUND, "the backend has no medium");
        node::give(&object.shared.context, object.backend().node().ok_or_else(none)?, out)
    })
}

/// Attaches the one device that uses the backend; `name` names it in events and queries. [any]
///
/// Repeats requests that an error policy stopped. The device is detached by
/// bds_backend_detach_device, and when this handle is released.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_POISONED;
/// BDS_ERR_IN_USE names the device that is attached.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_attach_device(backend: bds_backend, name: Text) -> i32 {
    entry("bds_backend_attach_device", || {
        let name = name.str("name")?;
        let object = find(backend, "backend")?;
        let mut place = object.device();
        *place = Some(object.backend().attach_device(name)?);
        Ok(0)
    })
}

/// Detaches the device that was attached through this handle. [any]
///
/// The backend keeps its medium but drops its permissions; set them for the next user with
/// bds_backend_set_permissions.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_POISONED; BDS_ERR_STATE: none was.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_detach_device(backend: bds_backend) -> i32 {
    entry("bds_backend_detach_device", || {
        let object = find(backend, "backend")?;
        let device = object.device().take();
        let none = || Failure::new(BDS_ERR_STATE, "no device was attached through this handle");
        device.ok_or_else(none)?.detach();
        Ok(0)
    })
}

/// Changes the permissions: `BDS_PERM_` flags, 0 for none. [graph]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_VERSION, BDS_ERR_POISONED; BDS_ERR_IN_USE: they
/// conflict with another user's; BDS_ERR_READ_ONLY, BDS_ERR_INACTIVE. Less cannot fail.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_set_permissions(backend: bds_backend, uses: u64, shares: u64) -> i32 {
    entry("bds_backend_set_permissions", || {
        let (uses, shares) = (permissions(uses)?, permissions(shares)?);
        let object = find(backend, "backend")?;
        bds_io::block_on(object.backend().set_access(uses, shares))?;
        Ok(0)
    })
}

/// Sets what happens when the medium fails: `BDS_ON_ERROR_`, one for reads, one for writes and
/// flushes. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT (0), BDS_ERR_VERSION, BDS_ERR_POISONED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_set_on_error(
    backend: bds_backend,
    on_read_error: u32,
    on_write_error: u32,
) -> i32 {
    entry("bds_backend_set_on_error", || {
        let policies = policies(on_read_error, on_write_error)?
            .ok_or_else(|| Failure::argument("there is no error policy 0"))?;
        find(backend, "backend")?.backend().set_policies(policies);
        Ok(0)
    })
}

/// Repeats the requests that an error policy stopped, and lets later ones go. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_POISONED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_resume(backend: bds_backend) -> i32 {
    entry("bds_backend_resume", || {
        find(backend, "backend")?.backend().resume();
        Ok(0)
    })
}

/// Turns writethrough mode on (1) or off (0): a flush after every write. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT (not 0 or 1), BDS_ERR_POISONED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_set_writethrough(backend: bds_backend, is_on: i32) -> i32 {
    entry("bds_backend_set_writethrough", || {
        let object = find(backend, "backend")?;
        match is_on {
            0 | 1 => object.backend().set_writethrough(is_on == 1),
            _ => return Err(Failure::argument("is_on is neither 0 nor 1")),
        }
        Ok(0)
    })
}

/// The length of the medium in bytes; 0 without one. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_POISONED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_length(backend: bds_backend, bytes_out: Out<u64>) -> i32 {
    entry("bds_backend_length", || {
        let out = bytes_out.check("bytes_out")?;
        out.set(find(backend, "backend")?.backend().len());
        Ok(0)
    })
}

/// Facts about the backend as JSON: name, medium, device, permissions, policies, io-status,
/// requests in flight. Free it with bds_free. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_query(backend: bds_backend, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_backend_query", || {
        let out = json_out.check("json_out")?;
        let object = BACKENDS.find(backend.raw)?;
        out.set(ptr::give_text(&facts(&object).to_string())?);
        Ok(0)
    })
}

fn facts(object: &BackendObject) -> Value {
    let backend = object.backend();
    let medium = backend.node();
    let access = backend.access();
    let policies = backend.policies();
    json!({
        "name": backend.name(),
        "claims-name": backend.claims_name(),
        "node": medium.as_ref().map(|node| node.name()),
        "node-id": medium.as_ref().map(|node| node.id().to_u64()),
        "length": backend.len(),
        "device": backend.device().as_deref(),
        "uses": access.perm.words().collect::<Vec<_>>(),
        "shares": access.shared.words().collect::<Vec<_>>(),
        "on-read-error": policy_name(policies.read),
        "on-write-error": policy_name(policies.write),
        "io-status": backend.io_status().as_str(),
        "writethrough": backend.is_writethrough(),
        "in-flight": backend.in_flight(),
    })
}

fn policy_name(policy: ErrorPolicy) -> &'static str {
    match policy {
        ErrorPolicy::Report => "report",
        ErrorPolicy::Ignore => "ignore",
        ErrorPolicy::Stop => "stop",
        ErrorPolicy::Enospc => "enospc",
        _ => "other",
    }
}

/// Statistics as QEMU's query-blockstats names them. Free it with bds_free. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_backend_stats(backend: bds_backend, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_backend_stats", || {
        let out = json_out.check("json_out")?;
        let object = BACKENDS.find(backend.raw)?;
        out.set(ptr::give_text(&object.backend().stats().to_json().to_string())?);
        Ok(0)
    })
}

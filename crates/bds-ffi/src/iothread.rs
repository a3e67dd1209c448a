//! I/O threads: each runs a Context of bds-io that serves the queues bound to it.

use std::sync::{Arc, mpsc};
use std::thread;

use bds_io::sync::oneshot;
use bds_io::{ContextHandle, ContextOptions};

use crate::abi::bds_status::{BDS_OK, BDS_STILL_REFERENCED};
use crate::abi::{bds_context, bds_iothread};
use crate::context::{self, Context};
use crate::entry::entry;
use crate::failure::Failure;
use crate::fault;
use crate::ptr::{Out, Text};
use crate::table::{Object, Removed, Table};

static IOTHREADS: Table<IothreadObject> = Table::new(9);

/// A thread that ends when its last user is gone.
pub(crate) struct Iothread {
    pub(crate) tasks: ContextHandle,
    pub(crate) context: Arc<Context>,
    /// Dropped with the thread's last user, which ends the thread.
    _stop: oneshot::Sender<()>,
}

struct IothreadObject(Arc<Iothread>);

impl Object for IothreadObject {}

/// The thread of a handle.
pub(crate) fn find(iothread: bds_iothread) -> Result<Arc<Iothread>, Failure> {
    let found = IOTHREADS.get(iothread.raw).map_err(|failure| failure.of("iothread"))?;
    Ok(Arc::clone(&found.0))
}

/// Starts a thread that serves queues. `name` names it in ps and in debuggers. [any]
///
/// It ends when its handle is released and no queue uses it.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8; -EAGAIN, -EMFILE: the
/// process can have no more threads or descriptors.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_iothread_create(
    context: bds_context,
    name: Text,
    out: Out<bds_iothread>,
) -> i32 {
    entry("bds_iothread_create", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let (tasks, stop) = start(name.str("name")?)?;
        let thread = Arc::new(Iothread { tasks, context, _stop: stop });
        out.set(bds_iothread { raw: IOTHREADS.insert(IothreadObject(thread))? });
        Ok(0)
    })
}

fn start(name: &str) -> Result<(ContextHandle, oneshot::Sender<()>), Failure> {
    let (made, thread_made) = mpsc::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let driver = match bds_io::Context::new(ContextOptions::default()) {
            Ok(driver) => driver,
            Err(error) => return drop(made.send(Err(error))),
        };
        drop(made.send(Ok(driver.handle())));
        fault::point("iothread");
        // An error: the sender was dropped, which is the end.
        let _ = driver.block_on(stopped);
    })?;
    let ended = |_| Failure::errno(libc::EAGAIN, "the thread ended at once");
    Ok((thread_made.recv().map_err(ended)??, stop))
}

/// Releases a handle. [any]
///
/// BDS_OK: the thread ends. BDS_STILL_REFERENCED: queues use it, and it ends with the last of them.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_iothread_unref(iothread: bds_iothread) -> i32 {
    entry("bds_iothread_unref", || match IOTHREADS.remove(iothread.raw)? {
        Removed::Taken(IothreadObject(thread)) => Ok(match Arc::into_inner(thread) {
            Some(_) => BDS_OK as i32,
            None => BDS_STILL_REFERENCED as i32,
        }),
        Removed::InUse => Ok(BDS_STILL_REFERENCED as i32),
    })
}

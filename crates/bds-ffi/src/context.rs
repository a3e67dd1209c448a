//! Contexts: a graph with its events, log sink and closings in the background.

use std::ffi::c_char;
use std::sync::{Arc, Once, OnceLock};

use bds_core::ErrorKind;
use bds_core::graph::reference_gate::{SameDirectory, TrustAll};
use bds_core::graph::{CloseReport, Graph, GraphConfig, ShutdownReport};
use bds_jobs::JobManager;
use serde_json::{Value, json};

use crate::abi::bds_status::{
    BDS_ERR_IN_USE, BDS_ERR_STATE, BDS_ERR_VERSION, BDS_OK, BDS_STILL_REFERENCED,
};
use crate::abi::{
    BDS_CONTEXT_PROBE_REFERENCES, BDS_CONTEXT_SAME_DIRECTORY, BDS_CONTEXT_TRUST_REFERENCES,
    BDS_LOG_TRACE, bds_context, bds_context_options,
};
use crate::entry::{self, entry};
use crate::event_source::EventSource;
use crate::failure::Failure;
use crate::log::Log;
use crate::ptr::{self, In, Out};
use crate::table::{Object, Removed, Table};

pub(crate) static CONTEXTS: Table<ContextObject> = Table::new(2);

/// What all objects of one context share.
pub(crate) struct Context {
    pub(crate) graph: Graph,
    pub(crate) events: EventSource,
    /// Made with the first job.
    jobs: OnceLock<JobManager>,
    log: Log,
}

/// C's reference to a context.
pub(crate) struct ContextObject(pub(crate) Arc<Context>);

impl Object for ContextObject {}

impl Drop for Context {
    /// Jobs go on without a handle of their own while the context lives. Once it is gone no one can
    /// finalize, resume or complete them, so one that waits for that would keep its images open for
    /// ever.
    fn drop(&mut self) {
        for job in self.jobs.get().map(JobManager::jobs).into_iter().flatten() {
            // Refused where it has ended.
            let _ended = job.cancel(true);
        }
        self.log.end();
    }
}

impl Context {
    pub(crate) fn new(graph: Graph, log: Log) -> Arc<Self> {
        let events = EventSource::new(&graph);
        Arc::new(Self { graph, events, jobs: OnceLock::new(), log })
    }

    /// The context's jobs.
    pub(crate) fn jobs(&self) -> &JobManager {
        self.jobs.get_or_init(|| {
            let manager = JobManager::new(&self.graph);
            self.events.add_jobs(manager.events());
            manager
        })
    }

    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Closes dead nodes in the background: after a call that may have released the last reference
    /// to one. What fails is logged, and is in the event of the closing.
    pub(crate) fn reap_later(&self) {
        let (graph, log) = (self.graph.clone(), self.log.clone());
        bds_io::spawn(async move { log_closings(&log, &graph.reap().await) }).detach();
    }
}

/// Logs what failed when nodes were closed.
fn log_closings(log: &Log, reports: &[CloseReport]) {
    for report in reports {
        for error in report.errors() {
            log.error("bds_ffi::close", &format!("node '{}': {error}", report.name));
        }
    }
}

/// The context of a handle.
pub(crate) fn find(context: bds_context) -> Result<Arc<Context>, Failure> {
    let found = CONTEXTS.get(context.raw).map_err(|failure| failure.of("context"))?;
    Ok(Arc::clone(&found.0))
}

/// Refuses flags that are not among `known`.
pub(crate) fn check_flags(flags: u32, known: u32) -> Result<(), Failure> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Failure::new(BDS_ERR_VERSION, format!("unknown flags {unknown:#x}"))),
    }
}

/// Refuses objects of two contexts in one call.
pub(crate) fn check_same(one: &Arc<Context>, other: &Arc<Context>) -> Result<(), Failure> {
    match Arc::ptr_eq(one, other) {
        true => Ok(()),
        false => Err(Failure::argument("the handles belong to different contexts")),
    }
}

/// Makes a context: an empty graph. [any]
///
/// `options` may be NULL. Release the handle with bds_context_unref; every object made in the
/// context keeps it alive. The first log sink of the process starts a thread that serves all of
/// them. The first call of the process registers a fork handler: a child that was forked off gets
/// BDS_ERR_FORKED from every function.
///
/// Errors: BDS_ERR_ARGUMENT, BDS_ERR_VERSION; -EAGAIN or -ENOMEM: the process can have no more
/// threads or descriptors.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_context_create(
    options: In<bds_context_options>,
    out: Out<bds_context>,
) -> i32 {
    entry("bds_context_create", || {
        let out = out.check("out")?;
        let options = options.read("options")?;
        let flags = options.map_or(0, |options| options.flags);
        let level = options.map_or(0, |options| options.log_level);
        if level > BDS_LOG_TRACE {
            return Err(Failure::new(BDS_ERR_VERSION, format!("unknown log level {level}")));
        }
        let mut config = GraphConfig::new(Arc::new(bds_drivers::registry()));
        set_gate(&mut config, flags)?;
        bds_io::ensure_context()?;
        mark_forks()?;
        let user_data = options.map_or(0, |options| options.log_user_data);
        let log = Log::new(options.and_then(|options| options.log), user_data, level)?;
        let context = Context::new(Graph::new(config), log);
        out.set(bds_context { raw: CONTEXTS.insert(ContextObject(context))? });
        Ok(0)
    })
}

fn set_gate(config: &mut GraphConfig, flags: u32) -> Result<(), Failure> {
    let known =
        BDS_CONTEXT_SAME_DIRECTORY | BDS_CONTEXT_TRUST_REFERENCES | BDS_CONTEXT_PROBE_REFERENCES;
    check_flags(flags, known)?;
    let may_probe = flags & BDS_CONTEXT_PROBE_REFERENCES != 0;
    match flags & !BDS_CONTEXT_PROBE_REFERENCES {
        0 if !may_probe => Ok(()),
        BDS_CONTEXT_SAME_DIRECTORY if !may_probe => {
            config.gate = Arc::new(SameDirectory);
            Ok(())
        }
        BDS_CONTEXT_TRUST_REFERENCES => {
            config.gate = Arc::new(TrustAll { may_probe });
            Ok(())
        }
        _ => Err(Failure::argument("these flags exclude each other")),
    }
}

/// Registers the fork handler, once in a process.
fn mark_forks() -> Result<(), Failure> {
    static REGISTERED: Once = Once::new();
    let mut is_done = true;
    REGISTERED.call_once(|| is_done = ptr::at_fork(entry::mark_forked));
    if is_done { Ok(()) } else { Err(Failure::errno(libc::ENOMEM, "no fork handler")) }
}

/// Another reference to the context: a new handle. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_context_ref(context: bds_context, out: Out<bds_context>) -> i32 {
    entry("bds_context_ref", || {
        let out = out.check("out")?;
        let context = find(context)?;
        out.set(bds_context { raw: CONTEXTS.insert(ContextObject(context))? });
        Ok(0)
    })
}

/// Releases a handle. [any]
///
/// BDS_OK: nothing holds the context any more; its jobs are cancelled, and its nodes closed, in
/// the background.
/// BDS_STILL_REFERENCED: other handles, or objects of the context, do. Call bds_context_shutdown
/// first to close everything now and to see errors.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_context_unref(context: bds_context) -> i32 {
    entry("bds_context_unref", || match CONTEXTS.remove(context.raw)? {
        Removed::Taken(ContextObject(context)) => Ok(match Arc::into_inner(context) {
            Some(_) => BDS_OK as i32,
            None => BDS_STILL_REFERENCED as i32,
        }),
        Removed::InUse => Ok(BDS_STILL_REFERENCED as i32),
    })
}

/// Ends all use of the context: backends lose their media, nodes are closed. [graph]
///
/// Every handle stays what it is: it still has to be released, and its node cannot be used. No
/// node can be opened afterwards. A second call reports what has become of the rest.
/// `report_json_out` may be NULL; it is written also if the call fails with one of these errors,
/// and then has to be freed.
///
/// Errors: the first error of a closing, as -EIO or -ENOSPC: written data may be lost.
/// BDS_ERR_IN_USE, and nothing else has this code: nodes are still held; the message names their
/// holders. Otherwise the code of what kept a job or a backend from stopping in order ("failed" in
/// the report); BDS_ERR_STATE if that was another user of its nodes.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_context_shutdown(
    context: bds_context,
    report_json_out: Out<*mut c_char>,
) -> i32 {
    entry("bds_context_shutdown", || {
        let out = report_json_out.check_optional("report_json_out")?;
        // Also of a poisoned one: this is how what it holds ends.
        let context = Arc::clone(&CONTEXTS.find(context.raw).map_err(|f| f.of("context"))?.0);
        let report = bds_io::block_on(context.graph.shutdown());
        log_closings(&context.log, &report.closed);
        if let Some(out) = out {
            out.set(ptr::give_text(&shutdown_json(&report).to_string())?);
        }
        finish_shutdown(report)
    })
}

fn finish_shutdown(report: ShutdownReport) -> Result<i32, Failure> {
    let closing = report.closed.iter().flat_map(CloseReport::errors).map(|e| e.duplicate()).next();
    if let Some(error) = closing {
        return Err(error.into());
    }
    report.check_leaks().map_err(|error| Failure::new(BDS_ERR_IN_USE, error.to_string()))?;
    match report.failed.first() {
        // That code says that nodes are held.
        Some((user, error)) if error.kind() == ErrorKind::InUse => {
            Err(Failure::new(BDS_ERR_STATE, error.to_string()).of(user))
        }
        Some((user, error)) => Err(Failure::from(error.duplicate()).of(user)),
        None => Ok(0),
    }
}

fn shutdown_json(report: &ShutdownReport) -> Value {
    let holders = |leak: &bds_core::graph::Leak| -> Vec<String> {
        leak.holders.iter().map(|h| format!("{} '{}'", h.kind, h.name)).collect()
    };
    let leaked: Vec<Value> = report
        .leaked
        .iter()
        .map(|leak| json!({"node": leak.name, "count": leak.count, "holders": holders(leak)}))
        .collect();
    let failed =
        report.failed.iter().map(|(user, e)| json!({"user": user, "error": e.to_string()}));
    json!({
        "closed": report.closed.iter().map(close_json).collect::<Vec<_>>(),
        "failed": failed.collect::<Vec<_>>(),
        "leaked": leaked,
    })
}

/// The report of a closed node.
pub(crate) fn close_json(report: &CloseReport) -> Value {
    let words = |error: &Option<bds_core::Error>| error.as_ref().map(ToString::to_string);
    json!({
        "node": report.name,
        "driver": report.driver,
        "flush-error": words(&report.flush_error),
        "close-error": words(&report.close_error),
        "below": report.below.iter().map(close_json).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use bds_core::Error;

    use super::*;
    use crate::abi::bds_status::BDS_ERR_CANCELLED;
    use crate::failure;

    /// A job that could not take out its filter, because others use the node, leaves no node held.
    #[test]
    fn in_use_is_the_code_of_held_nodes_alone() {
        for (kind, expected) in
            [(ErrorKind::InUse, BDS_ERR_STATE), (ErrorKind::Cancelled, BDS_ERR_CANCELLED)]
        {
            let failed = vec![("block jobs".to_owned(), Error::new(kind, "its filter stays"))];
            let report = ShutdownReport { failed, closed: Vec::new(), leaked: Vec::new() };
            let failure = finish_shutdown(report).unwrap_err();
            assert_eq!(failure::record("bds_context_shutdown", failure), expected as i32);
        }
    }
}

//! Functions for the events of a context.

use std::ffi::c_char;

use bds_core::event::Event;
use bds_jobs::JobEvent;

use crate::abi::bds_event_type::{
    self, BDS_EVENT_DEVICE_ATTACHED, BDS_EVENT_DEVICE_DETACHED, BDS_EVENT_GRAPH_CHANGED,
    BDS_EVENT_IO_ERROR, BDS_EVENT_JOB_ERROR, BDS_EVENT_JOB_FINISHED, BDS_EVENT_JOB_PENDING,
    BDS_EVENT_JOB_READY, BDS_EVENT_JOB_STATUS, BDS_EVENT_LOST, BDS_EVENT_MEDIUM_EJECTED,
    BDS_EVENT_MEDIUM_INSERTED, BDS_EVENT_MEDIUM_REPLACED, BDS_EVENT_NODE_CLOSED,
    BDS_EVENT_NODE_OPENED, BDS_EVENT_OTHER, BDS_EVENT_SHUTDOWN, BDS_EVENT_WRITE_THRESHOLD,
};
use crate::abi::bds_status::BDS_ERR_CANCELLED;
use crate::abi::{bds_context, bds_event};
use crate::context;
use crate::entry::entry;
use crate::event_source::Happened;
use crate::ptr::{self, Out};

/// A descriptor that is readable while events wait: for poll, epoll and event loops. [any]
///
/// It belongs to the context: do not read, write or close it; dup it if it must outlive the
/// context. Fetch events with bds_context_next_event until that returns 0.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND; -EMFILE.
#[unsafe(no_mangle)]
pub extern "C" fn bds_context_event_fd(context: bds_context) -> i32 {
    entry("bds_context_event_fd", || context::find(context)?.events.descriptor())
}

/// Fetches the next event: 1, or 0 if there is none now. [any]
///
/// `json_out` may be NULL; otherwise it gets `{"event": …, "data": {…}}` with QEMU's names, to be
/// freed with bds_free. Both are written only for an event. Events that are not fetched are lost
/// after some hundred, and then BDS_EVENT_LOST says how many.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[unsafe(no_mangle)]
pub extern "C" fn bds_context_next_event(
    context: bds_context,
    event_out: Out<bds_event>,
    json_out: Out<*mut c_char>,
) -> i32 {
    entry("bds_context_next_event", || {
        let out = event_out.check("event_out")?;
        let json = json_out.check_optional("json_out")?;
        let context = context::find(context)?;
        let Some((sequence, event)) = context.events.next() else { return Ok(0) };
        if let Some(json) = json {
            let text = match &event {
                Happened::Graph(event) => event.to_json(),
                Happened::Job(event) => event.to_json(),
            };
            json.set(ptr::give_text(&text.to_string())?);
        }
        let (kind, value, status) = match &event {
            Happened::Graph(event) => facts(event),
            Happened::Job(event) => job_facts(event),
        };
        out.set(bds_event { sequence, value, r#type: kind as u32, status, reserved: [0; 5] });
        Ok(1)
    })
}

fn facts(event: &Event) -> (bds_event_type, u64, i32) {
    match event {
        Event::BlockIoError { nospace, .. } => {
            (BDS_EVENT_IO_ERROR, 0, if *nospace { -libc::ENOSPC } else { -libc::EIO })
        }
        Event::WriteThreshold { amount_exceeded, .. } => {
            (BDS_EVENT_WRITE_THRESHOLD, *amount_exceeded, 0)
        }
        Event::MediumInserted { .. } => (BDS_EVENT_MEDIUM_INSERTED, 0, 0),
        Event::MediumEjected { .. } => (BDS_EVENT_MEDIUM_EJECTED, 0, 0),
        Event::MediumReplaced { .. } => (BDS_EVENT_MEDIUM_REPLACED, 0, 0),
        Event::DeviceAttached { .. } => (BDS_EVENT_DEVICE_ATTACHED, 0, 0),
        Event::DeviceDetached { .. } => (BDS_EVENT_DEVICE_DETACHED, 0, 0),
        Event::NodeOpened { .. } => (BDS_EVENT_NODE_OPENED, 0, 0),
        Event::NodeClosed { flush_error, close_error, .. } => {
            let has_failed = flush_error.is_some() || close_error.is_some();
            (BDS_EVENT_NODE_CLOSED, 0, if has_failed { -libc::EIO } else { 0 })
        }
        Event::GraphChanged { epoch } => (BDS_EVENT_GRAPH_CHANGED, *epoch, 0),
        Event::GraphShutdown => (BDS_EVENT_SHUTDOWN, 0, 0),
        Event::EventsLost { count } => (BDS_EVENT_LOST, *count, 0),
        _ => (BDS_EVENT_OTHER, 0, 0),
    }
}

fn job_facts(event: &JobEvent) -> (bds_event_type, u64, i32) {
    match event {
        JobEvent::StatusChange { .. } => (BDS_EVENT_JOB_STATUS, 0, 0),
        JobEvent::Ready(_) => (BDS_EVENT_JOB_READY, 0, 0),
        JobEvent::Pending { .. } => (BDS_EVENT_JOB_PENDING, 0, 0),
        JobEvent::Error { errno, offset, .. } => (BDS_EVENT_JOB_ERROR, *offset, -errno),
        JobEvent::Cancelled(_) => (BDS_EVENT_JOB_FINISHED, 0, BDS_ERR_CANCELLED as i32),
        JobEvent::Completed { error, .. } => {
            (BDS_EVENT_JOB_FINISHED, 0, if error.is_some() { -libc::EIO } else { 0 })
        }
        JobEvent::EventsLost { count } => (BDS_EVENT_LOST, *count, 0),
        _ => (BDS_EVENT_OTHER, 0, 0),
    }
}

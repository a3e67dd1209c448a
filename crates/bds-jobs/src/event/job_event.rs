//! Events of jobs: changes of state, readiness, errors and the end, queued per subscriber.
//!
//! Names and fields of [`JobEvent::to_json`] are QAPI's, with more fields where QEMU leaves out
//! what a client needs. Events of one job are in the order in which they happened.

use bds_core::copy::Side;
use serde_json::{Value, json};

use crate::kinds::JobType;
use crate::policy::{JobErrorAction, operation};
use crate::state::JobStatus;

/// What a job has reached, for events that report it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobPoint {
    /// Type of the job.
    pub job_type: JobType,
    /// Its id.
    pub id: String,
    /// Total progress.
    pub len: u64,
    /// Current progress.
    pub offset: u64,
    /// Its speed; 0: no limit.
    pub speed: u64,
}

/// An event of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobEvent {
    /// `JOB_STATUS_CHANGE`: every change of state.
    StatusChange {
        /// Its id.
        id: String,
        /// The new state.
        status: JobStatus,
    },
    /// `BLOCK_JOB_READY`: source and target are in sync.
    Ready(JobPoint),
    /// `BLOCK_JOB_PENDING`: it waits to be finalized.
    Pending {
        /// Type of the job.
        job_type: JobType,
        /// Its id.
        id: String,
    },
    /// `BLOCK_JOB_ERROR`: a request failed.
    Error {
        /// Its id.
        id: String,
        /// The side that failed.
        side: Side,
        /// What the job does.
        action: JobErrorAction,
        /// Offset of the request in bytes.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// The errno, positive.
        errno: i32,
        /// The node.
        node: String,
        /// Attempts at this range so far.
        attempts: u32,
        /// Errors that this event stands for: 1, and those that were not reported before.
        count: u64,
    },
    /// `BLOCK_JOB_CANCELLED`: it ends because it was cancelled.
    Cancelled(JobPoint),
    /// `BLOCK_JOB_COMPLETED`: it ends by itself.
    Completed {
        /// What it reached.
        point: JobPoint,
        /// Why it failed; `None`: it succeeded.
        error: Option<String>,
    },
    /// `BLOCK_JOB_RECORD`: what a job does with its record.
    Record {
        /// Its id.
        id: String,
        /// The record's file.
        path: String,
        /// What it does.
        what: RecordUse,
        /// Bytes that the record names, or that differ.
        bytes: u64,
    },
    /// The reader was too slow: [`QUEUE_LEN`](crate::QUEUE_LEN) says which events it may lose.
    EventsLost {
        /// How many events were lost here.
        count: u64,
    },
}

/// What a job does with its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordUse {
    /// It begins a new one.
    Begun,
    /// It goes on with one that was there.
    Continued,
    /// It begins anew, although there was one.
    Ignored {
        /// Why.
        why: String,
    },
    /// The target does not hold what the record says: something else has written to it. It is
    /// copied again.
    TargetDiffers {
        /// Where the first difference was found, in bytes.
        offset: u64,
    },
}

impl JobEvent {
    /// The event's name, in QAPI's alphabet.
    pub fn name(&self) -> &'static str {
        match self {
            Self::StatusChange { .. } => "JOB_STATUS_CHANGE",
            Self::Ready(_) => "BLOCK_JOB_READY",
            Self::Pending { .. } => "BLOCK_JOB_PENDING",
            Self::Error { .. } => "BLOCK_JOB_ERROR",
            Self::Cancelled(_) => "BLOCK_JOB_CANCELLED",
            Self::Completed { .. } => "BLOCK_JOB_COMPLETED",
            Self::Record { .. } => "BLOCK_JOB_RECORD",
            Self::EventsLost { .. } => "BLOCK_EVENTS_LOST",
        }
    }

    /// Id of the job.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::StatusChange { id, .. }
            | Self::Pending { id, .. }
            | Self::Error { id, .. }
            | Self::Record { id, .. } => Some(id),
            Self::Ready(point) | Self::Cancelled(point) | Self::Completed { point, .. } => {
                Some(&point.id)
            }
            Self::EventsLost { .. } => None,
        }
    }

    /// `{"event": …, "data": {…}}`; the time stamp is added where the event is sent.
    ///
    /// ```
    /// use bds_jobs::{JobEvent, JobStatus};
    ///
    /// let event = JobEvent::StatusChange { id: "job0".into(), status: JobStatus::Running };
    /// assert_eq!(
    ///     event.to_json().to_string(),
    ///     r#"{"event":"JOB_STATUS_CHANGE","data":{"id":"job0","status":"running"}}"#
    /// );
    /// ```
    pub fn to_json(&self) -> Value {
        let data = match self {
            Self::StatusChange { id, status } => json!({"id": id, "status": status}),
            Self::Ready(point) | Self::Cancelled(point) => point.to_json(),
            Self::Pending { job_type, id } => json!({"type": job_type, "id": id}),
            Self::Error { id, side, action, offset, len, errno, node, attempts, count } => json!({
                "device": id,
                "operation": operation(*side),
                "action": action,
                "offset": offset,
                "length": len,
                "errno": errno,
                "node-name": node,
                "attempts": attempts,
                "count": count,
            }),
            Self::Completed { point, error } => {
                let mut data = point.to_json();
                if let Some(error) = error {
                    data["error"] = json!(error);
                }
                data
            }
            Self::Record { id, path, what, bytes } => record_json(id, path, what, *bytes),
            Self::EventsLost { count } => json!({"count": count}),
        };
        json!({"event": self.name(), "data": data})
    }
}

fn record_json(id: &str, path: &str, what: &RecordUse, bytes: u64) -> Value {
    let action = match what {
        RecordUse::Begun => "begun",
        RecordUse::Continued => "continued",
        RecordUse::Ignored { .. } => "ignored",
        RecordUse::TargetDiffers { .. } => "target-differs",
    };
    let mut data = json!({"device": id, "record": path, "action": action, "bytes": bytes});
    match what {
        RecordUse::Ignored { why } => data["reason"] = json!(why),
        RecordUse::TargetDiffers { offset } => data["offset"] = json!(offset),
        RecordUse::Begun | RecordUse::Continued => {}
    }
    data
}

impl JobPoint {
    fn to_json(&self) -> Value {
        json!({
            "type": self.job_type,
            "device": self.id,
            "len": self.len,
            "offset": self.offset,
            "speed": self.speed,
        })
    }
}

//! What queries show of a job, and the records of jobs that were dismissed.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::job::{Job, error_text};
use crate::kinds::JobType;
use crate::policy::IoStatus;
use crate::state::JobStatus;

/// Records of dismissed jobs that are kept.
pub const HISTORY_LEN: usize = 256;

/// A job at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// Its type.
    #[serde(rename = "type")]
    pub job_type: JobType,
    /// Its state.
    pub status: JobStatus,
    /// Current progress.
    pub current_progress: u64,
    /// Total progress.
    pub total_progress: u64,
    /// Its speed in bytes a second; 0: no limit.
    pub speed: u64,
    /// True if it works, or is about to.
    pub busy: bool,
    /// True if it is to stop, or has stopped, at a pause point.
    pub paused: bool,
    /// State of its I/O.
    pub io_status: IoStatus,
    /// True if it takes effect by itself.
    pub auto_finalize: bool,
    /// True if it is forgotten at its end.
    pub auto_dismiss: bool,
    /// Whether a mirror's target has every completed guest write.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub actively_synced: Option<bool>,
    /// Bytes that needed no copy because an earlier job has copied them; only with a record.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub resumed_bytes: Option<u64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// What it could not give back in order. Does not change its result.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cleanup_error: Option<String>,
}

impl JobInfo {
    pub(crate) fn of(job: &Job) -> Self {
        let state = job.lock();
        let status = state.status;
        Self {
            id: job.id().to_owned(),
            job_type: job.facts.job_type,
            status,
            current_progress: job.progress.current(),
            total_progress: job.progress.total(),
            speed: job.speed.get(),
            busy: !status.is_paused() && !status.is_completed() && status != JobStatus::Created,
            paused: state.user_paused || status == JobStatus::Created,
            io_status: state.io_status,
            auto_finalize: job.options.auto_finalize,
            auto_dismiss: job.options.auto_dismiss,
            actively_synced: state.actively_synced,
            resumed_bytes: state.resumed_bytes,
            error: state.error.as_ref().map(error_text),
            cleanup_error: state.cleanup_error.as_ref().map(error_text),
        }
    }

    /// Its entry in `query-jobs`.
    pub fn to_query_jobs(&self) -> Value {
        let mut entry = json!({
            "id": self.id,
            "type": self.job_type,
            "status": self.status,
            "current-progress": self.current_progress,
            "total-progress": self.total_progress,
        });
        self.add_rest(&mut entry);
        entry
    }

    /// Its entry in `query-block-jobs`; `None`: it is not listed there (create, amend).
    pub fn to_query_block_jobs(&self) -> Option<Value> {
        if !self.job_type.is_block_job() {
            return None;
        }
        let mut entry = json!({
            "type": self.job_type,
            "device": self.id,
            "len": self.total_progress,
            "offset": self.current_progress,
            "busy": self.busy,
            "paused": self.paused,
            "speed": self.speed,
            "io-status": self.io_status,
            "ready": self.status.is_ready(),
            "status": self.status,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        });
        if let Some(is_synced) = self.actively_synced {
            entry["actively-synced"] = json!(is_synced);
        }
        self.add_rest(&mut entry);
        Some(entry)
    }

    fn add_rest(&self, entry: &mut Value) {
        if let Some(bytes) = self.resumed_bytes {
            entry["resumed-bytes"] = json!(bytes);
        }
        for (key, error) in [("error", &self.error), ("cleanup-error", &self.cleanup_error)] {
            if let Some(error) = error {
                entry[key] = json!(error);
            }
        }
    }
}

/// Records of dismissed jobs, the last [`HISTORY_LEN`] of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Oldest first.
    pub records: VecDeque<JobInfo>,
    /// How many older records were dropped.
    pub dropped: u64,
}

impl History {
    pub(crate) fn push(&mut self, record: JobInfo) {
        if self.records.len() == HISTORY_LEN {
            self.records.pop_front();
            self.dropped += 1;
        }
        self.records.push_back(record);
    }

    /// The last job of this id.
    pub fn last(&self, id: &str) -> Option<&JobInfo> {
        self.records.iter().rev().find(|record| record.id == id)
    }
}

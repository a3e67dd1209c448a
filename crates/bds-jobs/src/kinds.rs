//! Types of jobs, and commands that only some of them take.

use std::fmt;

use bds_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// Type of a job. Names are QAPI's (`JobType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum JobType {
    /// Copies a layer into the one below.
    Commit,
    /// Copies what is below an image into it.
    Stream,
    /// Copies a disk and keeps the copy equal.
    Mirror,
    /// Copies a disk as it is at the start.
    Backup,
    /// Makes an image.
    Create,
    /// Changes options of an image.
    Amend,
}

impl JobType {
    /// QAPI's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Stream => "stream",
            Self::Mirror => "mirror",
            Self::Backup => "backup",
            Self::Create => "create",
            Self::Amend => "amend",
        }
    }

    /// True for jobs on nodes of the graph, which `query-block-jobs` and the `block-job-…` commands
    /// know, and which have `BLOCK_JOB_…` events.
    pub fn is_block_job(self) -> bool {
        !matches!(self, Self::Create | Self::Amend)
    }
}

impl fmt::Display for JobType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A change of a running job's options (`block-job-change`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobChange {
    /// A mirror's way to copy guest writes.
    MirrorCopyMode(CopyMode),
}

/// When a mirror copies guest writes. Names are QAPI's (`MirrorCopyMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// Later.
    #[default]
    Background,
    /// Before the write is completed.
    WriteBlocking,
}

/// Commands that reach a job while it runs. Called without locks; must not wait.
pub trait JobControl: Send + Sync {
    /// Prepares the completion of a ready job, before
    /// [`JobContext::wait_complete`](crate::JobContext::wait_complete) returns.
    ///
    /// # Errors
    /// The command fails and the job stays ready.
    fn complete(&self) -> Result<()> {
        Ok(())
    }

    /// Changes an option.
    ///
    /// # Errors
    /// The command fails and nothing changes.
    fn change(&self, _change: JobChange) -> Result<()> {
        Err(unchangeable())
    }
}

pub(crate) fn unchangeable() -> Error {
    Error::new(ErrorKind::NotSupported, "Job type does not support change")
}

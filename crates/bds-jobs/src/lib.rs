//! Block jobs: long operations on the graph with a state, verbs, events and groups.
//!
//! A [`JobManager`] owns the jobs of a graph. A job is made by a constructor of its type, which
//! does the set-up and may fail, and started with [`JobManager::start`]; jobs of any types that
//! start as a group take effect together or not at all. The states are drawn in [`JobStatus`]'s
//! file and in `docs/jobs.md`.
//!
//! Files need only what is above them: `state`, `kinds`, `policy`, `progress`, `speed`; `options`,
//! `event`, `errors`; `job`; `context`, `query`; `driver` (the contract), `registry`; `txn`;
//! `handle`, `manager`; the jobs; `checkpoint`.
//!
//! [`manifest`] proves what an image contained at a point in time; [`record`] lets an interrupted
//! copy go on.
//!
//! A job's effect on the graph is one [`Change`](bds_core::graph::Change) of its whole group:
//! planned while everything can still fail, committed in one step that cannot. A job that failed or
//! was cancelled has changed nothing; a job that is *concluded* holds nothing.
#![forbid(unsafe_code)]

pub mod amend;
pub mod backup;
mod beside_users;
mod chain;
mod checkpoint;
mod commit;
mod context;
pub mod create;
mod driver;
mod errors;
mod event;
mod handle;
mod job;
mod kinds;
mod manager;
pub mod manifest;
pub mod mirror;
mod options;
mod policy;
mod progress;
mod query;
pub mod record;
mod registry;
mod speed;
mod state;
mod stream;
mod txn;

pub use bds_core::copy::{ErrorSite, ErrorVerdict, Side};
pub use checkpoint::{Checkpoint, CheckpointReport, WriteHold};
pub use commit::{Commit, CommitOptions};
pub use context::JobContext;
pub use driver::{JobDriver, Outcome};
pub use event::{JobEvent, JobEvents, JobPoint, QUEUE_LEN, RecordUse};
pub use handle::JobHandle;
pub use kinds::{CopyMode, JobChange, JobControl, JobType};
pub use manager::{JobManager, NewJob};
pub use options::{JobOptions, MAX_ID_LEN, speed_from_int};
pub use policy::{IoStatus, JobErrorAction, MAX_FLUSH_ATTEMPTS, OnError, RetryPolicy};
pub use progress::Progress;
pub use query::{HISTORY_LEN, History, JobInfo};
pub use state::{JobStatus, JobVerb};
pub use stream::{Stream, StreamOptions};

/// Runs the README's code as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

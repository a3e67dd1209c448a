//! Records and manifests of copies: a job that was interrupted goes on where it was, and proves in
//! the end what it has copied.
//!
//! ```text
//! copy engine, filters ─► ContentTracker ─► hash of each chunk of 64 KiB that is read
//!                              │ checkpoint: after a flush of the target
//!                              ▼
//!                          record: which chunks of the target hold what       ─► removed at success
//!                          manifest: what the whole target holds              ─► written at success
//! ```
//!
//! A job that finds a record reads its source and copies the chunks whose content is not the one
//! that the record names. So it does not matter what has changed meanwhile: a backup is of the
//! moment at which it goes on. `docs/jobs.md` argues why neither a crash nor a changed target leads
//! to a wrong copy.
//!
//! ```text
//! options  what a user asks for      format   layout of the record, pure
//! chunks   what is known, pure       file     the record's file
//! tracker  sees copies               prepare  opens a record or begins one
//! keeper   checkpoints, reports      plan     checks a manifest's options
//! skip     leaves out clean chunks   seal     writes the manifest
//! ```

mod chunks;
mod file;
pub mod format;
#[doc(hidden)]
pub mod fuzzing;
mod keeper;
mod options;
mod plan;
mod prepare;
mod seal;
mod skip;
mod tracker;

pub use options::{CheckTarget, ManifestOptions, RecordOptions};
pub(crate) use prepare::TrackerOptions;
pub use prepare::{RecordState, look_at_record};
pub(crate) use tracker::ContentTracker;

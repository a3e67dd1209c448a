//! Options of a job that proves its copy, or can go on with it after an interruption.

use std::path::PathBuf;
use std::time::Duration;

use bds_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// What a job that continues believes of the chunks that its record names. Chunks whose source has
/// changed are copied in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckTarget {
    /// Each chunk of the target is read and compared before it is left alone.
    #[default]
    Full,
    /// Some hundred chunks are read, spread over the target, before any is left alone. If one of
    /// them differs, all are read.
    Sample,
    /// The record is right: for targets that nothing else can have written to. Where the record
    /// itself tells that something may have (the target is another file of the same name; a mirror
    /// was completed), each chunk is read all the same.
    None,
}

/// A record of what a copy's target holds, in a file: a job that was interrupted and is started
/// again with the same record copies only what the target does not hold.
#[derive(Clone, Debug)]
pub struct RecordOptions {
    /// The file. Made if it is missing, removed when the job succeeds (see also
    /// [`RecordOptions::keep_at_success`]), kept when it fails, is cancelled, or the process ends.
    pub path: PathBuf,
    /// What is believed of a record that was there already.
    pub check_target: CheckTarget,
    /// Name of a bitmap of the source that records since before the record was begun, and is not
    /// cleared meanwhile: chunks that are clean in it need not be read to be compared.
    pub bitmap: Option<String>,
    /// Bytes that may be copied before the target is flushed and the record brought up to date;
    /// 0: 1/128 of the image, from 4 MiB to 256 MiB.
    pub interval_bytes: u64,
    /// Longest time between two of these moments, if anything was copied.
    pub interval: Duration,
    /// Leave the record when the job succeeds, up to date: for a caller that removes it once what
    /// it does with the copy is durable as well.
    pub keep_at_success: bool,
}

impl RecordOptions {
    /// The usual options, with this file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            check_target: CheckTarget::default(),
            bitmap: None,
            interval_bytes: 0,
            interval: Duration::from_secs(5),
            keep_at_success: false,
        }
    }
}

/// A manifest of the copy, written when the job has succeeded: a hash of each chunk of what was
/// read from the source, taken while it was copied. `Manifest::verify` proves the target against
/// it.
#[derive(Clone, Debug)]
pub struct ManifestOptions {
    /// The file. A manifest that has this name is replaced; any other file is left alone.
    pub path: PathBuf,
    /// The manifest of what the target holds before the copy (of the backup before an increment):
    /// gives the hashes of chunks that are not copied, and becomes the parent.
    pub base: Option<PathBuf>,
    /// Free text.
    pub note: String,
}

impl ManifestOptions {
    /// A manifest in this file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), base: None, note: String::new() }
    }
}

/// # Errors
/// `InvalidInput`, always.
pub(super) fn wrong<T>(words: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidInput, words))
}

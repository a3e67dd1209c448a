//! Reports of a driver about its image: `info` and `check`.

use std::ffi::OsString;

/// Facts about an image, as `info` shows them.
#[derive(Clone, Debug, Default)]
pub struct ImageInfo {
    /// Allocation unit in bytes, for formats that have one.
    pub cluster_size: Option<u64>,
    /// True if refcounts may be wrong until repaired.
    pub is_dirty: bool,
    /// True if marked corrupt.
    pub is_corrupt: bool,
    /// True if the payload is encrypted.
    pub is_encrypted: bool,
    /// True if data may be stored compressed (convert -c made it, or the format always does).
    pub is_compressed: bool,
    /// The backing file as stored in the image.
    pub backing_file: Option<OsString>,
    /// Its format as stored.
    pub backing_format: Option<String>,
    /// It has a note of what its backing image showed: see [`super::Driver::mark_base`].
    pub marks_base: bool,
    /// QEMU's `format-specific` object: `{"type": …, "data": {…}}`.
    pub format_specific: Option<serde_json::Value>,
    /// QEMU's `snapshots` array, if there are any.
    pub snapshots: Vec<serde_json::Value>,
    /// Bitmaps in a file beside the image: those of a raw image, and what a crash has left of a
    /// qcow2 image's. Objects with `name`, `granularity`, `flags`, `count` (dirty bytes), and
    /// `recovered-bytes` if a crash has added some.
    pub logged_bitmaps: Vec<serde_json::Value>,
}

/// Findings of `check`. Counts are QEMU's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Errors that lose or will lose data.
    pub corruptions: u64,
    /// Space that nothing refers to.
    pub leaks: u64,
    /// Errors (I/O) because of which the check is incomplete.
    pub check_errors: u64,
    /// Clusters of the guest in all.
    pub total_clusters: u64,
    /// Of these, allocated.
    pub allocated_clusters: u64,
    /// Of these, not contiguous with the one before.
    pub fragmented_clusters: u64,
    /// Of these, compressed.
    pub compressed_clusters: u64,
    /// End of the last used byte in the file.
    pub image_end_offset: u64,
    /// Findings, one sentence each, in order; bounded (`messages_dropped` counts the rest).
    pub messages: Vec<String>,
    /// Messages not kept.
    pub messages_dropped: u64,
}

impl CheckReport {
    /// True if there is no corruption, leak or error.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}

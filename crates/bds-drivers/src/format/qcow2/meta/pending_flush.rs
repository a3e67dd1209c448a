//! Tracks which flushes (of the image file, of the data node) must succeed before certain metadata
//! may be written.

/// Which flushes must succeed before something may be written.
#[derive(Debug, Default)]
pub(crate) struct PendingFlush {
    /// Counts writes of rank Body and Directory, as they begin and as they end.
    meta_written: u64,
    /// `meta_written` when the last flush that succeeded began.
    meta_flushed: u64,
    /// Bytes were written that links must not precede, and the data node was not flushed since.
    pub data_flush: bool,
    /// A batch is being written.
    pub is_writing: bool,
}

impl PendingFlush {
    /// Metadata that links depend on is being written, or has been.
    pub(super) fn note_written(&mut self) {
        self.meta_written += 1;
    }

    /// Where the count of writes stands, for [`Self::note_flushed`].
    pub(super) fn written(&self) -> u64 {
        self.meta_written
    }

    /// A flush that began when the count stood at `before` has succeeded.
    pub(super) fn note_flushed(&mut self, before: u64) {
        self.meta_flushed = self.meta_flushed.max(before);
    }

    /// Was anything that links depend on written and not flushed since?
    pub(crate) fn needs_meta_flush(&self) -> bool {
        self.meta_written > self.meta_flushed
    }
}

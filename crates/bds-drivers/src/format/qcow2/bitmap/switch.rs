//! Re-points the header at another bitmap directory, so that a crash at any time leaves the old
//! directory, the new one, or none.
//!
//! ```text
//! the extension is there, in one sector   its 24 bytes are written                  old or new
//! … in two sectors, or not valid          bit cleared; pointer; bit set             old, none, new
//! there is none                           cluster 0 is rewritten (layout/rewrite.rs)  none or new
//! the last bitmap goes                    bit cleared; then the extension goes      old or none
//! ```
//!
//! "Bit" is the autoclear bit without which the extension means nothing. Each step is flushed
//! before the next. The write-back lock is held, as by all that write the header, and what is in
//! the file counts, not what is in memory: an earlier change may have failed half-way.

use std::sync::Arc;

use bds_core::error::Result;

use crate::format::qcow2::file_read::{read_bytes, read_cluster0};
use crate::format::qcow2::layout::cluster0::{Cluster0, Strictness};
use crate::format::qcow2::layout::extension::BitmapsPointer;
use crate::format::qcow2::layout::header::{AUTOCLEAR_AT, Autoclear};
use crate::format::qcow2::layout::rewrite::{self, Write};
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::state::Image;

const SECTOR_LEN: usize = 512;

impl Image {
    /// Makes `new` the directory, durably; `None`: there are no bitmaps any more. What it points at
    /// is durable already.
    ///
    /// # Errors
    /// The file has the old one, the new one, or none.
    pub(super) async fn switch_directory(&self, new: Option<BitmapsPointer>) -> Result<()> {
        let _lock = self.write_back_lock.lock().await;
        self.bitmaps.set_header_uncertain(true);
        let old = read_cluster0(self.file.port(), Strictness::Use).await?;
        let bytes = read_bytes(self.file.port(), 0, self.geometry().cluster_len()).await?;
        let list_at = usize::try_from(old.header.header_len).expect("inside a cluster");
        let is_valid = old.header.autoclear.contains(Autoclear::BITMAPS);
        match (new, BitmapsPointer::find(&bytes, list_at)) {
            (None, _) => {
                if is_valid {
                    self.write_bitmaps_bit(&old, false).await?;
                }
                self.remove_extension(&bytes, old).await;
            }
            (Some(new), Some(at)) => {
                let data = new.encode();
                let is_one_sector = at / SECTOR_LEN == (at + data.len() - 1) / SECTOR_LEN;
                let is_atomic = is_valid && is_one_sector;
                if is_valid && !is_atomic {
                    self.write_bitmaps_bit(&old, false).await?;
                }
                self.write_header(at, data.to_vec()).await?;
                if !is_atomic {
                    self.write_bitmaps_bit(&old, true).await?;
                }
            }
            (Some(pointer), None) => {
                let mut new = old.clone();
                new.extensions.bitmaps = Some(pointer);
                new.header.autoclear |= Autoclear::BITMAPS;
                self.rewrite_header(&bytes, &old, &new).await?;
                self.meta().header.autoclear |= Autoclear::BITMAPS;
            }
        }
        // What is in memory of the other fields may be newer.
        let mut known = Cluster0::clone(&self.cluster0.load());
        known.extensions.bitmaps = new;
        self.cluster0.store(Arc::new(known));
        self.bitmaps.set_header_uncertain(false);
        Ok(())
    }

    /// Removes the extension, whose bit is clear. It does no harm if it stays.
    async fn remove_extension(&self, bytes: &[u8], old: Cluster0) {
        let mut bytes = bytes.to_vec();
        let mut old = old;
        old.header.autoclear -= Autoclear::BITMAPS;
        let at = usize::try_from(AUTOCLEAR_AT).expect("in the header");
        bytes[at..at + 8].copy_from_slice(&old.header.autoclear.bits().to_be_bytes());
        let mut new = old.clone();
        new.extensions.bitmaps = None;
        if let Err(error) = self.rewrite_header(&bytes, &old, &new).await {
            tracing::debug!(node = self.node_name, %error, "qcow2: the bitmaps extension stays");
        }
    }

    pub(super) async fn rewrite_header(
        &self,
        bytes: &[u8],
        old: &Cluster0,
        new: &Cluster0,
    ) -> Result<()> {
        let planned = rewrite::plan(bytes, old, new)
            .map_err(|e| self.name_file(e).context("cannot enter the bitmaps in the header"))?;
        for Write { offset, bytes } in planned {
            self.write_header(offset, bytes).await?;
        }
        Ok(())
    }

    /// Sets or clears the bit, in the file and in memory. In memory it is never set when it may be
    /// clear in the file.
    async fn write_bitmaps_bit(&self, old: &Cluster0, is_valid: bool) -> Result<()> {
        let mut bits = old.header.autoclear;
        bits.set(Autoclear::BITMAPS, is_valid);
        self.meta().header.autoclear -= Autoclear::BITMAPS;
        let at = usize::try_from(AUTOCLEAR_AT).expect("in the header");
        self.write_header(at, bits.bits().to_be_bytes().to_vec()).await?;
        self.meta().header.autoclear.set(Autoclear::BITMAPS, is_valid);
        Ok(())
    }

    pub(super) async fn write_header(&self, at: usize, bytes: Vec<u8>) -> Result<()> {
        self.write_file(MetaOffset(at as u64), bytes).await?;
        self.flush_meta().await
    }
}

//! Rewrites name and format of the backing file in cluster 0.
//!
//! The header in the file is the truth: it is read, changed and written back while the write-back
//! lock is held, which all other writers of the header hold too. The writes and their order are
//! planned in `layout/rewrite.rs`: after a power cut the image records the old backing file or the
//! new one. Nothing else in the metadata depends on the record, so it has no rank of its own; that
//! it does not get ahead of data is the request path's part, which flushes the node first.

use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use bds_core::driver::BackingRecord;
use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::file_read::{read_bytes, read_cluster0};
use crate::format::qcow2::layout::cluster0::{Cluster0, Strictness};
use crate::format::qcow2::layout::extension::MAX_BACKING_FORMAT_LEN;
use crate::format::qcow2::layout::header::{Autoclear, MAX_BACKING_NAME_LEN};
use crate::format::qcow2::layout::rewrite::{self, Write};
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::state::Image;

impl Image {
    /// See [`bds_core::Driver::set_backing_record`]. Runs in a task of its own.
    pub(crate) async fn set_backing_record(
        self: &Arc<Self>,
        record: Option<BackingRecord>,
    ) -> Result<()> {
        self.check_record(record.as_ref())?;
        // Clears bits that this would otherwise find set while it holds the lock.
        self.prepare_to_write().await?;
        let _lock = self.write_back_lock.lock().await;
        let (new, writes) = self.plan_record(record).await?;
        for Write { offset, bytes } in writes {
            self.write_file(MetaOffset(offset as u64), bytes).await?;
            self.flush_meta().await?;
        }
        self.meta().header.autoclear -= Autoclear::BASE_MARK;
        // What is in memory of the other fields may be newer.
        let mut known = Cluster0::clone(&self.cluster0.load());
        known.header.autoclear -= Autoclear::BASE_MARK;
        known.backing_name = new.backing_name;
        known.extensions = new.extensions;
        self.cluster0.store(Arc::new(known));
        Ok(())
    }

    /// See [`bds_core::Driver::check_backing_record`].
    pub(crate) async fn check_backing_record(&self, record: Option<BackingRecord>) -> Result<()> {
        self.check_record(record.as_ref())?;
        let _lock = self.write_back_lock.lock().await;
        self.plan_record(record).await.map(drop)
    }

    /// The rules that do not depend on space.
    fn check_record(&self, record: Option<&BackingRecord>) -> Result<()> {
        let refuse = |words: &str| {
            Err(self.name_error(Error::new(ErrorKind::InvalidInput, words.to_owned())))
        };
        let Some(BackingRecord { name, format }) = record else { return Ok(()) };
        let name = name.as_encoded_bytes();
        if name.is_empty() || name.contains(&0) {
            return refuse("the backing file's name is empty or holds a NUL byte");
        }
        if name.len() as u64 > u64::from(MAX_BACKING_NAME_LEN) {
            return refuse("the backing file's name is longer than 1023 bytes");
        }
        let is_bad = |format: &String| {
            format.is_empty() || format.len() > MAX_BACKING_FORMAT_LEN || format.contains('\0')
        };
        if format.as_ref().is_some_and(is_bad) {
            return refuse("the backing format must have 1 to 15 bytes, none of them NUL");
        }
        if self.cluster0.load().header.autoclear.contains(Autoclear::RAW_DATA_FILE) {
            return refuse("a raw data file and a backing file exclude each other");
        }
        Ok(())
    }

    /// Cluster 0 with the new record, and the writes that make it so. The write-back lock is held.
    async fn plan_record(&self, record: Option<BackingRecord>) -> Result<(Cluster0, Vec<Write>)> {
        let planned = async {
            let old = read_cluster0(self.file.port(), Strictness::Use).await?;
            let bytes = read_bytes(self.file.port(), 0, self.geometry().cluster_len()).await?;
            let mut new = old.clone();
            let (name, format) = record.map(|record| (record.name, record.format)).unzip();
            new.backing_name = name.map(OsStringExt::into_vec);
            new.extensions.backing_format = format.flatten().map(String::into_bytes);
            // What the new one shows is not known.
            new.header.autoclear -= Autoclear::BASE_MARK;
            let writes = rewrite::plan(&bytes, &old, &new)?;
            Ok((new, writes))
        };
        planned.await.map_err(|error| self.name_file(error))
    }
}

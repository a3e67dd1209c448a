//! Changes options and mode of an open image, inactivates it for another process, and activates it
//! again.
//!
//! Before anything changes, all metadata is written back durably, as by a clean close
//! (`write_back_all_durably`). So a prepared change may be dropped without loss, and the writer
//! continues. An image that becomes writable, or is activated, is read afresh beside what is in
//! memory (`metadata_load.rs`), with all checks of an open; only the commit replaces the old state.
//!
//! Nothing is written in order to become a writer: the file may not be writable yet, and O10 and
//! O13 wait for the first write, as after an open.

use std::sync::Arc;

use bds_core::driver::{Reopen, ReopenContext};
use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::config::{Config, RequestedMode, RequestedOptions};
use crate::format::qcow2::file_read::read_cluster0;
use crate::format::qcow2::layout::cluster0::{Cluster0, Strictness};
use crate::format::qcow2::layout::header::{Autoclear, Incompatible};
use crate::format::qcow2::metadata_load::{LoadedMetadata, WriterOptions};
use crate::format::qcow2::open::check_features;
use crate::format::qcow2::state::Image;
use crate::format::qcow2::task::detach_on_drop;

/// A change that waits for its commit.
struct Prepared<'a> {
    image: &'a Image,
    requested: RequestedMode,
    config: Config,
    /// Read again, where what is in memory does not suffice.
    loaded: Option<LoadedMetadata>,
    is_writable: bool,
}

impl Reopen for Prepared<'_> {
    fn commit(self: Box<Self>) {
        let Self { image, requested, config, loaded, is_writable } = *self;
        *image.requested() = requested;
        image.use_config(config);
        if let Some(loaded) = loaded {
            image.install(loaded);
        }
        image.write_state.set(is_writable, image.write_state.is_active());
    }
}

impl Image {
    /// See [`bds_core::Driver::prepare_reopen`].
    pub(crate) async fn prepare_reopen<'a>(
        self: &'a Arc<Self>,
        context: &mut ReopenContext<'_>,
    ) -> Result<Box<dyn Reopen + 'a>> {
        let flags = context.flags;
        let earlier = self.requested().clone();
        let options = RequestedOptions::take(&mut context.options)?.or(&earlier.options);
        let old = self.config.load_full();
        let cluster0 = self.cluster0.load_full();
        let config = options
            .config_at_reopen(&cluster0, &flags, old.slice_len)
            .map_err(|error| self.name_error(error))?;
        self.check_usable()?;
        let is_writable = self.serves_io && !flags.read_only;
        let is_inspected = flags.info_only || flags.for_check;
        if is_inspected == self.serves_io
            || (!self.serves_io && !flags.read_only && context.current.read_only)
        {
            let words = "an image opened for inspection serves nothing else; open it anew";
            return Err(self.name_error(Error::new(ErrorKind::NotSupported, words)));
        }
        self.tasks.wait_idle().await;
        self.write_back_all_durably().await?;
        // A reader has not loaded what only a writer needs, and it may have changed since the image
        // was last writable.
        let is_known = self.is_writable() && config.overlap == old.overlap;
        let loaded = match is_writable && self.write_state.is_active() && !is_known {
            true => Some(self.reload(&config, true).await?),
            false => None,
        };
        let requested = RequestedMode { options, flags };
        Ok(Box::new(Prepared { image: self, requested, config, loaded, is_writable }))
    }

    /// See [`bds_core::Driver::inactivate`].
    pub(crate) async fn inactivate(self: &Arc<Self>) -> Result<()> {
        self.check_flushable()?;
        self.tasks.wait_idle().await;
        self.write_back_all_durably().await?;
        self.write_state.set(self.write_state.is_writable(), false);
        self.bitmaps.forget();
        Ok(())
    }

    /// See [`bds_core::Driver::activate`].
    pub(crate) async fn activate(self: &Arc<Self>) -> Result<()> {
        if self.write_state.is_active() {
            // What is in memory is newer than the file.
            return Ok(());
        }
        self.check_usable()?;
        self.tasks.wait_idle().await;
        let is_writable = self.write_state.is_writable();
        if self.serves_io {
            let loaded = self.reload(&self.config.load_full(), is_writable).await?;
            let config = self.config_for(loaded.cluster0())?;
            self.use_config(config);
            self.install(loaded);
        }
        self.write_state.set(is_writable, true);
        Ok(())
    }

    /// What the options mean for the header as it is now: its defaults may have changed.
    pub(super) fn config_for(&self, cluster0: &Cluster0) -> Result<Config> {
        let RequestedMode { options, flags } = self.requested().clone();
        let slice_len = self.config.load().slice_len;
        options
            .config_at_reopen(cluster0, &flags, slice_len)
            .map_err(|error| self.name_error(error))
    }

    /// Brings the file into the state in which a clean close leaves it, durably. Runs to completion
    /// even if the caller is dropped.
    pub(super) async fn write_back_all_durably(self: &Arc<Self>) -> Result<()> {
        if !self.is_writable() || !self.serves_io {
            return Ok(());
        }
        let image = Arc::clone(self);
        let task_guard = self.tasks.begin();
        detach_on_drop(async move {
            let written = image.write_back_all_and_flush().await;
            drop(task_guard);
            written.map_err(|error| image.name_error(error))
        })
        .await
    }

    async fn write_back_all_and_flush(self: &Arc<Self>) -> Result<()> {
        self.write_back_all().await?;
        if let Some(data) = &self.data_file {
            data.flush().await?;
        }
        self.file.flush().await
    }

    /// Reads the image as an open does, and checks that it is still the one that was opened.
    async fn reload(&self, config: &Config, writer: bool) -> Result<LoadedMetadata> {
        let read = async {
            let cluster0 = read_cluster0(self.file.port(), Strictness::Use).await?;
            check_features(&cluster0, &self.node_name, false, writer, self.file.len())?;
            self.check_same(&cluster0)?;
            let writer = writer.then(|| self.writer(config));
            LoadedMetadata::read(self.file.port(), cluster0, writer).await
        };
        read.await.map_err(|error| self.name_file(error))
    }

    /// What a writer with these options needs of the metadata.
    pub(crate) fn writer(&self, config: &Config) -> WriterOptions {
        WriterOptions {
            classes: config.overlap,
            invalidate_bitmaps: config.invalidate_bitmaps,
            data_len: self.data_file.as_ref().map(|data| data.len()),
        }
    }

    /// Refuses an image that was replaced by a different one. Its length may change.
    fn check_same(&self, new: &Cluster0) -> Result<()> {
        let old = self.cluster0.load();
        let (was, is) = (&old.header, &new.header);
        let data_file = Incompatible::DATA_FILE;
        let what = if was.version != is.version {
            "version"
        } else if was.geometry != is.geometry {
            "cluster size, refcount width or kind of L2 entries"
        } else if was.compression != is.compression {
            "compression type"
        } else if was.incompatible & data_file != is.incompatible & data_file {
            "external data file"
        } else if is.autoclear.contains(Autoclear::RAW_DATA_FILE) && self.backing.is_some() {
            "data file, which is raw now and excludes a backing node,"
        } else if self.named_backing.is_some()
            && self.named_backing == self.backing.node_name()
            && (&old.backing_name, &old.extensions.backing_format)
                != (&new.backing_name, &new.extensions.backing_format)
        {
            return Err(Error::new(
                ErrorKind::InvalidImage,
                "the image names another backing file than the one that was opened for it: \
                 give the node its new backing node first",
            ));
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::InvalidImage,
            format!("the image's {what} changed while another process had it: open it anew"),
        ))
    }

    pub(super) fn use_config(&self, config: Config) {
        {
            let mut meta = self.meta();
            meta.slices.set_budget(config.l2_cache_bytes);
            meta.counts.set_budget(config.refcount_cache_bytes);
        }
        self.decompressed.set_budget(config.decompressed_cache_bytes);
        self.config.store(Arc::new(config));
    }
}

//! Reads the metadata that an open image keeps in memory: the L1 table; for writers also the
//! refcount table and the set of metadata clusters.
//!
//! It is read as a whole beside what is in memory, and replaces it in one step that cannot fail
//! ([`Image::install`]): at open, when an image becomes writable, and when it is activated again.
//! Nothing is written here.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bds_core::driver::ChildPort;
use bds_core::error::{Error, ErrorKind, Result};

use super::alloc::overlap::{Class, MetadataMap, Refused};
use super::bitmap::directory;
use super::check::truncation::TruncationCheck;
use super::config::Config;
use super::file_read::for_words;
use super::layout::cluster0::Cluster0;
use super::layout::entry::{L1Entry, refblock_place};
use super::layout::header::MAX_L1_LEN;
use super::layout::space::MetaOffset;
use super::manage::snapshot::SnapshotTable;
use super::meta::pending_flush::PendingFlush;
use super::meta::refcounts::Refcounts;
use super::meta::slice_cache::SliceCache;
use super::meta::tables::L1State;
use super::state::{HeaderState, Image, Meta};

/// What a load for a writer depends on.
pub(crate) struct WriterOptions {
    /// Metadata that is protected against overlaps.
    pub classes: Class,
    /// Bitmaps that cannot be read may be lost.
    pub invalidate_bitmaps: bool,
    /// Length of the external data file.
    pub data_len: Option<u64>,
}

/// The metadata read from an image; see the module docs.
pub(crate) struct LoadedMetadata {
    cluster0: Cluster0,
    /// Entries that are not zero, by number.
    l1: Vec<(u32, L1Entry)>,
    /// The refcount table, up to its last block. Empty for readers.
    reftable: Vec<u64>,
    metadata: MetadataMap,
    file_len: u64,
}

impl LoadedMetadata {
    /// Reads the metadata. For a writer also what only it needs, and refuses an image that must not
    /// be written.
    pub(crate) async fn read(
        file: &dyn ChildPort,
        cluster0: Cluster0,
        writer: Option<WriterOptions>,
    ) -> Result<Self> {
        let header = &cluster0.header;
        let mut l1 = Vec::new();
        for_words(file, header.l1_offset, header.l1_len(), |index, word| {
            if word != 0 {
                let index = u32::try_from(index).expect("at most 2^22 entries");
                l1.push((index, L1Entry(word)));
            }
            Ok(())
        })
        .await?;
        let mut reftable = Vec::new();
        let metadata = MetadataMap::new(&header.geometry);
        if let Some(WriterOptions { classes, invalidate_bitmaps, data_len }) = writer {
            for_words(file, header.reftable_offset, header.reftable_len(), |_, word| {
                reftable.push(word);
                Ok(())
            })
            .await?;
            // Slots behind the last block are free for growth, not blocks.
            let used = reftable.iter().rposition(|slot| *slot != 0).map_or(0, |last| last + 1);
            reftable.truncate(used);
            let builder = MapBuilder { file, cluster0: &cluster0, map: &metadata, classes };
            TruncationCheck { file, cluster0: &cluster0, data_len }.run(&l1, &reftable).await?;
            builder.constant()?;
            builder.blocks(&reftable)?;
            builder.l2(&l1)?;
            builder.snapshots().await?;
            directory::check_writable(file, &cluster0, invalidate_bitmaps).await?;
        }
        Ok(Self { cluster0, l1, reftable, metadata, file_len: file.len() })
    }

    pub(crate) fn cluster0(&self) -> &Cluster0 {
        &self.cluster0
    }
}

impl Meta {
    /// Nothing changed yet. `reftable` is empty for readers, and while an image is being opened.
    pub(crate) fn new(
        cluster0: &Cluster0,
        config: &Config,
        reftable: Vec<u64>,
        file_len: u64,
    ) -> Self {
        let header = &cluster0.header;
        let geometry = header.geometry;
        Self {
            l1: L1State::new(MetaOffset(header.l1_offset), header.l1_size),
            slices: SliceCache::new(config.slice_len, config.l2_cache_bytes),
            counts: Refcounts::new(
                geometry,
                reftable,
                MetaOffset(header.reftable_offset),
                u64::from(header.reftable_clusters),
                config.refcount_cache_bytes,
            ),
            pending_flush: PendingFlush::default(),
            header: HeaderState {
                incompatible: header.incompatible,
                autoclear: header.autoclear,
                is_dirty_marked: false,
            },
            frees: Vec::new(),
            frees_written: Vec::new(),
            frees_durable: Vec::new(),
            in_flight: Vec::new(),
            loads: std::collections::HashMap::new(),
            write_back_task: None,
            write_back_error: None,
            zero_from: geometry.cluster_ceil(file_len).unwrap_or(u64::MAX),
            compressed_at: 0,
            new_size: None,
            cleaned_at_s: 0,
        }
    }
}

impl Image {
    /// Replaces all metadata in memory by `loaded`. No request is in flight, no task is running,
    /// and nothing is waiting to be written.
    pub(crate) fn install(&self, loaded: LoadedMetadata) {
        let LoadedMetadata { cluster0, l1, reftable, metadata, file_len } = loaded;
        let mut meta = self.meta();
        debug_assert!(meta.in_flight.is_empty() && meta.loads.is_empty());
        self.tables.clear();
        for (table, entry) in l1 {
            self.tables.set_l1(table, entry);
        }
        self.metadata.adopt(&metadata);
        self.decompressed.clear();
        self.forget_sparseness();
        self.data_end.store(0, Ordering::Relaxed);
        *meta = Meta::new(&cluster0, &self.config.load(), reftable, file_len);
        self.set_disk_len(cluster0.header.size);
        self.cluster0.store(Arc::new(cluster0));
    }
}

/// Fills the set of metadata clusters, for the classes whose overlaps are checked.
struct MapBuilder<'a> {
    file: &'a dyn ChildPort,
    cluster0: &'a Cluster0,
    map: &'a MetadataMap,
    classes: Class,
}

impl MapBuilder<'_> {
    fn insert(&self, class: Class, offset: u64, len: u64) -> Result<()> {
        if !self.classes.contains(class) {
            return Ok(());
        }
        let geometry = self.cluster0.header.geometry;
        let bits = geometry.cluster_bits();
        for i in 0..geometry.clusters(len) {
            self.map.insert(MetaOffset(offset + (i << bits))).map_err(|refused| {
                let words = match refused {
                    Refused::Taken => {
                        "two of the image's tables share a cluster: open it read-only, or repair it with a check"
                    }
                    Refused::TooFar => "the image's tables are scattered too widely to be written",
                };
                Error::new(ErrorKind::InvalidImage, words).at(offset + (i << bits))
            })?;
        }
        Ok(())
    }

    fn constant(&self) -> Result<()> {
        let header = &self.cluster0.header;
        self.insert(Class::MAIN_HEADER, 0, 1)?;
        self.insert(Class::ACTIVE_L1, header.l1_offset, header.l1_len())?;
        self.insert(Class::REFCOUNT_TABLE, header.reftable_offset, header.reftable_len())?;
        if let Some(bitmaps) = self.cluster0.extensions.bitmaps {
            // A directory that no reader could use is not protected either.
            if bitmaps.validate(&header.geometry).is_ok() {
                let (offset, len) = (bitmaps.directory_offset, bitmaps.directory_len);
                self.insert(Class::BITMAP_DIRECTORY, offset, len)?;
            }
        }
        Ok(())
    }

    fn blocks(&self, reftable: &[u64]) -> Result<()> {
        for slot in reftable {
            // One that cannot be followed is reported when it is used.
            if let Ok(Some(place)) = refblock_place(*slot, &self.cluster0.header.geometry) {
                self.insert(Class::REFCOUNT_BLOCK, place.0, 1)?;
            }
        }
        Ok(())
    }

    fn l2(&self, l1: &[(u32, L1Entry)]) -> Result<()> {
        for (_, entry) in l1 {
            if let Ok(Some(place)) = entry.table(&self.cluster0.header.geometry) {
                self.insert(Class::ACTIVE_L2, place.0, 1)?;
            }
        }
        Ok(())
    }

    /// Snapshots' tables: never changed here, only protected.
    async fn snapshots(&self) -> Result<()> {
        let header = &self.cluster0.header;
        let wanted = Class::SNAPSHOT_TABLE | Class::INACTIVE_L1 | Class::INACTIVE_L2;
        if header.snapshot_count == 0 || !self.classes.intersects(wanted) {
            return Ok(());
        }
        let (start, count) = (header.snapshots_offset, header.snapshot_count);
        let table = SnapshotTable::read(self.file, start, count).await?;
        for snapshot in &table.entries {
            let (offset, len) = (snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
            if !header.geometry.is_cluster_aligned(offset) || len > MAX_L1_LEN {
                return Err(Error::new(
                    ErrorKind::InvalidImage,
                    "a snapshot's L1 table is longer than 32 MiB or does not begin at a cluster; \
                     repair the image with a check",
                )
                .field("l1_table_offset", offset)
                .at(start));
            }
            self.insert(Class::INACTIVE_L1, offset, len)?;
            if self.classes.contains(Class::INACTIVE_L2) {
                self.inactive_l2(offset, len).await?;
            }
        }
        self.insert(Class::SNAPSHOT_TABLE, start, table.len)
    }

    async fn inactive_l2(&self, offset: u64, len: u64) -> Result<()> {
        let geometry = self.cluster0.header.geometry;
        for_words(self.file, offset, len, |_, word| {
            if let Ok(Some(place)) = L1Entry(word).table(&geometry) {
                // Tables are shared among snapshots, and with the active L1 table.
                if self.map.insert(place) == Err(Refused::TooFar) {
                    return Err(Error::new(
                        ErrorKind::InvalidImage,
                        "the image's tables are scattered too widely to be written",
                    )
                    .at(place.0));
                }
            }
            Ok(())
        })
        .await
    }
}

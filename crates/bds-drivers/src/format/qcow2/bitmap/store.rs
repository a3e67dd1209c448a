//! Stores bitmaps, and removes stored ones: writes what is new beside what is there, re-points the
//! header, and only then frees what nothing points at any more.
//!
//! ```text
//! 1  clusters of bits, tables and the new directory, in clusters that nothing points at
//! 2  their refcounts (write-back), flush             O1: before the pointer
//! 3  the header's pointer, flush                     switch.rs
//! 4  the old directory, tables and clusters are freed  O2: their pointer is durably gone
//! ```
//!
//! What fails before step 3 leaves the file's bitmaps as they were, and gives the new clusters
//! back. If step 3 fails, the header may point at either directory: neither is freed, and the
//! clusters of the one it does not point at are leaked.

use std::collections::HashMap;
use std::sync::Arc;

use bds_core::bitmap::HBitmap;
use bds_core::driver::{BitmapSpec, BitmapToStore};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::directory::Directory;
use super::load::TableReader;
use crate::format::qcow2::alloc::freed::FreedRun;
use crate::format::qcow2::alloc::overlap::Class;
use crate::format::qcow2::layout::bitmap_directory::{
    AUTO, BitmapEntry, BitsPlace, MAX_NAME_LEN, check_count, check_directory_len, encode_directory,
    entry_len, table_size,
};
use crate::format::qcow2::layout::extension::BitmapsPointer;
use crate::format::qcow2::layout::space::{Clusters, MetaOffset};
use crate::format::qcow2::state::Image;

/// Bytes of bits written at once.
const WRITE_LEN: usize = 1 << 20;

impl Image {
    /// Makes the stored bitmaps exactly these. No write is in flight.
    ///
    /// # Errors
    /// The stored bitmaps are as before, as they would be after success, or none is valid.
    pub(super) async fn store_bitmaps(self: &Arc<Self>, all: &[BitmapToStore]) -> Result<()> {
        let _lock = self.prepare_lock.lock().await;
        let directory = self.directory().await.map_err(|e| self.name_file(e))?;
        let plan = Plan::new(&directory, all);
        if plan.is_done(&directory) {
            return Ok(());
        }
        self.check_bitmaps_writable()?;
        // From here on the next write marks again what it makes stale.
        self.write_state.writes_must_be_prepared();
        let mut writer = DirectoryWriter::new(self);
        let written = writer.write(&plan).await;
        self.replace_directory(&directory, &plan.obsolete, writer, written).await?;
        self.bitmaps.note_stored();
        Ok(())
    }

    /// Removes a stored bitmap, if there is one of this name.
    ///
    /// # Errors
    /// As [`Image::store_bitmaps`].
    pub(super) async fn remove_stored_bitmap(self: &Arc<Self>, name: &str) -> Result<()> {
        let _lock = self.prepare_lock.lock().await;
        let directory = self.directory().await.map_err(|e| self.name_file(e))?;
        let plan = Plan::without(&directory, name.as_bytes());
        if plan.obsolete.is_empty() {
            return Ok(());
        }
        self.check_bitmaps_writable()?;
        let mut writer = DirectoryWriter::new(self);
        let written = writer.write(&plan).await;
        self.replace_directory(&directory, &plan.obsolete, writer, written).await
    }

    /// Refuses a bitmap that could not be stored beside `others`.
    pub(super) fn can_store_bitmap(&self, new: &BitmapSpec, others: &[BitmapSpec]) -> Result<()> {
        let check = || {
            self.check_version()?;
            if new.name.is_empty() || new.name.len() > MAX_NAME_LEN {
                let words = "a bitmap's name has 1 to 1023 bytes";
                return Err(Error::new(ErrorKind::InvalidInput, words));
            }
            table_size(self.geometry(), new.len, new.granularity)?;
            check_count(others.len() + 1)?;
            let names = others.iter().chain([new]).map(|spec| spec.name.len());
            check_directory_len(names.map(entry_len).sum())
        };
        check().map_err(|error: Error| self.name_error(error))
    }

    fn check_version(&self) -> Result<()> {
        if self.cluster0.load().header.version < 3 {
            let words = "Cannot store dirty bitmaps in qcow2 v2 files";
            return Err(Error::new(ErrorKind::NotSupported, words));
        }
        Ok(())
    }

    fn check_bitmaps_writable(&self) -> Result<()> {
        self.check_usable()?;
        self.write_state.check().map_err(|e| self.name_error(e))?;
        self.check_version().map_err(|e| self.name_error(e))
    }

    /// Steps 2 to 4. `written` is the result of step 1.
    async fn replace_directory(
        self: &Arc<Self>,
        old: &Directory,
        obsolete: &[BitmapEntry],
        writer: DirectoryWriter<'_>,
        written: Result<Option<BitmapsPointer>>,
    ) -> Result<()> {
        let DirectoryWriter { new, .. } = writer;
        let prepared = async {
            let pointer = written?;
            let freed = self.clusters_of(old, obsolete).await;
            self.clear_unmaintained(false).await?;
            self.write_back(true).await?;
            self.flush_meta().await?;
            Ok((pointer, freed))
        };
        let (pointer, freed) = match prepared.await {
            Ok(prepared) => prepared,
            Err(error) => {
                let mut meta = self.meta();
                new.into_iter().for_each(|run| self.release_unused(&mut meta, run));
                return Err(error);
            }
        };
        self.switch_directory(pointer).await?;
        self.meta().frees_durable.extend(freed.into_iter().map(FreedRun::metadata));
        if let Err(error) = self.release().await {
            // They stay on the list; the next flush tries again, close reports it.
            tracing::warn!(node = self.node_name, %error, "qcow2: cannot release old bitmaps");
        }
        Ok(())
    }

    /// Clusters of the old directory and of bitmaps that are not stored any more. What cannot be
    /// read, or cannot be right, is left to a check.
    async fn clusters_of(
        &self,
        old: &Directory,
        obsolete: &[BitmapEntry],
    ) -> Vec<Clusters<MetaOffset>> {
        let Some(pointer) = old.pointer else { return Vec::new() };
        let mut freed = Freed { image: self, runs: Vec::new() };
        for entry in obsolete {
            if let Err(error) = freed.add_bitmap(entry).await {
                let bitmap = entry.name.escape_ascii();
                tracing::warn!(node = self.node_name, %bitmap, %error, "qcow2: a bitmap's clusters are leaked");
            }
        }
        let count = self.geometry().clusters(pointer.directory_len);
        let start = MetaOffset(pointer.directory_offset);
        freed.runs.push(Clusters { start, count });
        freed.runs
    }
}

/// What a new directory holds.
struct Plan<'a> {
    entries: Vec<Planned<'a>>,
    /// Entries whose tables and clusters are of no use afterwards.
    obsolete: Vec<BitmapEntry>,
}

enum Planned<'a> {
    /// As it is stored.
    Kept(&'a BitmapEntry),
    /// Written anew.
    New(&'a BitmapToStore, &'a HBitmap),
}

impl<'a> Plan<'a> {
    /// Exactly `all`, in the order of the old directory, new ones at the end. What was not marked
    /// "in use" is stored as it is in memory. A bitmap whose name is no text was not loaded, and
    /// stays.
    fn new(old: &'a Directory, all: &'a [BitmapToStore]) -> Self {
        let mut left: HashMap<&[u8], &BitmapToStore> =
            all.iter().map(|bitmap| (bitmap.name.as_bytes(), bitmap)).collect();
        let mut plan = Self { entries: Vec::new(), obsolete: Vec::new() };
        for entry in &old.entries {
            match left.remove(&entry.name[..]) {
                Some(BitmapToStore { bits: None, .. }) => plan.entries.push(Planned::Kept(entry)),
                Some(bitmap) if is_stored(entry, bitmap) => {
                    plan.entries.push(Planned::Kept(entry));
                }
                Some(bitmap @ BitmapToStore { bits: Some(bits), .. }) => {
                    plan.entries.push(Planned::New(bitmap, bits));
                    plan.obsolete.push(entry.clone());
                }
                None if std::str::from_utf8(&entry.name).is_err() => {
                    plan.entries.push(Planned::Kept(entry));
                }
                None => plan.obsolete.push(entry.clone()),
            }
        }
        for bitmap in all.iter().filter(|b| left.contains_key(b.name.as_bytes())) {
            // An inconsistent one that is not in the file is gone.
            if let Some(bits) = &bitmap.bits {
                plan.entries.push(Planned::New(bitmap, bits));
            }
        }
        plan
    }

    fn without(old: &'a Directory, name: &[u8]) -> Self {
        let (obsolete, kept): (Vec<_>, Vec<_>) =
            old.entries.iter().partition(|entry| entry.name == name);
        Self {
            entries: kept.into_iter().map(Planned::Kept).collect(),
            obsolete: obsolete.into_iter().cloned().collect(),
        }
    }

    /// Is that what the file has?
    fn is_done(&self, old: &Directory) -> bool {
        self.entries.len() == old.entries.len()
            && self.entries.iter().all(|planned| matches!(planned, Planned::Kept(_)))
    }
}

/// Does the file have this bitmap as it is in memory?
fn is_stored(entry: &BitmapEntry, bitmap: &BitmapToStore) -> bool {
    entry.is_usable()
        && entry.is_auto() == bitmap.is_enabled
        && entry.granularity() == bitmap.granularity
}

/// Clusters to be freed, as runs.
struct Freed<'a> {
    image: &'a Image,
    runs: Vec<Clusters<MetaOffset>>,
}

impl Freed<'_> {
    async fn add_bitmap(&mut self, entry: &BitmapEntry) -> Result<()> {
        let geometry = *self.image.geometry();
        let file = self.image.file.port();
        let mut table = TableReader::new(file, entry, &geometry)?;
        let mut clusters = Vec::new();
        while let Some(place) = table.next().await? {
            if let BitsPlace::Cluster(at) = place {
                clusters.push(at);
            }
        }
        clusters.into_iter().for_each(|at| self.add(at, 1));
        self.add(MetaOffset(entry.table_offset), geometry.clusters(entry.table_len()));
        Ok(())
    }

    /// Adds clusters, unless they are other metadata as well: the image contradicts itself then,
    /// and giving them away would destroy it.
    fn add(&mut self, start: MetaOffset, count: u64) {
        let bits = self.image.geometry().cluster_bits();
        let run = Clusters { start, count };
        if self.image.metadata.hit(start, count << bits).is_some() {
            tracing::warn!(
                node = self.image.node_name,
                at = start.0,
                "qcow2: a bitmap shares clusters"
            );
            return;
        }
        if !self.runs.last_mut().is_some_and(|last| last.join(&run, bits)) {
            self.runs.push(run);
        }
    }
}

/// Writes bitmaps and a directory into new clusters.
struct DirectoryWriter<'a> {
    image: &'a Arc<Image>,
    /// All new clusters.
    new: Vec<Clusters<MetaOffset>>,
}

impl<'a> DirectoryWriter<'a> {
    fn new(image: &'a Arc<Image>) -> Self {
        Self { image, new: Vec::new() }
    }

    /// Writes what is new, and a directory of all. Returns its place; `None` if it would be empty.
    async fn write(&mut self, plan: &Plan<'_>) -> Result<Option<BitmapsPointer>> {
        let mut entries = Vec::with_capacity(plan.entries.len());
        for planned in &plan.entries {
            entries.push(match planned {
                Planned::Kept(entry) => BitmapEntry::clone(entry),
                Planned::New(bitmap, bits) => self.write_bitmap(bitmap, bits).await?,
            });
        }
        match entries.is_empty() {
            true => Ok(None),
            false => self.write_directory(&entries).await.map(Some),
        }
    }

    async fn write_bitmap(
        &mut self,
        bitmap: &BitmapToStore,
        bits: &HBitmap,
    ) -> Result<BitmapEntry> {
        let disk_len = self.image.disk_len();
        let error = |error: Error| self.image.name_error(error).field("bitmap", &bitmap.name);
        if bits.len() != disk_len || bits.granularity() != bitmap.granularity {
            let words = format!("a bitmap of {} bytes cannot be stored for {disk_len}", bits.len());
            return Err(error(Error::new(ErrorKind::InvalidInput, words)));
        }
        let geometry = *self.image.geometry();
        let table_size = table_size(&geometry, disk_len, bitmap.granularity).map_err(error)?;
        let mut table = self.write_bits(bits).await?;
        table.resize(usize::try_from(table_size).expect("at most 2^27"), BitsPlace::Zeros);
        let bytes: Vec<u8> = table.iter().flat_map(|place| place.encode().to_be_bytes()).collect();
        let at = self.allocate(geometry.clusters(bytes.len() as u64), None).await?;
        self.write_clusters(at.start, bytes).await?;
        Ok(BitmapEntry {
            table_offset: at.start.0,
            table_size,
            flags: if bitmap.is_enabled { AUTO } else { 0 },
            granularity_bits: u8::try_from(bitmap.granularity.trailing_zeros())
                .expect("at most 31"),
            extra: Vec::new(),
            name: bitmap.name.as_bytes().to_vec(),
        })
    }

    /// Writes the clusters of bits that need any, and returns the table.
    async fn write_bits(&mut self, bits: &HBitmap) -> Result<Vec<BitsPlace>> {
        let geometry = *self.image.geometry();
        let cluster = geometry.cluster_size();
        let mut table = Vec::new();
        let mut mixed = Vec::new();
        for start in (0..bits.stream_len()).step_by(geometry.cluster_len()) {
            // QEMU sets whole words of 64 bits for the short form of all ones, also behind the end.
            let granules = (cluster * 8).min(bits.granules() - start * 8);
            let place = BitsPlace::without_cluster(bits.stream_state(start, cluster))
                .filter(|place| *place == BitsPlace::Zeros || granules.is_multiple_of(64));
            if place.is_none() {
                mixed.push(table.len());
            }
            table.push(place.unwrap_or(BitsPlace::Zeros));
        }
        let mut mixed = &mixed[..];
        while !mixed.is_empty() {
            let most = (mixed.len() as u64).min((WRITE_LEN as u64 / cluster).max(1));
            let run = self.allocate_some(most).await?;
            let count = usize::try_from(run.count).expect("at most what was asked for");
            let (now, later) = mixed.split_at(count);
            mixed = later;
            let mut bytes = vec![0; count * geometry.cluster_len()];
            for (i, (index, out)) in
                now.iter().zip(bytes.chunks_exact_mut(geometry.cluster_len())).enumerate()
            {
                bits.read_stream(*index as u64 * cluster, out);
                table[*index] = BitsPlace::Cluster(MetaOffset(run.start.0 + i as u64 * cluster));
            }
            self.write_clusters(run.start, bytes).await?;
        }
        Ok(table)
    }

    async fn write_directory(&mut self, entries: &[BitmapEntry]) -> Result<BitmapsPointer> {
        let bytes = encode_directory(entries)?;
        let directory_len = bytes.len() as u64;
        let clusters = self.image.geometry().clusters(directory_len);
        let at = self.allocate(clusters, Some(Class::BITMAP_DIRECTORY)).await?;
        self.write_clusters(at.start, bytes).await?;
        Ok(BitmapsPointer {
            count: u32::try_from(entries.len()).expect("at most 65535"),
            reserved: 0,
            directory_len,
            directory_offset: at.start.0,
        })
    }

    /// Exactly `count` adjacent clusters; of metadata of this class, if any.
    async fn allocate(&mut self, count: u64, class: Option<Class>) -> Result<Clusters<MetaOffset>> {
        let allocated = self.image.plan(|image, meta| {
            image.check_dirty_budget(meta, image.geometry().cluster_len())?;
            match class {
                Some(class) => image.alloc_metadata(meta, count, class),
                None => image.alloc_adjacent(meta, count),
            }
        });
        self.note(allocated.await?.range())
    }

    /// Up to `most` adjacent clusters.
    async fn allocate_some(&mut self, most: u64) -> Result<Clusters<MetaOffset>> {
        let allocated = self.image.plan(|image, meta| {
            image.check_dirty_budget(meta, image.geometry().cluster_len())?;
            image.alloc_data(meta, most)
        });
        self.note(allocated.await?.range())
    }

    fn note(&mut self, run: Clusters<MetaOffset>) -> Result<Clusters<MetaOffset>> {
        self.new.push(run);
        Ok(run)
    }

    /// Writes whole clusters: the file must not end inside a table.
    async fn write_clusters(&self, at: MetaOffset, mut bytes: Vec<u8>) -> Result<()> {
        bytes.resize(bytes.len().next_multiple_of(self.image.geometry().cluster_len()), 0);
        let mut at = at.0;
        let mut left = IoVec::from(bytes);
        while !left.is_empty() {
            let len = left.len().min(WRITE_LEN);
            let write = self.image.file.write(MetaOffset(at), left.slice(0..len));
            write.await.map_err(|e| self.image.name_error(e))?;
            left = left.slice(len..left.len());
            at += len as u64;
        }
        Ok(())
    }
}

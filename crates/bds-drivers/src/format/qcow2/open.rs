//! Opening: header, children, tables, and for writers the set of metadata clusters.
//!
//! Nothing is written here, whatever fails. What a writer must do first (clear autoclear bits) waits for the first write.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};

use bds_core::driver::{Child, OpenContext, OpenFlags, Reference, ReferenceKind, Role};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::BufPool;

use super::cache::{L1State, Owed, SliceCache};
use super::config::{Asked, Config};
use super::entry::{EntryRules, L1Entry, refblock_place};
use super::fetch::{read_bytes, read_cluster0};
use super::grace::Grace;
use super::header::{Cluster0, CryptMethod, Incompatible, MAX_L1_LEN, Strictness};
use super::inflated::Inflated;
use super::overlap::{Class, MetadataMap, Refused};
use super::refcount::Counts;
use super::snapshot::SnapshotTable;
use super::state::{HeaderState, Image, Meta};
use super::tables::Tables;
use super::task::Busy;

/// Idle buffers kept for decompression and copying.
const POOL_BYTES: usize = 4 << 20;
/// Tables are read in pieces of this many bytes.
const READ_LEN: u64 = 1 << 20;

/// Opens an image.
pub(crate) async fn open(context: &mut OpenContext<'_>) -> Result<Image> {
    let node_name = context.node_name.to_owned();
    let flags = context.flags;
    let asked = Asked::take(&mut context.options)?;
    let mut file = context.child("file", Role::DATA | Role::METADATA | Role::PRIMARY).await?;
    let opened = open_file(context, &node_name, flags, asked, &mut file).await;
    let parts = opened.map_err(|error| {
        let error = error.node(&node_name);
        match file.filename() {
            Some(path) if error.kind() != ErrorKind::ReferenceRefused => error.file(path),
            _ => error,
        }
    })?;
    let image = parts.build(node_name, file);
    if image.serves_io {
        image.read_tables().await.map_err(|error| {
            let error = error.node(&image.node_name);
            image.file.filename().map_or(error.duplicate(), |path| error.file(path))
        })?;
    }
    Ok(image)
}

/// What opening finds out before the tables are read.
struct Parts {
    flags: OpenFlags,
    cluster0: Cluster0,
    config: Config,
    data_file: Option<Child>,
    backing: Option<Child>,
    is_writable: bool,
}

async fn open_file(
    context: &mut OpenContext<'_>,
    node_name: &str,
    flags: OpenFlags,
    asked: Asked,
    file: &mut Child,
) -> Result<Parts> {
    let mode = match flags.for_check || flags.info_only {
        true => Strictness::Inspect,
        false => Strictness::Use,
    };
    let cluster0 = read_cluster0(&**file, mode).await?;
    let is_writable = !flags.read_only && !flags.info_only && !flags.for_check;
    check_features(&cluster0, node_name, &flags, is_writable, file.len())?;
    let config = asked.settle(&cluster0, &flags)?;
    let data_file = open_data_file(context, &cluster0, &flags).await?;
    let backing = if flags.info_only { None } else { open_backing(context, &cluster0).await? };
    if let (Some(data), Some(here)) = (&data_file, file.identity()) {
        let is_backing = backing.as_ref().and_then(|b| b.identity());
        if data.identity().is_some_and(|there| there == here || Some(there) == is_backing) {
            return Err(Error::new(
                ErrorKind::InvalidImage,
                "the data file is the image itself or its backing file",
            ));
        }
    }
    Ok(Parts { flags, cluster0, config, data_file, backing, is_writable })
}

/// Refuses what we must not or cannot use.
fn check_features(
    cluster0: &Cluster0,
    node_name: &str,
    flags: &OpenFlags,
    is_writable: bool,
    file_len: u64,
) -> Result<()> {
    let header = &cluster0.header;
    let is_inspected = flags.for_check || flags.info_only;
    if header.crypt != CryptMethod::None && !is_inspected {
        let what = match header.crypt {
            CryptMethod::Luks => "LUKS",
            _ => "AES",
        };
        return Err(Error::new(
            ErrorKind::NotSupported,
            format!("the image is encrypted ({what}), which is not supported"),
        )
        .field("crypt_method", what)
        .at(32));
    }
    if header.incompatible.contains(Incompatible::CORRUPT) && !is_inspected {
        if is_writable {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                "the image is marked corrupt: open it read-only, or repair it with a check",
            )
            .at(72));
        }
        tracing::warn!(node = node_name, "qcow2: the image is marked corrupt");
    }
    if header.incompatible.contains(Incompatible::DIRTY) && is_writable {
        return Err(Error::new(
            ErrorKind::InvalidImage,
            "the image was not closed properly and its refcounts are not up to date: \
             repair it first (qemu-img check -r all), or open it read-only",
        )
        .field("incompatible_features", format!("{:#x}", header.incompatible.bits()))
        .at(72));
    }
    if is_writable {
        cluster0.check_writable(file_len)?;
    }
    Ok(())
}

async fn open_data_file(
    context: &mut OpenContext<'_>,
    cluster0: &Cluster0,
    flags: &OpenFlags,
) -> Result<Option<Child>> {
    if !cluster0.header.incompatible.contains(Incompatible::DATA_FILE) {
        if context.options.contains("data-file") {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "'data-file' was given, but the image keeps its data itself",
            ));
        }
        return Ok(None);
    }
    if flags.info_only {
        context.options.take("data-file");
        return Ok(None);
    }
    let reference = cluster0.extensions.data_file.as_deref().map(|name| Reference {
        kind: ReferenceKind::DataFile,
        stored_name: String::from_utf8_lossy(name).into_owned(),
        stored_format: None,
    });
    let child = context.reference("data-file", Role::DATA, reference).await?;
    child.map(Some).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidImage,
            "the image needs an external data file and names none: give it as 'data-file'",
        )
    })
}

async fn open_backing(context: &mut OpenContext<'_>, cluster0: &Cluster0) -> Result<Option<Child>> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let reference = cluster0.backing_name.as_deref().map(|name| Reference {
        kind: ReferenceKind::Backing,
        stored_name: text(name),
        stored_format: cluster0.extensions.backing_format.as_deref().map(text),
    });
    context.reference("backing", Role::COW, reference).await
}

impl Parts {
    fn build(self, node_name: String, file: Child) -> Image {
        let Self { flags, cluster0, config, data_file, backing, is_writable } = self;
        let header = &cluster0.header;
        let geometry = header.geometry;
        let rules = EntryRules {
            geometry,
            has_zero_flag: header.version >= 3,
            has_data_file: data_file.is_some(),
        };
        let zero_from = geometry.cluster_ceil(file.len()).unwrap_or(u64::MAX);
        let counts = Counts::new(
            geometry,
            Vec::new(),
            header.reftable_offset,
            u64::from(header.reftable_clusters),
            config.refcount_cache_bytes,
        );
        let meta = Meta {
            l1: L1State::new(header.l1_offset, header.l1_size),
            slices: SliceCache::new(config.slice_len, config.l2_cache_bytes),
            counts,
            owed: Owed::default(),
            header: HeaderState {
                incompatible: header.incompatible,
                autoclear: header.autoclear,
                is_dirty_marked: false,
            },
            frees: Vec::new(),
            frees_written: Vec::new(),
            frees_durable: Vec::new(),
            in_flight: Vec::new(),
            flights: HashMap::new(),
            zero_from,
            compressed_at: 0,
            new_size: None,
            cleaned_at_s: 0,
        };
        let inflated = Inflated::new(geometry.cluster_len(), config.decompressed_cache_bytes);
        Image {
            len: AtomicU64::new(header.size),
            backing_len: backing.as_ref().map_or(0, |b| b.len()),
            tables: Tables::new(&geometry, config.slice_len),
            metadata: MetadataMap::new(&geometry, is_writable),
            grace: Arc::new(Grace::default()),
            inflated: Arc::new(inflated),
            pool: BufPool::new(POOL_BYTES),
            zeros: OnceLock::new(),
            meta: Mutex::new(meta),
            turn: bds_io::sync::Mutex::new(()),
            releasing: bds_io::sync::Mutex::new(()),
            busy: Arc::new(Busy::default()),
            may_write: AtomicBool::new(false),
            preparing: bds_io::sync::Mutex::new(()),
            broken: OnceLock::new(),
            is_sparse: OnceLock::new(),
            serves_io: !flags.info_only && !flags.for_check,
            is_writable,
            node_name,
            file,
            data_file,
            backing,
            cluster0,
            rules,
            config,
        }
    }
}

impl Image {
    /// Reads the L1 table; for writers also the refcount table, and enters all metadata.
    async fn read_tables(&self) -> Result<()> {
        let header = &self.cluster0.header;
        let (l1_offset, l1_len) = (header.l1_offset, header.l1_len());
        self.for_words(l1_offset, l1_len, |index, word| {
            let index = u32::try_from(index).expect("at most 2^22 entries");
            self.tables.set_l1(index, L1Entry(word));
            Ok(())
        })
        .await?;
        if !self.is_writable {
            return Ok(());
        }
        let mut table = Vec::new();
        self.for_words(header.reftable_offset, header.reftable_len(), |_, word| {
            table.push(word);
            Ok(())
        })
        .await?;
        // Slots behind the last block are room to grow, not blocks.
        let used = table.iter().rposition(|slot| *slot != 0).map_or(0, |last| last + 1);
        table.truncate(used);
        self.enter_constant()?;
        self.enter_blocks(&table)?;
        self.enter_l2()?;
        self.enter_snapshots().await?;
        let budget = self.config.refcount_cache_bytes;
        let clusters = u64::from(header.reftable_clusters);
        self.meta().counts =
            Counts::new(*self.geometry(), table, header.reftable_offset, clusters, budget);
        Ok(())
    }

    /// Reads a table of big-endian words piece by piece.
    async fn for_words(
        &self,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(u64, u64) -> Result<()> + Send,
    ) -> Result<()> {
        let mut at = 0;
        while at < len {
            let piece = READ_LEN.min(len - at);
            let piece_len = usize::try_from(piece).expect("at most 1 MiB");
            let bytes = read_bytes(&*self.file, offset + at, piece_len).await?;
            for (i, word) in bytes.as_chunks().0.iter().enumerate() {
                visit(at / 8 + i as u64, u64::from_be_bytes(*word))?;
            }
            at += piece;
        }
        Ok(())
    }

    fn enter(&self, class: Class, offset: u64, len: u64) -> Result<()> {
        if !self.config.overlap.contains(class) {
            return Ok(());
        }
        let bits = self.geometry().cluster_bits();
        for i in 0..self.geometry().clusters(len) {
            self.metadata.insert(offset + (i << bits)).map_err(|refused| {
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

    fn enter_constant(&self) -> Result<()> {
        let header = &self.cluster0.header;
        self.enter(Class::MAIN_HEADER, 0, 1)?;
        self.enter(Class::ACTIVE_L1, header.l1_offset, header.l1_len())?;
        self.enter(Class::REFCOUNT_TABLE, header.reftable_offset, header.reftable_len())?;
        if let Some(bitmaps) = self.cluster0.extensions.bitmaps {
            let geometry = self.geometry();
            // A directory nobody could use is not protected either.
            if bitmaps.validate(geometry).is_ok() {
                let (offset, len) = (bitmaps.directory_offset, bitmaps.directory_len);
                self.enter(Class::BITMAP_DIRECTORY, offset, len)?;
            }
        }
        Ok(())
    }

    fn enter_blocks(&self, table: &[u64]) -> Result<()> {
        for slot in table {
            // One that cannot be followed is reported when it is used.
            if let Ok(Some(place)) = refblock_place(*slot, self.geometry()) {
                self.enter(Class::REFCOUNT_BLOCK, place.0, 1)?;
            }
        }
        Ok(())
    }

    fn enter_l2(&self) -> Result<()> {
        for table in 0..self.cluster0.header.l1_size {
            if let Ok(Some(place)) = self.tables.l1(table).table(self.geometry()) {
                self.enter(Class::ACTIVE_L2, place.0, 1)?;
            }
        }
        Ok(())
    }

    /// Snapshots' tables: we know where they are and never touch them.
    async fn enter_snapshots(&self) -> Result<()> {
        let header = &self.cluster0.header;
        let wanted = Class::SNAPSHOT_TABLE | Class::INACTIVE_L1 | Class::INACTIVE_L2;
        if header.snapshot_count == 0 || !self.config.overlap.intersects(wanted) {
            return Ok(());
        }
        let (start, count) = (header.snapshots_offset, header.snapshot_count);
        let table = SnapshotTable::read(&*self.file, start, count).await?;
        for snapshot in &table.entries {
            let (offset, len) = (snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
            if !self.geometry().is_cluster_aligned(offset) || len > MAX_L1_LEN {
                return Err(Error::new(
                    ErrorKind::InvalidImage,
                    "a snapshot's L1 table is longer than 32 MiB or does not begin at a cluster; \
                     repair the image with a check",
                )
                .field("l1_table_offset", offset)
                .at(start));
            }
            self.enter(Class::INACTIVE_L1, offset, len)?;
            if self.config.overlap.contains(Class::INACTIVE_L2) {
                self.enter_inactive_l2(offset, len).await?;
            }
        }
        self.enter(Class::SNAPSHOT_TABLE, start, table.len)
    }

    async fn enter_inactive_l2(&self, offset: u64, len: u64) -> Result<()> {
        let geometry = *self.geometry();
        self.for_words(offset, len, |_, word| {
            if let Ok(Some(place)) = L1Entry(word).table(&geometry) {
                // Tables are shared among snapshots, and with the active L1 table.
                if self.metadata.insert(place.0) == Err(Refused::TooFar) {
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

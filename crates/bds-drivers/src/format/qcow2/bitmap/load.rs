//! Loads bitmaps into memory. Writes nothing.
//!
//! A bitmap that was not stored by its last writer, or whose table or bits are damaged, keeps its
//! name and is *inconsistent*: it can only be removed.

use bds_core::bitmap::HBitmap;
use bds_core::driver::{ChildPort, StoredBitmap};
use bds_core::error::{Error, ErrorKind, Result};

use super::directory::Directory;
use crate::format::qcow2::file_read::read_bytes;
use crate::format::qcow2::layout::bitmap_directory::{BitmapEntry, BitsPlace};
use crate::format::qcow2::layout::extension::be64;
use crate::format::qcow2::layout::units::Geometry;
use crate::format::qcow2::state::Image;

/// Most bytes of bits that the bitmaps of one image may have together.
const MAX_LOADED_LEN: u64 = 1 << 30;
/// Bytes of a table read at once.
const TABLE_STEP: u64 = 64 << 10;

impl Image {
    /// All bitmaps of the image. From here on they are kept in memory: a write marks them in the
    /// file instead of being refused.
    pub(super) async fn load_bitmaps(&self) -> Result<Vec<StoredBitmap>> {
        if !self.serves_io {
            return Ok(Vec::new());
        }
        let loaded = match self.directory().await {
            Ok(directory) => {
                let file = self.file.port();
                load_bitmaps(file, &directory, self.geometry(), self.disk_len()).await
            }
            // Who opened it for writing has allowed that; a reader needs no bitmaps.
            Err(error) if error.kind() == ErrorKind::InvalidImage => {
                tracing::warn!(node = self.node_name, %error, "qcow2: the persistent bitmaps cannot be read");
                Ok(Vec::new())
            }
            Err(error) => Err(error),
        };
        let mut loaded = loaded.map_err(|error| self.name_file(error))?;
        let recovered = self.recover_bitmaps(&mut loaded).await;
        self.bitmaps.note_loaded(recovered);
        Ok(loaded)
    }
}

/// Loads the bitmaps of a directory for a disk of `disk_len` bytes. Names that are no text are left
/// out: nothing could name them.
///
/// # Errors
/// `LimitExceeded`: they need more than 1 GiB. Errors of reading.
async fn load_bitmaps(
    file: &dyn ChildPort,
    directory: &Directory,
    geometry: &Geometry,
    disk_len: u64,
) -> Result<Vec<StoredBitmap>> {
    let mut budget = MAX_LOADED_LEN;
    let mut loaded = Vec::new();
    for entry in &directory.entries {
        let Ok(name) = String::from_utf8(entry.name.clone()) else {
            tracing::warn!(name = %entry.name.escape_ascii(), "qcow2: a bitmap's name is not UTF-8");
            continue;
        };
        let bits = match entry.is_usable() {
            false => None,
            true => match load_bits(file, entry, geometry, disk_len, &mut budget).await {
                Ok(bits) => Some(bits),
                Err(error) if error.kind() == ErrorKind::InvalidImage => {
                    tracing::warn!(bitmap = name, %error, "qcow2: the bitmap is damaged");
                    None
                }
                Err(error) => return Err(error.field("bitmap", name)),
            },
        };
        let granularity = entry.granularity();
        loaded.push(StoredBitmap {
            name,
            granularity,
            is_enabled: entry.is_auto(),
            bits,
            recovered_bytes: None,
        });
    }
    Ok(loaded)
}

async fn load_bits(
    file: &dyn ChildPort,
    entry: &BitmapEntry,
    geometry: &Geometry,
    disk_len: u64,
    budget: &mut u64,
) -> Result<HBitmap> {
    let bits = HBitmap::new(disk_len, entry.granularity())?;
    *budget = budget.checked_sub(bits.stream_len()).ok_or_else(|| {
        let words = "the persistent bitmaps of the image need more than 1 GiB of memory";
        Error::new(ErrorKind::LimitExceeded, words)
    })?;
    let cluster = geometry.cluster_size();
    let mut table = TableReader::new(file, entry, geometry)?;
    // What a table has beyond the disk's length means nothing.
    for start in (0..bits.stream_len()).step_by(geometry.cluster_len()) {
        let len = cluster.min(bits.stream_len() - start);
        let Some(place) = table.next().await? else { break };
        match place {
            BitsPlace::Zeros => {}
            BitsPlace::Ones => set_stream(&bits, start, len),
            BitsPlace::Cluster(at) => {
                if at.0.checked_add(len).is_none_or(|end| end > file.len()) {
                    let words = "a bitmap's bits lie behind the end of the file";
                    return Err(Error::new(ErrorKind::InvalidImage, words).at(at.0));
                }
                let len = usize::try_from(len).expect("at most a cluster");
                bits.merge_stream(start, &read_bytes(file, at.0, len).await?);
            }
        }
    }
    Ok(bits)
}

/// Marks all granules of `len` bytes of the stream from byte `at` on.
fn set_stream(bits: &HBitmap, at: u64, len: u64) {
    let byte = |at: u64| (at * 8).saturating_mul(u64::from(bits.granularity()));
    bits.set(byte(at)..byte(at + len));
}

/// Reads the entries of a bitmap's table in order, a piece at a time.
pub(super) struct TableReader<'a> {
    file: &'a dyn ChildPort,
    geometry: &'a Geometry,
    /// Of the bytes that were not read yet.
    offset: u64,
    left: u64,
    piece: Vec<u8>,
    used: usize,
}

impl<'a> TableReader<'a> {
    /// # Errors
    /// `InvalidImage`: the file does not hold all of the table.
    pub(super) fn new(
        file: &'a dyn ChildPort,
        entry: &BitmapEntry,
        geometry: &'a Geometry,
    ) -> Result<Self> {
        let (offset, left) = (entry.table_offset, entry.table_len());
        if offset.checked_add(left).is_none_or(|end| end > file.len()) {
            let words = "a bitmap's table reaches past the end of the file";
            return Err(Error::new(ErrorKind::InvalidImage, words).at(offset));
        }
        Ok(Self { file, geometry, offset, left, piece: Vec::new(), used: 0 })
    }

    /// The next entry; `None` behind the last.
    pub(super) async fn next(&mut self) -> Result<Option<BitsPlace>> {
        if self.used == self.piece.len() {
            if self.left == 0 {
                return Ok(None);
            }
            let len = self.left.min(TABLE_STEP);
            let count = usize::try_from(len).expect("at most 64 KiB");
            self.piece = read_bytes(self.file, self.offset, count).await?;
            self.offset += len;
            self.left -= len;
            self.used = 0;
        }
        let word = be64(&self.piece, self.used);
        self.used += 8;
        BitsPlace::parse(word, self.geometry).map(Some)
    }
}

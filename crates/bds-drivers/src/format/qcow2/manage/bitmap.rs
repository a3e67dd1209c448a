//! Persistent dirty bitmaps: reads their directory, and marks bitmaps that a write makes stale.
//!
//! Entries are shown by `info` and counted by `check`; bitmaps are not loaded and not kept in step.
//! So a writer makes stale those that record every write (flag "auto"), and growing the disk makes
//! all too short: an image that has such bitmaps is not opened for writing (not grown), unless the
//! user allows it. Then they are marked "in use", durably and before the first write, as a crashed
//! writer leaves them: every reader sees that they are inconsistent, and their clusters are not
//! leaked.

use bds_core::driver::ChildPort;
use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::file_read::read_bytes;
use crate::format::qcow2::layout::bitmap_directory::{BitmapEntry, IN_USE, parse_directory};
use crate::format::qcow2::layout::cluster0::Cluster0;
use crate::format::qcow2::layout::extension::BitmapsPointer;
use crate::format::qcow2::layout::header::Autoclear;
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::layout::units::Geometry;
use crate::format::qcow2::state::Image;

/// Byte offset of an entry's flags in it.
const FLAGS_AT: u64 = 12;
/// Bitmaps that an error names.
const MAX_NAMED: usize = 4;
/// Reads and checks the directory. Only for a pointer that was validated and is marked valid by the
/// header.
pub(crate) async fn read_directory(
    file: &dyn ChildPort,
    pointer: &BitmapsPointer,
    geometry: &Geometry,
    disk_size: u64,
) -> Result<Vec<BitmapEntry>> {
    let end = pointer.directory_offset.checked_add(pointer.directory_len);
    let len = usize::try_from(pointer.directory_len).ok();
    let (Some(len), true) = (len, end.is_some_and(|e| e <= file.len())) else {
        return Err(invalid("the bitmap directory reaches past the end of the file")
            .field("bitmap_directory_offset", pointer.directory_offset));
    };
    let bytes = read_bytes(file, pointer.directory_offset, len).await?;
    parse_directory(&bytes, pointer.count, geometry, disk_size)
        .map_err(|e| e.at(pointer.directory_offset))
}

/// The bitmaps of an image that the header calls valid, with their directory.
async fn valid_bitmaps(
    file: &dyn ChildPort,
    image: &Cluster0,
    autoclear: Autoclear,
) -> Result<Option<(BitmapsPointer, Vec<BitmapEntry>)>> {
    let pointer = image.extensions.bitmaps.filter(|_| autoclear.contains(Autoclear::BITMAPS));
    let Some(pointer) = pointer else { return Ok(None) };
    let header = &image.header;
    let list = read_directory(file, &pointer, &header.geometry, header.size).await?;
    Ok(Some((pointer, list)))
}

/// Refuses an image whose bitmaps a writer would make stale, unless that is `allowed`.
pub(crate) async fn check_writable(
    file: &dyn ChildPort,
    image: &Cluster0,
    allowed: bool,
) -> Result<()> {
    if allowed {
        return Ok(());
    }
    let list = valid_bitmaps(file, image, image.header.autoclear).await.map_err(|error| {
        error.context(format!("cannot tell what writing does to the persistent bitmaps ({ALLOW})"))
    })?;
    match list {
        Some((_, list)) => refuse_stale(&list, false),
        None => Ok(()),
    }
}

const ALLOW: &str = "open the image read-only, or with invalidate-bitmaps=on";

fn refuse_stale(list: &[BitmapEntry], grows: bool) -> Result<()> {
    let stale: Vec<String> = list
        .iter()
        .filter(|entry| entry.goes_stale(grows))
        .map(|entry| format!("'{}'", entry.name.escape_ascii()))
        .collect();
    if stale.is_empty() {
        return Ok(());
    }
    let more = match stale.len().checked_sub(MAX_NAMED) {
        Some(more) if more > 0 => format!(" and {more} more"),
        _ => String::new(),
    };
    let names = stale[..stale.len().min(MAX_NAMED)].join(", ");
    let what = if grows { "growing the disk" } else { "writing" };
    Err(Error::new(
        ErrorKind::NotSupported,
        format!(
            "{what} would make the persistent bitmaps {names}{more} inconsistent, as they are not kept in step: {ALLOW}, or remove \
             them first (qemu-img bitmap --remove)"
        ),
    ))
}

impl Image {
    /// Before the first write: marks bitmaps that it makes stale, durably. False if they cannot be
    /// kept at all.
    pub(crate) async fn mark_bitmaps(&self, autoclear: Autoclear, grows: bool) -> Result<bool> {
        let image = self.cluster0.load_full();
        let (pointer, list) = match valid_bitmaps(self.file.port(), &image, autoclear).await {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(true),
            Err(error) => {
                tracing::warn!(node = self.node_name, %error, "qcow2: the persistent bitmaps are lost");
                return Ok(false);
            }
        };
        if !self.config.load().invalidate_bitmaps {
            refuse_stale(&list, grows).map_err(|error| self.name_file(error))?;
        }
        let stale: Vec<&BitmapEntry> =
            list.iter().filter(|entry| entry.goes_stale(grows)).collect();
        for entry in &stale {
            let bitmap = entry.name.escape_ascii().to_string();
            tracing::warn!(node = self.node_name, bitmap, "qcow2: the bitmap becomes inconsistent");
            let flags = (entry.flags | IN_USE).to_be_bytes().to_vec();
            let at = pointer.directory_offset + entry.at + FLAGS_AT;
            self.write_file(MetaOffset(at), flags).await?;
        }
        if !stale.is_empty() {
            self.file.flush().await.map_err(|error| self.name_error(error))?;
        }
        Ok(true)
    }

    /// Before the disk grows: bitmaps of the old length are marked, or in the way.
    pub(crate) async fn mark_bitmaps_to_grow(&self) -> Result<()> {
        let autoclear = self.meta().header.autoclear;
        // A directory that cannot be read was handled by the first write.
        self.mark_bitmaps(autoclear, true).await.map(|_| ())
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}

//! Reads the directory of persistent bitmaps.

use bds_core::driver::ChildPort;
use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::file_read::{read_bytes, read_cluster0};
use crate::format::qcow2::layout::bitmap_directory::{BitmapEntry, parse_directory};
use crate::format::qcow2::layout::cluster0::{Cluster0, Strictness};
use crate::format::qcow2::layout::extension::BitmapsPointer;
use crate::format::qcow2::layout::header::Autoclear;
use crate::format::qcow2::layout::units::Geometry;
use crate::format::qcow2::state::Image;

/// The directory as it is in the file.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    /// Where it lies. `None`: there are no bitmaps that are valid.
    pub pointer: Option<BitmapsPointer>,
    pub entries: Vec<BitmapEntry>,
}

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
        let words = "the bitmap directory reaches past the end of the file";
        return Err(Error::new(ErrorKind::InvalidImage, words)
            .field("bitmap_directory_offset", pointer.directory_offset));
    };
    let bytes = read_bytes(file, pointer.directory_offset, len).await?;
    parse_directory(&bytes, pointer.count, geometry, disk_size)
        .map_err(|e| e.at(pointer.directory_offset))
}

/// The bitmaps that the header calls valid.
pub(crate) async fn valid_bitmaps(file: &dyn ChildPort, image: &Cluster0) -> Result<Directory> {
    let header = &image.header;
    let is_valid = header.autoclear.contains(Autoclear::BITMAPS);
    let Some(pointer) = image.extensions.bitmaps.filter(|_| is_valid) else {
        return Ok(Directory::default());
    };
    let entries = read_directory(file, &pointer, &header.geometry, header.size).await?;
    Ok(Directory { pointer: Some(pointer), entries })
}

/// Refuses to write an image whose bitmaps cannot be read, unless it is `allowed` to lose them.
pub(crate) async fn check_writable(
    file: &dyn ChildPort,
    image: &Cluster0,
    allowed: bool,
) -> Result<()> {
    if allowed {
        return Ok(());
    }
    valid_bitmaps(file, image).await.map(|_| ()).map_err(with_remedy)
}

/// Says what can be done about bitmaps that cannot be read.
pub(super) fn with_remedy(error: Error) -> Error {
    error.context(
        "the persistent bitmaps cannot be read (open the image read-only, or with invalidate-bitmaps=on to lose them)",
    )
}

impl Image {
    /// The directory as the file has it now: also after a change that failed half-way.
    pub(super) async fn directory(&self) -> Result<Directory> {
        let has_bitmaps = self.meta().header.autoclear.contains(Autoclear::BITMAPS);
        if !has_bitmaps && !self.bitmaps.is_header_uncertain() {
            return Ok(Directory::default());
        }
        let cluster0 = read_cluster0(self.file.port(), Strictness::Use).await?;
        valid_bitmaps(self.file.port(), &cluster0).await
    }
}

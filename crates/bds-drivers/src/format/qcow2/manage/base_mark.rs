//! Notes what the backing file of an overlay showed when the overlay was made, and refuses another
//! one in its place: a wrong file under the right name, or one that was written to since.
//!
//! ```text
//! header extension "bdsb": version u32 = 1, reserved u32, length of the base u64, device u64,
//!                          inode u64, first 16 bytes of BLAKE3 over length and samples
//! autoclear bit 61         the extension is valid
//! ```
//! The samples are eight blocks of 4 KiB where disks keep what changes when they are mounted or
//! repartitioned (partition table, superblocks, the end), and at the quarters. So the check costs
//! some 32 KiB of reads an overlay, a wrong disk is found, and so is one that was booted; a change
//! elsewhere is not: `bds verify` proves contents.
//!
//! Only what is known to be wrong is refused. QEMU does not know the bit and clears it when it
//! opens the overlay for writing (it may commit into the base), and then nothing is checked. The
//! same holds once the recorded backing file changes, and once the overlay was written to above
//! another base or none (`backing-check=off`, an overlay that is opened to be put above a disk in
//! use). A base that grew is the same base. Device and inode only choose the words of the error.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bds_core::driver::{Child, ReadFlags};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::Buf;
use futures_util::future::try_join_all;

use crate::format::qcow2::file_read::{read_bytes, read_cluster0};
use crate::format::qcow2::layout::cluster0::{Cluster0, Strictness};
use crate::format::qcow2::layout::extension::{UnknownExtension, be32, be64};
use crate::format::qcow2::layout::header::{AUTOCLEAR_AT, Autoclear};
use crate::format::qcow2::layout::rewrite::{self, Write};
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::state::Image;

/// Type of the extension: "bdsb".
const KIND: u32 = 0x6264_7362;
const VERSION: u32 = 1;
/// Bytes of the extension's data.
const LEN: usize = 48;
/// Bytes of a sample.
const SAMPLE_LEN: u64 = 4096;
/// Where samples are taken in any disk: the partition table, superblocks of file systems without
/// one (btrfs), of those in a first partition (at 1 MiB; btrfs there).
const FIXED: [u64; 4] = [0, 64 << 10, 1 << 20, (1 << 20) + (64 << 10)];

/// What a base showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BaseMark {
    len: u64,
    /// Device and inode of its file; zeros where it has none.
    file: (u64, u64),
    digest: [u8; 16],
}

impl BaseMark {
    /// The note of an image, if it has one that is valid.
    pub(crate) fn of_image(image: &Cluster0) -> Option<Self> {
        if !image.header.autoclear.contains(Autoclear::BASE_MARK) {
            return None;
        }
        let mut notes = image.extensions.unknown.iter().filter(|found| found.kind == KIND);
        match (notes.next(), notes.next()) {
            (Some(note), None) => Self::parse(&note.data),
            // Of two, readers could believe different ones.
            _ => None,
        }
    }

    fn parse(data: &[u8]) -> Option<Self> {
        if data.len() != LEN || be32(data, 0) != VERSION {
            return None;
        }
        let digest = data.get(32..)?.try_into().ok()?;
        Some(Self { len: be64(data, 8), file: (be64(data, 16), be64(data, 24)), digest })
    }

    fn encode(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(LEN);
        data.extend(VERSION.to_be_bytes());
        data.extend([0; 4]);
        for number in [self.len, self.file.0, self.file.1] {
            data.extend(number.to_be_bytes());
        }
        data.extend(self.digest);
        data
    }

    /// What the base shows now in its first `len` bytes.
    async fn of_base(base: &Child, len: u64) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&len.to_be_bytes());
        // All at once: one round trip on a remote base.
        let reads = samples(len).into_iter().map(|(offset, len)| async move {
            let buf = Buf::zeroed(len, 4096);
            base.read(offset, buf.iov(), ReadFlags::empty()).await?;
            Ok::<_, Error>(buf.iov().to_vec(0..len))
        });
        for sample in try_join_all(reads).await? {
            hasher.update(&sample);
        }
        let digest = hasher.finalize();
        let digest = digest.as_bytes().first_chunk().copied().expect("it has 32 bytes");
        Ok(Self { len, file: base.identity().unwrap_or_default(), digest })
    }
}

/// Offsets and lengths of the samples of a disk, in order.
fn samples(len: u64) -> Vec<(u64, usize)> {
    let quarter = len / 4;
    let others = [quarter, 2 * quarter, 3 * quarter, len.saturating_sub(1)];
    let mut places: Vec<u64> =
        FIXED.into_iter().chain(others.map(|at| at / SAMPLE_LEN * SAMPLE_LEN)).collect();
    places.retain(|at| *at < len);
    places.sort_unstable();
    places.dedup();
    let part = |at: u64| usize::try_from(SAMPLE_LEN.min(len - at)).expect("at most 4096");
    places.into_iter().map(|at| (at, part(at))).collect()
}

/// What a comparison of a backing node with the image's note found.
pub(crate) enum Comparison {
    /// The image has no note.
    NoNote,
    /// It shows what was noted.
    Same,
    /// Why it is another one.
    Different(String),
    /// It could not be read. Its reader finds out why.
    Unread,
}

impl Comparison {
    /// Compares `base`; `None`: the image was opened without its backing node.
    pub(crate) async fn of(image: &Cluster0, base: Option<&Child>) -> Self {
        let Some(noted) = BaseMark::of_image(image) else { return Self::NoNote };
        let Some(base) = base else { return Self::Different("there is none".to_owned()) };
        let is_same_file = base.identity().is_some_and(|file| file == noted.file);
        if base.len() < noted.len {
            let verb = if is_same_file { "was cut" } else { "is shorter" };
            let (now, then) = (base.len(), noted.len);
            return Self::Different(format!("it {verb}: it has {now} bytes and had {then}"));
        }
        match BaseMark::of_base(base, noted.len).await {
            Ok(now) if now.digest == noted.digest => Self::Same,
            Ok(_) if is_same_file => {
                Self::Different("it was written to after this overlay was made".to_owned())
            }
            Ok(_) => Self::Different(
                "it is another image, or was written to after this overlay was made".to_owned(),
            ),
            Err(error) => {
                tracing::debug!(%error, "qcow2: the backing file was not compared");
                Self::Unread
            }
        }
    }

    /// Refuses another backing file than the one that was noted.
    ///
    /// # Errors
    /// `InvalidImage`.
    pub(crate) fn into_result(self, image: &Cluster0) -> Result<()> {
        let Self::Different(why) = self else { return Ok(()) };
        let name = String::from_utf8_lossy(image.backing_name.as_deref().unwrap_or_default());
        let message = format!(
            "the backing file '{name}' is not what this overlay was made on: {why}; bring the \
             right one back, or open with backing-check=off (or shared: -U) to use it all the same"
        );
        Err(Error::new(ErrorKind::InvalidImage, message))
    }

    /// Whether the note stays when the image is written to. A writer above another base makes an
    /// overlay of that one.
    pub(crate) fn keeps_note(&self) -> bool {
        !matches!(self, Self::Different(_))
    }
}

impl Image {
    /// See [`bds_core::Driver::mark_base`]. Runs in a task of its own.
    pub(crate) async fn mark_base(self: &Arc<Self>, is_known: bool) -> Result<bool> {
        let has_bits = self.cluster0.load().header.version >= 3;
        let base = self.backing.child().filter(|_| is_known && has_bits);
        let Some(base) = base else {
            self.forget_base().await?;
            return Ok(false);
        };
        let mark = BaseMark::of_base(&base, base.len()).await?;
        self.prepare_to_write().await?;
        let _lock = self.write_back_lock.lock().await;
        let old = read_cluster0(self.file.port(), Strictness::Use).await?;
        if old.backing_name.is_none() || old.header.version < 3 {
            return Ok(false);
        }
        let bytes = read_bytes(self.file.port(), 0, self.geometry().cluster_len()).await?;
        let mut new = old.clone();
        new.header.autoclear |= Autoclear::BASE_MARK;
        new.extensions.unknown.retain(|extension| extension.kind != KIND);
        new.extensions.unknown.push(UnknownExtension { kind: KIND, data: mark.encode() });
        let writes = match rewrite::plan(&bytes, &old, &new) {
            Err(error) if error.kind() == ErrorKind::NoSpace => return Ok(false),
            planned => planned.map_err(|error| self.name_file(error))?,
        };
        for Write { offset, bytes } in writes {
            self.write_file(MetaOffset(offset as u64), bytes).await?;
            self.flush_meta().await?;
        }
        self.meta().header.autoclear |= Autoclear::BASE_MARK;
        // What is in memory of the other fields may be newer.
        let mut known = Cluster0::clone(&self.cluster0.load());
        known.header.autoclear |= Autoclear::BASE_MARK;
        known.extensions = new.extensions;
        self.cluster0.store(Arc::new(known));
        self.keeps_base_mark.store(true, Ordering::Release);
        Ok(true)
    }

    /// Clears the bit; the extension says nothing without it.
    async fn forget_base(&self) -> Result<()> {
        // The file counts: a note may have been written half-way.
        let has_bit = |image: &Cluster0| image.header.autoclear.contains(Autoclear::BASE_MARK);
        if !has_bit(&read_cluster0(self.file.port(), Strictness::Use).await?) {
            return Ok(());
        }
        self.prepare_to_write().await?;
        let _lock = self.write_back_lock.lock().await;
        let old = read_cluster0(self.file.port(), Strictness::Use).await?;
        let bits = old.header.autoclear - Autoclear::BASE_MARK;
        self.write_file(MetaOffset(AUTOCLEAR_AT), bits.bits().to_be_bytes().to_vec()).await?;
        self.flush_meta().await?;
        self.meta().header.autoclear -= Autoclear::BASE_MARK;
        let mut known = Cluster0::clone(&self.cluster0.load());
        known.header.autoclear -= Autoclear::BASE_MARK;
        self.cluster0.store(Arc::new(known));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_in_the_disk_and_do_not_repeat() {
        for (len, expected) in [
            (0, vec![]),
            (512, vec![(0, 512)]),
            (4096, vec![(0, 4096)]),
            (5000, vec![(0, 4096), (4096, 904)]),
            (
                128 << 10,
                vec![
                    (0, 4096),
                    (32 << 10, 4096),
                    (64 << 10, 4096),
                    (96 << 10, 4096),
                    (124 << 10, 4096),
                ],
            ),
        ] {
            assert_eq!(samples(len), expected, "{len}");
        }
        assert_eq!(samples(1 << 40).len(), 8);
        assert!(samples(u64::MAX).len() == 8);
    }

    #[test]
    fn notes_round_trip_and_others_are_none() {
        let mark = BaseMark { len: 7 << 30, file: (1, 2), digest: [9; 16] };
        let data = mark.encode();
        assert_eq!(BaseMark::parse(&data), Some(mark));
        assert_eq!(BaseMark::parse(&data[1..]), None);
        assert_eq!(BaseMark::parse(&[&data[..], &[0]].concat()), None);
        let mut later = data;
        later[3] = 2;
        assert_eq!(BaseMark::parse(&later), None);
    }
}

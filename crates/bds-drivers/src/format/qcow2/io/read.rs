//! Guest reads.
//!
//! The fast path ([`Image::try_read`]) takes no lock and allocates nothing as long as the L2 slices
//! are in memory: look up, and read from the child at the offset found. Where it cannot go on it
//! declines, and the slow path loads what is missing and reads the parts concurrently.

use std::ops::Range;
use std::sync::Arc;

use bds_core::error::{Error, ErrorKind, Result};
use bds_io::{Buf, IoVec};

use super::compress;
use super::decompressed_cache::CacheLookup;
use crate::format::qcow2::layout::entry::{Kind, L2Entry};
use crate::format::qcow2::layout::units::{Geometry, mem_len, part_of};
use crate::format::qcow2::meta::lookup::{Found, Run};
use crate::format::qcow2::plan::MetaKey;
use crate::format::qcow2::state::Image;
use crate::format::qcow2::task::{LazyUnordered, detach_on_drop};

/// Parts of one request read concurrently.
const PARTS_AT_ONCE: usize = 8;

/// One piece of a read, all of one kind.
struct Part {
    run: Run,
    guest: u64,
    iov: IoVec,
}

impl Image {
    /// Reads what needs no waiting. `None`: call [`Image::read`].
    pub(crate) fn try_read(self: &Arc<Self>, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if self.broken.get().is_some() || !self.serves_io {
            return None;
        }
        let len = iov.len() as u64;
        if offset.checked_add(len)? > self.disk_len() {
            return None;
        }
        // Nothing is freed in an image that is not writable.
        let _srcu = self.is_writable().then(|| self.srcu.read_lock());
        let mut at = 0;
        while at < len {
            let run = match self.lookup(offset + at, len - at) {
                Ok(Found::Run(run)) => run,
                Ok(Found::Missing(_)) => return None,
                Err(bad) => return Some(Err(self.bad_entry(bad, offset + at))),
            };
            if run.len == len {
                return self.try_part(&run, offset, iov);
            }
            let piece = part_of(iov, at, run.len);
            if let Err(error) = self.try_part(&run, offset + at, &piece)? {
                return Some(Err(error));
            }
            at += run.len;
        }
        Some(Ok(()))
    }

    #[inline]
    fn try_part(&self, run: &Run, guest: u64, iov: &IoVec) -> Option<Result<()>> {
        match run.kind {
            Kind::Normal if self.is_in_file(run.host, iov.len() as u64) => {
                self.data().try_read(run.host, iov)
            }
            Kind::Normal => None,
            Kind::ZeroPlain | Kind::ZeroAlloc => {
                iov.fill(0..iov.len(), 0);
                Some(Ok(()))
            }
            Kind::Unallocated | Kind::UnallocatedAlloc => self.backing.try_read(guest, iov),
            Kind::Compressed => {
                let cluster = self.decompressed.get(run.entry.word)?;
                copy_part(self.geometry(), &cluster, guest, iov);
                Some(Ok(()))
            }
        }
    }

    /// Reads, loading what is missing. Bytes past the end of the disk are zeros.
    pub(crate) async fn read(self: &Arc<Self>, offset: u64, iov: IoVec) -> Result<()> {
        self.check_usable()?;
        if !self.serves_io {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "the image was opened for inspection only",
            )
            .node(&self.node_name));
        }
        let asked = iov.len() as u64;
        let len = self.disk_len().saturating_sub(offset).min(asked);
        if len < asked {
            iov.fill(mem_len(len)..iov.len(), 0);
        }
        let _srcu = self.is_writable().then(|| self.srcu.read_lock());
        let mut at = 0;
        let mut under_way = LazyUnordered::new();
        while at < len {
            let run = self.find(offset + at, len - at).await?;
            let piece = part_of(&iov, at, run.len);
            let part = Part { run, guest: offset + at, iov: piece };
            at += run.len;
            if at == len && under_way.is_empty() {
                return self.read_part(part).await;
            }
            under_way.push(self.read_part(part));
            if under_way.len() >= PARTS_AT_ONCE {
                under_way.next().await.transpose()?;
            }
        }
        while let Some(result) = under_way.next().await {
            result?;
        }
        Ok(())
    }

    /// A lookup that loads what it needs.
    pub(crate) async fn find(self: &Arc<Self>, guest: u64, max: u64) -> Result<Run> {
        let mut _held = None;
        loop {
            match self.lookup(guest, max) {
                Ok(Found::Run(run)) => return Ok(run),
                Ok(Found::Missing(id)) => _held = Some(self.load(MetaKey::Slice(id)).await?),
                Err(bad) => return Err(self.bad_entry(bad, guest)),
            }
        }
    }

    async fn read_part(self: &Arc<Self>, part: Part) -> Result<()> {
        let Part { run, guest, iov } = part;
        match run.kind {
            Kind::Normal if !self.is_in_file(run.host, iov.len() as u64) => {
                Err(self.truncated_data_error(run.host, guest))
            }
            Kind::Normal => {
                let read = self.data().read(run.host, iov);
                read.await.map_err(|e| self.name_error(e))
            }
            Kind::ZeroPlain | Kind::ZeroAlloc => {
                iov.fill(0..iov.len(), 0);
                Ok(())
            }
            Kind::Unallocated | Kind::UnallocatedAlloc => {
                let read = self.backing.read(guest, iov);
                read.await.map_err(|e| self.name_error(e))
            }
            Kind::Compressed => {
                let within = guest % self.geometry().cluster_len() as u64;
                let needed_len = mem_len(within) + iov.len();
                let cluster = self.inflate(run.entry, guest, needed_len).await?;
                copy_part(self.geometry(), &cluster, guest, &iov);
                Ok(())
            }
        }
    }

    /// The decompressed cluster behind `entry`, at least its first `needed_len` bytes.
    /// The caller must hold a guard of `srcu`.
    async fn inflate(
        self: &Arc<Self>,
        entry: L2Entry,
        guest: u64,
        needed_len: usize,
    ) -> Result<Buf> {
        loop {
            match self.decompressed.get_or_fill(entry.word, needed_len) {
                CacheLookup::Once => return self.decompress(entry, guest, needed_len).await,
                CacheLookup::Ready(cluster) => return Ok(cluster),
                CacheLookup::Wait(done) => done.wait().await,
                CacheLookup::Fill(fill) => {
                    // Other requests may wait for it, so it runs in a task of its own, with its own
                    // guard of `srcu`.
                    let srcu = self.is_writable().then(|| self.srcu.read_lock_owned());
                    let image = Arc::clone(self);
                    let len = self.geometry().cluster_len();
                    let task_guard = self.tasks.begin();
                    return detach_on_drop(async move {
                        let cluster = image.decompress(entry, guest, len).await?;
                        fill.insert(&cluster);
                        drop((srcu, task_guard));
                        Ok(cluster)
                    })
                    .await;
                }
            }
        }
    }

    async fn decompress(&self, entry: L2Entry, guest: u64, len: usize) -> Result<Buf> {
        let range = entry.compressed_range(self.geometry());
        // Bytes behind the end of the file must not be taken for zeros: zeros may decode to
        // something.
        let there = self.file.len().saturating_sub(range.offset.0).min(range.len);
        if there == 0 {
            return Err(self.truncated_meta_error("a compressed cluster", range.offset).at(guest));
        }
        let input = self.pool.take(mem_len(there));
        let read = self.file.read(range.offset, input.iov());
        read.await.map_err(|e| self.name_error(e))?;
        let out = self.pool.take(len);
        let kind = self.cluster0.load().header.compression;
        compress::decode_buf(kind, input, out).await.map_err(|error| {
            error
                .context(format!(
                    "cannot decompress the cluster at {:#x} for guest offset {guest:#x}",
                    range.offset.0
                ))
                .node(&self.node_name)
                .at(range.offset.0)
        })
    }
}

/// Copies the part of a decompressed cluster at `guest`.
fn copy_part(geometry: &Geometry, cluster: &Buf, guest: u64, iov: &IoVec) {
    let start = mem_len(geometry.offset_in_cluster(guest));
    let range: Range<usize> = start..start + iov.len();
    iov.copy_from_iov(0, &cluster.slice(range));
}

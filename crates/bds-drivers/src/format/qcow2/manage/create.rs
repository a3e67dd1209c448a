//! Creates an image, written in an order that leaves no half image after a crash.
//!
//! A [`Layout`] is planned first, as numbers: header, refcount table, refcount blocks, L1 table
//! and, with preallocation, L2 tables and data, one after the other, all with a refcount of one.
//! For a plain image these are the bytes that `qemu-img create` writes. The header is written last,
//! behind a flush (rule O14 and its like): after a crash there is either a whole image or a file
//! that is none.
//!
//! Does not open references: the caller has opened the data file and found the backing image's
//! length.

use bds_core::driver::{
    Child, CreateContext, CreateFacts, Prealloc, Truncate, WriteFlags, ZeroFlags,
};
use bds_core::error::{Error, Result};
use bds_core::options::Options;
use bds_io::Buf;

use super::create_layout::Layout;
use super::create_options::{CreateOptions, wrong};
use crate::format::qcow2::layout::entry::{COPIED, ZERO, write_refcount};

/// Tables are written in pieces of about this length.
const BATCH_LEN: usize = 2 << 20;
/// A planned image: numbers and bytes, before any file is touched.
struct PlannedImage {
    plan: CreateOptions,
    size: u64,
    layout: Layout,
    cluster0: Vec<u8>,
}

impl PlannedImage {
    fn plan(options: &mut Options, backing_len: Option<u64>) -> Result<Self> {
        let plan = CreateOptions::take(options)?;
        let size = plan.disk_size(backing_len)?;
        let mapped = plan.is_mapped();
        let with_data = mapped && plan.data_file.is_none();
        let layout = Layout::plan(&plan.geometry, size, mapped, with_data)?;
        let cluster0 = plan.cluster0(&layout, size).encode()?;
        Ok(Self { plan, size, layout, cluster0 })
    }
}

/// Returns the facts of the image that would be created, or why it cannot be. Touches no file.
pub(crate) fn check(options: &mut Options, backing_len: Option<u64>) -> Result<CreateFacts> {
    let PlannedImage { plan, size, layout, .. } = PlannedImage::plan(options, backing_len)?;
    let geometry = &plan.geometry;
    let end = layout.clusters * geometry.cluster_size();
    let cluster_len = u32::try_from(geometry.cluster_size()).expect("at most 2 MiB");
    Ok(CreateFacts {
        len: size,
        min_file_len: if plan.is_mapped() { end } else { layout.l1_end() },
        compressed_unit: plan.data_file.is_none().then_some(cluster_len),
    })
}

/// Writes a new image as `context` says.
pub(crate) async fn create(context: CreateContext<'_>) -> Result<()> {
    let CreateContext { file, data_file, backing_len, options } = context;
    let PlannedImage { plan, size, layout, cluster0 } = PlannedImage::plan(options, backing_len)?;
    let data_file = check_data_file(&plan, &file, data_file)?;
    let mapped = plan.is_mapped();

    let old_len = file.len();
    let guest_clusters = plan.geometry.clusters(size);
    let mut writer =
        Writer { file: &file, plan: &plan, layout: &layout, guest_clusters, zero_data: false };
    if old_len > 0 {
        // An old header must not describe the new tables.
        writer.zero(0, plan.geometry.cluster_size().min(old_len), false).await?;
        file.flush().await?;
    }
    writer.grow(layout.l1_end(), Prealloc::Off).await?;
    if let Some(data_file) = &data_file {
        let forwarded = match plan.prealloc {
            Prealloc::Off | Prealloc::Metadata => Prealloc::Off,
            other => other,
        };
        // Old bytes of a data file count only if it is to be read as it is.
        writer.zero_data = data_file.len() > 0 && !plan.data_file_raw;
        let change = Truncate { len: size, exact: true, prealloc: forwarded, zero_new: true };
        data_file.truncate(change).await.map_err(|e| e.context("cannot make the data file"))?;
    } else if mapped {
        writer.make_data(old_len).await?;
    }
    writer.refcounts().await?;
    writer.l1().await?;
    writer.l2().await?;
    if let Some(data_file) = &data_file {
        data_file.flush().await?;
    }
    file.flush().await?;
    writer.put(0, cluster0).await?;
    file.flush().await
}

fn check_data_file(
    plan: &CreateOptions,
    file: &Child,
    data_file: Option<Child>,
) -> Result<Option<Child>> {
    match (&plan.data_file, data_file) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(wrong("the data file that data_file names was not opened")),
        (None, Some(_)) => Err(wrong("a data file was given, but option data_file names none")),
        (Some(name), Some(child)) => {
            if child.identity().is_some() && child.identity() == file.identity() {
                return Err(
                    wrong("the data file is the image itself").field("data_file", name.display())
                );
            }
            Ok(Some(child))
        }
    }
}

struct Writer<'a> {
    file: &'a Child,
    plan: &'a CreateOptions,
    layout: &'a Layout,
    /// Clusters of the disk.
    guest_clusters: u64,
    /// The data clusters may hold old bytes: entries must say that they are zeros.
    zero_data: bool,
}

impl Writer<'_> {
    async fn put(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let iov = Buf::from_slice(&bytes).iov();
        self.file.write(offset, iov, WriteFlags::empty()).await.map_err(|e| e.at(offset))
    }

    async fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        let flags = if may_unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
        // Without NO_FALLBACK it is always done.
        self.file.write_zeroes(offset, len, flags).await.map(|_| ()).map_err(|e| e.at(offset))
    }

    /// Makes the file at least `len` bytes long.
    async fn grow(&self, len: u64, prealloc: Prealloc) -> Result<()> {
        if self.file.len() >= len {
            return Ok(());
        }
        let change = Truncate { len, exact: false, prealloc, zero_new: true };
        let said = |e: Error| e.context(format!("cannot make the file {len} bytes long"));
        self.file.truncate(change).await.map_err(said)
    }

    /// Provides the data clusters. What was in the file before must not show through.
    async fn make_data(&mut self, old_len: u64) -> Result<()> {
        let Layout { l2_offset, data_offset, clusters, .. } = *self.layout;
        let end = clusters * self.plan.geometry.cluster_size();
        // The tables are written, not reserved: only what lies behind them is preallocated.
        self.grow(data_offset.max(l2_offset), Prealloc::Off).await?;
        let prealloc = match self.plan.prealloc {
            Prealloc::Metadata => Prealloc::Off,
            other => other,
        };
        let old_end = old_len.min(end);
        if old_end > data_offset {
            if self.plan.prealloc == Prealloc::Metadata && self.plan.version >= 3 {
                self.zero_data = true;
            } else {
                self.zero(data_offset, old_end - data_offset, false).await?;
            }
        }
        self.grow(end, prealloc).await
    }

    /// Refcount blocks, then the table that points at them: every cluster in use is used once.
    async fn refcounts(&self) -> Result<()> {
        let Layout { refblocks, refblocks_offset, clusters, .. } = *self.layout;
        let geometry = &self.plan.geometry;
        let order = geometry.refcount_order();
        let cluster = geometry.cluster_len();
        let mut full = vec![0; cluster];
        let mut last = full.clone();
        let entries = geometry.refblock_entries();
        for index in 0..entries {
            let at = geometry.refblock_index(index);
            write_refcount(&mut full, order, at, 1);
            if (refblocks - 1) * entries + index < clusters {
                write_refcount(&mut last, order, at, 1);
            }
        }
        let batch = (BATCH_LEN / cluster).max(1) as u64;
        let mut done = 0;
        while done < refblocks {
            let count = batch.min(refblocks - done);
            let mut bytes = Vec::with_capacity(BATCH_LEN);
            for block in done..done + count {
                bytes.extend(if block + 1 == refblocks { &last } else { &full });
            }
            self.put(refblocks_offset + done * geometry.cluster_size(), bytes).await?;
            done += count;
        }
        let mut table: Vec<u8> = (0..refblocks)
            .flat_map(|block| (refblocks_offset + block * geometry.cluster_size()).to_be_bytes())
            .collect();
        table.resize(table.len().next_multiple_of(cluster), 0);
        self.put(self.layout.reftable_offset, table).await
    }

    async fn l1(&self) -> Result<()> {
        let Layout { l1_entries, l1_offset, l2_offset, l2_tables, .. } = *self.layout;
        let geometry = &self.plan.geometry;
        let table: Vec<u8> =
            (0..u64::from(l1_entries))
                .map(|i| {
                    if l2_tables > 0 {
                        (l2_offset + i * geometry.cluster_size()) | COPIED
                    } else {
                        0
                    }
                })
                .flat_map(u64::to_be_bytes)
                .collect();
        self.put(l1_offset, table).await
    }

    /// L2 tables of a preallocated image, in order, in large pieces.
    async fn l2(&self) -> Result<()> {
        let Layout { l2_offset, l2_tables, data_offset, .. } = *self.layout;
        let geometry = &self.plan.geometry;
        let cluster = geometry.cluster_size();
        let in_data_file = self.plan.data_file.is_some();
        let extended = geometry.has_extended_l2();
        let flag = if self.zero_data && !extended { ZERO } else { 0 };
        let bitmap = if self.zero_data && extended { u64::from(u32::MAX) << 32 } else { 0 };
        let base = if in_data_file { 0 } else { data_offset };
        let per_table = geometry.l2_entries() as u64;
        let batch = (BATCH_LEN / geometry.cluster_len()).max(1) as u64;
        let mut done = 0;
        while done < l2_tables {
            let count = batch.min(l2_tables - done);
            let mut bytes = Vec::with_capacity(BATCH_LEN);
            let first = done * per_table;
            for index in first..(first + count * per_table).min(self.guest_clusters) {
                bytes.extend(((base + index * cluster) | COPIED | flag).to_be_bytes());
                if extended {
                    bytes.extend(bitmap.to_be_bytes());
                }
            }
            bytes.resize(bytes.len().next_multiple_of(geometry.cluster_len()), 0);
            self.put(l2_offset + done * cluster, bytes).await?;
            done += count;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "tests/create.rs"]
mod tests;

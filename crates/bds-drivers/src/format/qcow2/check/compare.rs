//! Finds leaks and corruption: compares stored refcounts with counted references.
//!
//! [`ref_walk`](super::ref_walk) counts what refers to each cluster; here the counts are compared
//! with the refcount blocks. Corruptions, leaks and statistics are those of `qemu-img check`, so
//! verdicts can be compared; beyond it we find: data of a data file at the wrong offset (F7),
//! clusters that two guest ranges or two kinds of owner share although the refcount allows it, and
//! zero flags in version 2.
//!
//! Memory is budgeted ([`MEMORY_BUDGET_LEN`]); what exceeds it is an error, never a guess. Works on
//! the raw file with a header parse of its own, so it can look at an image that does not open.

use std::collections::BTreeSet;
use std::ops::Range;

use bds_core::driver::{CheckReport, ChildPort};
use bds_core::error::{Error, ErrorKind, Result};

use super::ref_walk::RefWalk;
use super::refcount_reader::RefcountReader;
use crate::format::qcow2::file_read::read_cluster0;
use crate::format::qcow2::layout::cluster0::Strictness;
use crate::format::qcow2::layout::entry::read_refcount;

/// Memory for counting references: 4 TiB of densely used 64-KiB clusters, and more.
const MEMORY_BUDGET_LEN: u64 = 1 << 30;
/// Counts compared before a check gives up (a sparse file can claim any number).
const MAX_COMPARED: u64 = 1 << 33;

/// Clusters shared against the rules that are reported one by one.
const MAX_EXTRAS: usize = 4096;

/// Checks the image in `file`. `progress` is called with (done, total) bytes of L2 tables.
///
/// Of `data_file` only the presence and the length are used: its clusters have no counts. Fails if
/// the header cannot be parsed, the file cannot be read, or a limit is reached; everything else is
/// in the report.
pub async fn check_image(
    file: &dyn ChildPort,
    data_file: Option<&dyn ChildPort>,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<CheckReport> {
    let image = read_cluster0(file, Strictness::Inspect).await?;
    let stored = RefcountReader::open(file, &image.header).await?;
    let mut walk = RefWalk::new(file, &image, stored, MEMORY_BUDGET_LEN, progress);
    if image.header.reftable_clusters == 0 {
        walk.findings.corruption(1, "the image has no refcount table");
    }
    walk.walk().await?;
    if let Some(data_file) = data_file.filter(|d| d.len() < image.header.size) {
        walk.findings.remark(format!(
            "the data file has {} bytes, the disk {}: the rest reads as zeros",
            data_file.len(),
            image.header.size
        ));
    }
    compare(&mut walk, file.len()).await?;
    Ok(walk.findings.report)
}

/// A run of clusters with one difference.
struct Run {
    first: u64,
    count: u64,
    stored: u64,
    references: u64,
}

/// Compares stored counts with counted references, cluster by cluster.
async fn compare(walk: &mut RefWalk<'_>, file_len: u64) -> Result<()> {
    let geometry = walk.rules().geometry;
    // The last cluster need not be whole, so a reference may end behind the file.
    let clusters = geometry.clusters(file_len).max(walk.map.end());
    let per_block = geometry.refblock_entries();
    let mut comparison = Comparison {
        collided: walk.collisions.iter().map(|(cluster, _)| *cluster).collect(),
        ..Comparison::default()
    };
    let slots = walk.stored.slots();
    for slot in 0..slots {
        let first = slot.saturating_mul(per_block);
        let end = clusters.min(first.saturating_add(per_block));
        if first >= end {
            break;
        }
        comparison.compare_block(walk, slot, first..end).await?;
    }
    let uncovered = slots.saturating_mul(per_block);
    if uncovered < clusters {
        comparison.compare_with_nothing(walk, uncovered..clusters);
    }
    let Comparison { runs, shared, highest, .. } = comparison;
    report_runs(walk, runs.finish());
    report_extras(walk, &shared);
    walk.findings.report.image_end_offset = (highest + 1) << geometry.cluster_bits();
    Ok(())
}

/// The findings of the comparison so far.
#[derive(Default)]
struct Comparison {
    runs: Runs,
    /// Clusters that a second guest range claims.
    collided: BTreeSet<u64>,
    /// Clusters shared against the rules although the stored count allows it.
    shared: Vec<u64>,
    /// The last cluster that is counted or referred to.
    highest: u64,
    compared: u64,
}

impl Comparison {
    async fn compare_block(
        &mut self,
        walk: &mut RefWalk<'_>,
        slot: u64,
        range: Range<u64>,
    ) -> Result<()> {
        let geometry = walk.rules().geometry;
        let (first, last, len) = (range.start, range.end - 1, range.end - range.start);
        let unreadable = format!("refcounts of clusters {first} to {last} cannot be read");
        if let Err(bad) = walk.stored.slot(slot) {
            walk.findings.unreadable(len, format!("{unreadable}: {bad}"));
            return Ok(());
        }
        let block = match walk.stored.block(slot).await {
            Ok(Some(block)) => block,
            Ok(None) => {
                self.compare_with_nothing(walk, range);
                return Ok(());
            }
            Err(error) => {
                walk.findings.unreadable(len, format!("{unreadable}: {error}"));
                return Ok(());
            }
        };
        self.compared += len;
        if self.compared > MAX_COMPARED {
            return Err(Error::new(ErrorKind::LimitExceeded, "too many clusters to check")
                .field("clusters compared", self.compared));
        }
        let map = &walk.map;
        map.for_each(range, |cluster, references| {
            let index = geometry.refblock_index(cluster);
            let stored = read_refcount(block, geometry.refcount_order(), index).unwrap_or(0);
            let references = references.min(geometry.refcount_max());
            if stored | references == 0 {
                return;
            }
            self.highest = self.highest.max(cluster);
            self.runs.push(cluster, stored, references);
            if stored >= references && references > 1 && self.shared.len() < MAX_EXTRAS {
                let is_wrong = map.is_conflict(cluster) || self.collided.contains(&cluster);
                self.shared.extend(is_wrong.then_some(cluster));
            }
        });
        Ok(())
    }

    /// Clusters without a refcount block: all stored counts are zero.
    fn compare_with_nothing(&mut self, walk: &RefWalk<'_>, range: Range<u64>) {
        let max = walk.rules().geometry.refcount_max();
        for (cluster, references) in walk.map.used(range.start..=range.end - 1) {
            self.highest = self.highest.max(cluster);
            self.runs.push(cluster, 0, references.min(max));
        }
    }
}

/// Differences as runs of neighbours; their number is bounded, what exceeds it is only summed up.
#[derive(Default)]
struct Runs {
    done: Vec<Run>,
    current: Option<Run>,
    dropped_leaks: u64,
    dropped_corruptions: u64,
}

impl Runs {
    const MAX: usize = 1024;

    fn push(&mut self, cluster: u64, stored: u64, references: u64) {
        if stored == references {
            return;
        }
        if let Some(run) = &mut self.current {
            let fits = run.first + run.count == cluster
                && run.stored == stored
                && run.references == references;
            if fits {
                run.count += 1;
                return;
            }
        }
        self.end_run();
        self.current = Some(Run { first: cluster, count: 1, stored, references });
    }

    fn end_run(&mut self) {
        let Some(run) = self.current.take() else { return };
        if self.done.len() < Self::MAX {
            self.done.push(run);
        } else if run.stored > run.references {
            self.dropped_leaks += run.count;
        } else {
            self.dropped_corruptions += run.count;
        }
    }

    fn finish(mut self) -> Self {
        self.end_run();
        self
    }
}

fn report_runs(walk: &mut RefWalk<'_>, runs: Runs) {
    let bits = walk.rules().geometry.cluster_bits();
    let findings = &mut walk.findings;
    for Run { first, count, stored, references } in runs.done {
        let at = first << bits;
        let what = match count {
            1 => format!("cluster {first} ({at:#x}): refcount {stored}, references {references}"),
            _ => format!(
                "clusters {first} to {} (from {at:#x}): refcount {stored}, references {references}",
                first + count - 1
            ),
        };
        if stored > references {
            findings.leak(count, format!("leaked {what}"));
        } else {
            findings.corruption(u32::try_from(count).unwrap_or(u32::MAX), what);
        }
    }
    let report = &mut findings.report;
    report.leaks += runs.dropped_leaks;
    report.corruptions += runs.dropped_corruptions;
    if runs.dropped_leaks + runs.dropped_corruptions > 0 {
        findings.remark(format!(
            "and {} more leaked and {} more wrongly counted clusters",
            runs.dropped_leaks, runs.dropped_corruptions
        ));
    }
}

/// Reports sharing that the stored counts allow but no valid image has. What they do not allow, the
/// comparison has counted already.
fn report_extras(walk: &mut RefWalk<'_>, shared: &[u64]) {
    let bits = walk.rules().geometry.cluster_bits();
    for cluster in shared {
        let at = cluster << bits;
        if walk.map.is_conflict(*cluster) {
            let what = format!("cluster {cluster} ({at:#x}) belongs to owners of different kinds");
            walk.findings.corruption(1, what);
        }
    }
    for (cluster, guest) in std::mem::take(&mut walk.collisions) {
        let at = cluster << bits;
        let what = format!(
            "cluster {cluster} ({at:#x}) is shown at {guest} and at another place of the disk"
        );
        if shared.contains(&cluster) {
            walk.findings.corruption(1, what);
        } else {
            walk.findings.remark(what);
        }
    }
}

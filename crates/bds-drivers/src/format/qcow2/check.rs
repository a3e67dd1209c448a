//! Leaks and corruption, found without changing a byte.
//!
//! [`census`](super::census) counts what refers to each cluster; here the counts are compared with what the refcount blocks say.
//! Corruptions, leaks and statistics are those of `qemu-img check`, so verdicts can be compared; beyond it we find: data of a data
//! file at the wrong offset (F7), clusters that two guest ranges or two kinds of owner share although the refcount allows it,
//! and zero flags in version 2.
//!
//! Memory is budgeted ([`MEMORY_BUDGET_LEN`]); what exceeds it is an error, never a guess. Works on the raw file with a header
//! parse of its own, so it can look at an image that does not open.

use std::collections::BTreeSet;

use bds_core::driver::{CheckReport, ChildPort};
use bds_core::error::{Error, ErrorKind, Result};

use super::census::Census;
use super::entry::read_refcount;
use super::fetch::read_cluster0;
use super::header::Strictness;
use super::stored::StoredCounts;

/// Memory for counting references: 4 TiB of densely used 64-KiB clusters, and more.
const MEMORY_BUDGET_LEN: u64 = 1 << 30;
/// Counts compared before a check gives up (a sparse file can claim any number).
const MAX_COMPARED: u64 = 1 << 33;

/// Clusters shared against all rules that are named one by one.
const MAX_EXTRAS: usize = 4096;

/// Checks the image in `file`. `progress` is called with (done, total) bytes of L2 tables.
///
/// `data_file` is looked at only for its presence: its clusters have no counts. Fails if the header cannot be parsed,
/// the file cannot be read, or a limit is reached; everything else is in the report.
pub async fn check_image(
    file: &dyn ChildPort,
    data_file: Option<&dyn ChildPort>,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<CheckReport> {
    let image = read_cluster0(file, Strictness::Inspect).await?;
    let stored = StoredCounts::open(file, &image.header).await?;
    let mut census = Census::new(file, &image, stored, MEMORY_BUDGET_LEN, progress);
    if image.header.reftable_clusters == 0 {
        census.findings.corruption(1, "the image has no refcount table");
    }
    census.take().await?;
    if let Some(data_file) = data_file.filter(|d| d.len() < image.header.size) {
        census.findings.remark(format!(
            "the data file has {} bytes, the disk {}: the rest reads as zeros",
            data_file.len(),
            image.header.size
        ));
    }
    compare(&mut census, file.len()).await?;
    Ok(census.findings.report)
}

/// A run of clusters with one difference.
struct Run {
    first: u64,
    count: u64,
    stored: u64,
    references: u64,
}

/// Compares stored counts with counted references, cluster by cluster.
async fn compare(census: &mut Census<'_>, file_len: u64) -> Result<()> {
    let geometry = census.rules().geometry;
    // The last cluster need not be whole, so a reference may end behind the file.
    let clusters = geometry.clusters(file_len).max(census.map.end());
    let per_block = geometry.refblock_entries();
    let max = geometry.refcount_max();
    let order = geometry.refcount_order();
    let slots = census.stored.slots();
    let mut runs = Runs::default();
    let mut highest = None;
    let mut extras = Vec::new();
    let mut compared = 0u64;
    let collided: BTreeSet<u64> = census.collisions.iter().map(|(cluster, _)| *cluster).collect();
    for slot in 0..slots {
        let first = slot.saturating_mul(per_block);
        let end = clusters.min(first.saturating_add(per_block));
        if first >= end {
            break;
        }
        let unreadable = format!("refcounts of clusters {first} to {} cannot be read", end - 1);
        if let Err(bad) = census.stored.slot(slot) {
            census.findings.unreadable(end - first, format!("{unreadable}: {bad}"));
            continue;
        }
        let map = &census.map;
        let block = match census.stored.block(slot).await {
            Ok(block) => block,
            Err(error) => {
                census.findings.unreadable(end - first, format!("{unreadable}: {error}"));
                continue;
            }
        };
        let Some(block) = block else {
            for (cluster, references) in map.used(first..=end - 1) {
                highest = highest.max(Some(cluster));
                runs.push(cluster, 0, references.min(max));
            }
            continue;
        };
        compared += end - first;
        if compared > MAX_COMPARED {
            return Err(Error::new(ErrorKind::LimitExceeded, "too many clusters to check")
                .field("clusters in the file", clusters));
        }
        map.for_each(first..end, |cluster, references| {
            let index = geometry.refblock_index(cluster);
            let stored = read_refcount(block, order, index).unwrap_or(0);
            let references = references.min(max);
            if stored | references == 0 {
                return;
            }
            highest = highest.max(Some(cluster));
            if stored != references {
                runs.push(cluster, stored, references);
            }
            let is_allowed = stored >= references && references > 1 && extras.len() < MAX_EXTRAS;
            if is_allowed && (map.is_conflict(cluster) || collided.contains(&cluster)) {
                extras.push(cluster);
            }
        });
    }
    let uncovered = slots.saturating_mul(per_block);
    if uncovered < clusters {
        for (cluster, references) in census.map.used(uncovered..=clusters - 1) {
            highest = highest.max(Some(cluster));
            runs.push(cluster, 0, references.min(max));
        }
    }
    report_runs(census, runs.finish());
    report_extras(census, &extras);
    let end = (highest.unwrap_or(0) + 1) << geometry.cluster_bits();
    census.findings.report.image_end_offset = end;
    Ok(())
}

/// Differences as runs of neighbours; bounded, because only their sum grows without end.
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
        self.close();
        self.current = Some(Run { first: cluster, count: 1, stored, references });
    }

    fn close(&mut self) {
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
        self.close();
        self
    }
}

fn report_runs(census: &mut Census<'_>, runs: Runs) {
    let bits = census.rules().geometry.cluster_bits();
    let findings = &mut census.findings;
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

/// What the stored counts allow and yet no good image has. Where they do not allow it, the comparison has counted it already.
fn report_extras(census: &mut Census<'_>, shared: &[u64]) {
    let bits = census.rules().geometry.cluster_bits();
    for cluster in shared {
        let at = cluster << bits;
        if census.map.is_conflict(*cluster) {
            let what = format!("cluster {cluster} ({at:#x}) belongs to owners of different kinds");
            census.findings.corruption(1, what);
        }
    }
    for (cluster, guest) in std::mem::take(&mut census.collisions) {
        let at = cluster << bits;
        let what = format!(
            "cluster {cluster} ({at:#x}) is shown at {guest} and at another place of the disk"
        );
        if shared.contains(&cluster) {
            census.findings.corruption(1, what);
        } else {
            census.findings.remark(what);
        }
    }
}

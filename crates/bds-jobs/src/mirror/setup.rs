//! Sets a mirror up: opens its filter, takes its edges, and inserts the filter with tracking on.
//!
//! Everything that may fail without a trace comes first. The filter is opened with the complete
//! map, so the first write that passes it is tracked: no write falls between the insertion and the
//! begin of tracking.

use std::sync::Arc;
use std::time::Duration;

use bds_core::copy::CopyMap;
use bds_core::graph::{Access, BlockOps, Change, Graph, Holder, HolderKind, NodeRef, Perm, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};

use super::Mirror;
use super::bitmaps;
use super::filter::{Flavour, MirrorTop};
use super::options::{DEFAULT_BUF_SIZE, Lookup, MirrorOptions, MirrorSync, find_replaced};
use super::pass::{Initial, Limits};
use super::tracking::{Mode, Tracking, TrackingOptions};
use crate::chain::take_out::DROP_TIMEOUT;
use crate::record::{ContentTracker, TrackerOptions};
use crate::{CopyMode, JobChange, JobControl};

/// Granularity if the target has no clusters, and the largest default, in bytes.
const DEFAULT_GRANULARITY: u64 = 64 << 10;
/// Smallest default granularity, in bytes.
const MIN_DEFAULT_GRANULARITY: u64 = 4 << 10;

/// What a mirror and an active commit are made of.
pub(super) struct Parts {
    pub(super) options: MirrorOptions,
    pub(super) flavour: Flavour,
    /// Only what the layers above this one hold is copied at first.
    pub(super) above: Option<NodeRef>,
    pub(super) between: Vec<NodeRef>,
    pub(super) restores_read_only: bool,
    /// What other users may do with the target.
    pub(super) shared: Perm,
}

impl Mirror {
    /// Checks the options, opens what the job needs, and inserts the filter above the source.
    ///
    /// # Errors
    /// Nothing has changed. `InvalidInput`: the options (the message says which); `NotFound`: the
    /// node to be replaced; `ReadOnly`: the target; `InUse`: source or target are used in a way
    /// that does not go with it, by a user or another job, which is named.
    pub async fn prepare(options: MirrorOptions) -> Result<Self> {
        let mirror = Self::prepare_staged(options).await?;
        mirror.insert().await
    }

    /// As [`Mirror::prepare`], without the insertion: the caller adds [`Mirror::stage`] to a change
    /// of its own, then calls [`Mirror::inserted`], or [`Mirror::discard`] if the change failed.
    ///
    /// # Errors
    /// As [`Mirror::prepare`].
    pub async fn prepare_staged(options: MirrorOptions) -> Result<Self> {
        options.check()?;
        bitmaps::check(&options.source, &options.target, options.bitmaps).await?;
        let above = match options.sync {
            MirrorSync::Top => walk::next_below(&walk::skip_filters(&options.source))
                .map(|base| base.held_as(Holder::new(HolderKind::Job, options.job.clone()))),
            MirrorSync::Full | MirrorSync::None => None,
        };
        Self::open(Parts {
            options,
            flavour: Flavour::Mirror,
            above,
            between: Vec::new(),
            restores_read_only: false,
            // No other user may write the target.
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        })
        .await
    }

    /// Adds the insertion of the filter to a change. Tracking begins with it.
    pub fn stage(&self, change: Change) -> Change {
        let written = self.tracking.target().expect("it lives until the job is retired");
        let filter = self.filter.as_ref().expect("it lives until the job is retired");
        let change = change
            .insert_filter(&self.source, filter)
            .insert(&self.main, filter)
            .insert(&written, &self.target);
        self.between.iter().fold(change, |change, (edge, node)| change.insert(edge, node))
    }

    /// Ends the set-up after the change took effect.
    ///
    /// # Errors
    /// `InUse`: a link of the chain is frozen by another job. The filter is out again.
    pub async fn inserted(mut self) -> Result<Self> {
        match self.freeze() {
            Ok(()) => Ok(self),
            Err(error) => match self.give_back(false, DROP_TIMEOUT).await {
                Ok(()) => Err(error),
                Err(late) => Err(error.context(format!("and the filter stays: {late}"))),
            },
        }
    }

    /// Gives everything back after the change failed.
    ///
    /// # Errors
    /// Of the filter's close; everything was given back all the same.
    pub async fn discard(mut self) -> Result<()> {
        undo(self.content.as_deref()).await;
        self.give_back(false, DROP_TIMEOUT).await
    }

    pub(super) async fn insert(self) -> Result<Self> {
        let inserted = self.stage(self.source.graph().change()).commit().await;
        match inserted {
            Ok(_) => self.inserted().await,
            Err(error) => {
                // Nothing was inserted, so the first error is the one that matters.
                let _closed = self.discard().await;
                Err(error)
            }
        }
    }

    fn freeze(&mut self) -> Result<()> {
        let filter = self.filter.as_ref().expect("it lives until the job is retired");
        let end = match self.flavour {
            Flavour::Mirror => &self.source,
            Flavour::Commit => &self.target,
        };
        let holder = format!("job '{}'", self.job);
        self.frozen = Some(filter.graph().freeze_chain(filter, end, &holder)?);
        Ok(())
    }

    /// Opens the filter and takes the edges.
    pub(super) async fn open(parts: Parts) -> Result<Self> {
        let Parts { options, flavour, above, between, restores_read_only, shared } = parts;
        let (source, target) = (&options.source, &options.target);
        let graph = source.graph().clone();
        let (slots, blockers) = keep_others_away(&options)?;
        let (map, has_late_backing) = begin_map(&options).await?;
        let Edges { to_target, reader, main, between } =
            Edges::open(&options, flavour, between, shared)?;
        let content = ContentTracker::prepare(TrackerOptions {
            job: format!("mirror '{}'", options.job),
            source,
            target,
            record: options.record.as_ref(),
            manifest: options.manifest.as_ref(),
        })
        .await?
        .map(Arc::new);
        let tracked = TrackingOptions {
            map,
            target: to_target,
            observer: content.as_ref().map(|content| content.observer()),
            unmap: options.unmap,
            mode: options.copy_mode,
            has_late_backing,
        };
        let (tracking, filter) = match open_filter(&options, flavour, tracked).await {
            Ok(opened) => opened,
            Err(error) => {
                undo(content.as_deref()).await;
                return Err(error);
            }
        };
        let is_continued = content.as_ref().is_some_and(|content| content.is_continued());
        Ok(Self {
            control: Arc::new(Control {
                tracking: Arc::clone(&tracking),
                graph,
                source: source.id(),
                replaces: options.replaces.clone(),
            }),
            initial: Initial {
                sync: options.sync,
                above: above.map(|node| node.id()),
                // An interrupted copy has left bytes there; a backing node will show some.
                target_is_zero: options.target_is_zero && !is_continued && !has_late_backing,
            },
            limits: Limits {
                memory: if options.buf_size == 0 { DEFAULT_BUF_SIZE } else { options.buf_size },
                max_pivot_stall: options.max_pivot_stall,
            },
            job: options.job,
            flavour,
            source: options.source,
            target: options.target,
            tracking,
            content,
            has_released: false,
            bitmaps: options.bitmaps,
            reader,
            main,
            between,
            filter: Some(filter),
            frozen: None,
            blockers,
            slots,
            restores_read_only,
            drained: None,
            pivots: false,
        })
    }
}

/// The edges of a mirror; those that are empty come to their nodes with the filter.
struct Edges {
    to_target: Backend,
    reader: Backend,
    main: Backend,
    between: Vec<(Backend, NodeRef)>,
}

impl Edges {
    fn open(
        options: &MirrorOptions,
        flavour: Flavour,
        between: Vec<NodeRef>,
        shared: Perm,
    ) -> Result<Self> {
        let edge = |access| {
            let backend = BackendOptions::job(&*options.job, access);
            Backend::empty(options.source.graph(), backend)
        };
        let mut writes = Perm::WRITE;
        // Compared with the record, and read for the manifest.
        writes.set(Perm::CONSISTENT_READ, options.record.is_some() || options.manifest.is_some());
        let reads = Access { perm: reader_perm(flavour), shared: Perm::all() };
        let unread = Perm::WRITE | Perm::WRITE_UNCHANGED;
        let keep = |node| Ok((edge(Access { perm: Perm::empty(), shared: unread })?, node));
        Ok(Self {
            to_target: edge(Access { perm: writes, shared })?,
            reader: Backend::new(&options.source, BackendOptions::job(&*options.job, reads))?,
            main: edge(Access::READ)?,
            between: between.into_iter().map(keep).collect::<Result<_>>()?,
        })
    }
}

/// The map with everything to be copied, and whether the target gets its backing node later.
async fn begin_map(options: &MirrorOptions) -> Result<(CopyMap, bool)> {
    let nothing = Access { perm: Perm::empty(), shared: Perm::all() };
    let target = Backend::new(&options.target, BackendOptions::job(&*options.job, nothing))?;
    let info = target.info().await?;
    let has_backing = walk::child(&options.target, "backing").is_some();
    // What is not copied is to be seen below the target. Its header need not say so: an image that
    // has clusters can become the overlay of any node.
    let expects_backing = options.sync != MirrorSync::Full && info.cluster_size.is_some();
    let has_late_backing = !has_backing && (info.backing_file.is_some() || expects_backing);
    let granularity = granularity(options.granularity, info.cluster_size, has_late_backing)?;
    let map = CopyMap::new(options.source.len(), granularity)?;
    if options.sync != MirrorSync::None {
        map.mark_all();
    }
    Ok((map, has_late_backing))
}

/// Removes a record that was made for a mirror that does not begin.
async fn undo(content: Option<&ContentTracker>) {
    if let Some(content) = content {
        content.undo().await;
    }
}

/// The nodes between are not consistent during a commit, so nothing is promised about them.
fn reader_perm(flavour: Flavour) -> Perm {
    match flavour {
        Flavour::Mirror => Perm::CONSISTENT_READ,
        Flavour::Commit => Perm::empty(),
    }
}

/// Takes the job slots, and blocks what would change source or target under the job.
fn keep_others_away(
    options: &MirrorOptions,
) -> Result<(Vec<bds_core::graph::JobSlot>, Vec<bds_core::graph::Blocker>)> {
    let (source, target) = (&options.source, &options.target);
    let slots = vec![source.claim_job(&options.job)?, target.claim_job(&options.job)?];
    let reason = format!("job '{}' mirrors it", options.job);
    // The ends of the job use `EJECT` and `REPLACE` themselves; frozen links keep others out.
    let operations = BlockOps::all() - BlockOps::EJECT - BlockOps::REPLACE;
    let blockers = [source, target].map(|node| node.block(operations, &reason));
    Ok((slots, blockers.into()))
}

/// What filter and job share, and the filter.
async fn open_filter(
    options: &MirrorOptions,
    flavour: Flavour,
    tracked: TrackingOptions,
) -> Result<(Arc<Tracking>, NodeRef)> {
    let source = &options.source;
    // Whether discards have an effect is the source's choice.
    let mut filter = Options::new().with("file", source.name()).with("discard", "unmap");
    if !source.is_writable() {
        filter = filter.with("read-only", true);
    }
    if let Some(name) = &options.filter_node_name {
        filter = filter.with("node-name", &**name);
    }
    let tracking = Arc::new(Tracking::new(tracked)?);
    let driver = MirrorTop { flavour, tracking: Arc::clone(&tracking) };
    let filter = source.graph().open_driver(Arc::new(driver), filter).await?;
    Ok((tracking, filter))
}

/// The granularity: the user's, or the target's cluster within bounds. Never smaller than a cluster
/// whose rest the target cannot fill in by itself yet.
fn granularity(wanted: Option<u32>, cluster: Option<u64>, has_late_backing: bool) -> Result<u32> {
    let cluster = cluster.filter(|bytes| bytes.is_power_of_two());
    let default =
        cluster.unwrap_or(DEFAULT_GRANULARITY).clamp(MIN_DEFAULT_GRANULARITY, DEFAULT_GRANULARITY);
    let chosen = wanted.filter(|bytes| *bytes != 0).map_or(default, u64::from);
    let chosen = match cluster {
        Some(cluster) if has_late_backing => chosen.max(cluster),
        _ => chosen,
    };
    u32::try_from(chosen).map_err(|_| {
        let message = "the target's clusters are too large to be tracked";
        Error::new(ErrorKind::NotSupported, message).field("cluster_size", chosen)
    })
}

/// Receives the commands of a running mirror.
pub(super) struct Control {
    tracking: Arc<Tracking>,
    graph: Graph,
    source: bds_core::graph::NodeId,
    replaces: Option<String>,
}

impl Control {
    /// The node whose place the target takes, looked up now; `None`: the source.
    pub(super) fn find_replaced(&self) -> Result<Option<NodeRef>> {
        let Some(name) = &self.replaces else { return Ok(None) };
        let source = self.graph.acquire(self.source)?;
        find_replaced(&source, name, Lookup::AtComplete).map(Some)
    }
}

impl JobControl for Control {
    fn complete(&self) -> Result<()> {
        self.find_replaced().map(drop)
    }

    fn change(&self, change: JobChange) -> Result<()> {
        let JobChange::MirrorCopyMode(mode) = change;
        match (self.tracking.mode(), mode) {
            (Mode::Synced, CopyMode::Background) => {
                let message = "Change to copy mode 'background' is not implemented";
                Err(Error::new(ErrorKind::NotSupported, message))
            }
            (_, CopyMode::WriteBlocking) => {
                self.tracking.set_mode(Mode::Synced);
                self.tracking.set_delay(Duration::ZERO);
                Ok(())
            }
            (_, CopyMode::Background) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_granularity_is_the_cluster_within_bounds() {
        for (wanted, cluster, late, expected) in [
            (None, None, false, 65536),
            (None, Some(512), false, 4096),
            (None, Some(8192), false, 8192),
            (None, Some(2 << 20), false, 65536),
            (None, Some(2 << 20), true, 2 << 20),
            (Some(512), Some(65536), false, 512),
            (Some(512), Some(65536), true, 65536),
            (Some(0), None, false, 65536),
        ] {
            assert_eq!(granularity(wanted, cluster, late).unwrap(), expected);
        }
    }
}

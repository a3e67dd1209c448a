//! The active commit: a mirror of a disk into an image below it in its own chain.
//!
//! What the layers above the base hold goes into the base while the guest goes on; at the end
//! (`complete`) the base takes the disk's place. It never ends by itself. Until then the disk shows
//! what it showed before: the layers above decide every byte that is copied, so it does not matter
//! to the disk what the base holds there. The base alone, and the nodes between, are inconsistent
//! from the first copy on, and no other user may read them.
//!
//! A base that is shorter is grown first, with zeros: what the chain shows beyond its end now. A
//! base that is longer keeps its length.

use std::time::Duration;

use bds_core::driver::{Role, Truncate};
use bds_core::graph::{Access, NodeRef, Perm, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Result};

use super::Mirror;
use super::filter::Flavour;
use super::options::{MirrorOptions, MirrorSync, check_granularity};
use super::pivot::set_read_only;
use super::setup::Parts;
use crate::CopyMode;
use crate::chain::headers::forget_base;

/// Options of an active commit; make them with [`ActiveCommitOptions::new`] and `..`.
#[derive(Clone, Debug)]
pub struct ActiveCommitOptions {
    /// The disk: the top of the chain, in use or not.
    pub top: NodeRef,
    /// The image that it is committed into; the lowest of the chain by default.
    pub base: Option<NodeRef>,
    /// The job's id, for messages.
    pub job: String,
    /// As [`MirrorOptions::granularity`].
    pub granularity: Option<u32>,
    /// As [`MirrorOptions::buf_size`].
    pub buf_size: u64,
    /// As [`MirrorOptions::copy_mode`].
    pub copy_mode: CopyMode,
    /// As [`MirrorOptions::filter_node_name`].
    pub filter_node_name: Option<String>,
    /// As [`MirrorOptions::max_pivot_stall`].
    pub max_pivot_stall: Option<Duration>,
}

impl ActiveCommitOptions {
    /// Options with QEMU's defaults.
    pub fn new(top: &NodeRef, job: impl Into<String>) -> Self {
        Self {
            top: top.clone(),
            base: None,
            job: job.into(),
            granularity: None,
            buf_size: 0,
            copy_mode: CopyMode::Background,
            filter_node_name: None,
            max_pivot_stall: None,
        }
    }
}

/// Makes active commits.
#[derive(Clone, Copy, Debug)]
pub struct ActiveCommit;

impl ActiveCommit {
    /// Checks the options, makes the base writable and long enough, and inserts the filter.
    ///
    /// # Errors
    /// `InvalidInput`: the options; `InUse`: another user reads the base or a node between, or uses
    /// the disk in a way that does not go with it. Nothing has changed then, but a base that was
    /// grown stays so.
    pub async fn prepare(options: ActiveCommitOptions) -> Result<Mirror> {
        let (base, between) = chain(&options)?;
        check_granularity(options.granularity)?;
        forget_base(between.last().unwrap_or(&options.top), &options.job).await;
        let restores_read_only = !base.is_writable();
        if restores_read_only {
            set_read_only(&base, false).await?;
        }
        let prepared = Self::prepare_writable(options, &base, between, restores_read_only).await;
        match prepared {
            Err(error) if restores_read_only => match set_read_only(&base, true).await {
                Ok(()) => Err(error),
                Err(late) => Err(error.context(format!("and the base stays writable: {late}"))),
            },
            prepared => prepared,
        }
    }

    async fn prepare_writable(
        options: ActiveCommitOptions,
        base: &NodeRef,
        between: Vec<NodeRef>,
        restores_read_only: bool,
    ) -> Result<Mirror> {
        grow(base, options.top.len(), &options.job).await?;
        let mirror = MirrorOptions {
            sync: MirrorSync::Top,
            granularity: options.granularity,
            buf_size: options.buf_size,
            copy_mode: options.copy_mode,
            filter_node_name: options.filter_node_name,
            max_pivot_stall: options.max_pivot_stall,
            ..MirrorOptions::new(&options.top, base, options.job)
        };
        let parts = Parts {
            options: mirror,
            flavour: Flavour::Commit,
            above: Some(base.clone()),
            between,
            // Set once the filter is in: until then, `discard` has nothing to restore.
            restores_read_only: false,
            shared: Perm::WRITE_UNCHANGED,
        };
        let mut mirror = Mirror::open(parts).await?.insert().await?;
        mirror.restores_read_only = restores_read_only;
        Ok(mirror)
    }
}

/// The base, and the nodes between the disk and the base.
fn chain(options: &ActiveCommitOptions) -> Result<(NodeRef, Vec<NodeRef>)> {
    let refuse = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
    let mut between = Vec::new();
    let mut at = options.top.clone();
    if options.base.as_ref().is_some_and(|base| base.id() == at.id()) {
        return refuse("cannot commit an image into itself".to_owned());
    }
    // With the default base: how many of them lie above the lowest image that is a backing node.
    let mut lowest = None;
    while let Some(below) = walk::next_below(&at) {
        if options.base.as_ref().is_some_and(|base| base.id() == below.id()) {
            return Ok((below, between));
        }
        let is_backing = walk::children(&at)
            .into_iter()
            .any(|(_, role, node)| role.contains(Role::COW) && node.id() == below.id());
        if is_backing {
            lowest = Some(between.len());
        }
        between.push(below.clone());
        at = below;
    }
    match (&options.base, lowest) {
        (Some(base), _) => refuse(format!("Can't find '{}' in the backing chain", base.name())),
        (None, None) => refuse("There is no backimg image".to_owned()),
        (None, Some(place)) => {
            between.truncate(place + 1);
            let base = between.pop().expect("it was pushed at that place");
            Ok((base, between))
        }
    }
}

/// Grows the base to this length; what is new reads as zeros.
async fn grow(base: &NodeRef, len: u64, job: &str) -> Result<()> {
    if base.len() >= len {
        return Ok(());
    }
    let access = Access { perm: Perm::WRITE | Perm::RESIZE, shared: Perm::all() };
    let edge = Backend::new(base, BackendOptions::job(job, access))?;
    edge.truncate(Truncate { zero_new: true, ..Truncate::to(len) }).await?;
    // Durable before anything refers to it.
    edge.flush().await
}

//! The `copy-before-write` filter: keeps what a write is about to change, so that a snapshot of the
//! node can be read on.
//!
//! ```text
//! frozen        reads of old data in the node, which writes wait for
//! stage         old data in memory and in a spill file, on its way to the target
//! snapshot      which granules are to be kept, were kept, may be changed
//! keep          what a change does before it goes on
//! write_behind  the tasks that write staged data to the target, and to the spill file
//! view          reads of the snapshot
//! old_data      reads of a job that copies the rest
//! node          the driver
//! ```
//!
//! Options are QEMU's `file`, `target`, `bitmap`, `on-cbw-error`, `cbw-timeout` (seconds) and
//! `min-cluster-size`, and some that QEMU does not have: `staging-size` (bytes), `spill` (a node)
//! with `spill-size` (bytes), and `staging-policy`. With them a write waits only until its old data
//! is in memory, and a target that is slow or stuck holds up no guest until memory and spill file
//! are full. The snapshot is read through `snapshot-access`.
//!
//! Errors at open: `InvalidInput`: the sizes differ, or an option is out of range.
//!
//! A flush of this node does not flush the target: a user that needs the copy to be durable flushes
//! the target. Its event is `SNAPSHOT_BROKEN`.

pub mod access;
mod frozen;
mod keep;
mod node;
mod old_data;
mod snapshot;
mod stage;
mod view;
mod write_behind;

use std::sync::Arc;
use std::time::Duration;

use bds_core::bitmap::HBitmap;
use bds_core::copy::CopyMap;
use bds_core::driver::{
    BoxFuture, Category, Child, Driver, DriverType, OpenContext, Role, WriteFlags,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};

use super::pass_through::filter_type;
use keep::Parts;
use node::CopyBeforeWriteNode;
pub use old_data::OldData;
pub use snapshot::{OnCbwError, Snapshot, SnapshotOptions};
pub use stage::{AtLimit, StageFailure, StagingInfo};

/// Smallest granule, in bytes.
pub const MIN_GRANULE: u32 = 64 << 10;

/// The `copy-before-write` filter.
#[derive(Clone, Copy, Debug)]
pub struct CopyBeforeWrite;

const fn spec(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec { name, kind, help, default: None }
}

const OPEN_OPTIONS: &[OptionSpec] = &[
    spec("file", OptionKind::Child, "the node whose old data is kept"),
    spec("target", OptionKind::Child, "the node that old data is copied to"),
    spec("spill", OptionKind::Child, "a node that takes old data which memory has no space for"),
    spec("bitmap.node", OptionKind::String, "the file's node, for a bitmap"),
    spec("bitmap.name", OptionKind::String, "a bitmap: only what is dirty in it is kept"),
    OptionSpec {
        name: "on-cbw-error",
        kind: OptionKind::Choice(&["break-guest-write", "break-snapshot"]),
        help: "what happens when old data cannot be kept",
        default: Some("break-guest-write"),
    },
    OptionSpec {
        name: "cbw-timeout",
        kind: OptionKind::Number,
        help: "longest wait of a write for its old data, in seconds; 0: no limit",
        default: Some("0"),
    },
    OptionSpec {
        name: "min-cluster-size",
        kind: OptionKind::Size,
        help: "bytes that are kept together at least, a power of two",
        default: Some("64K"),
    },
    OptionSpec {
        name: "staging-size",
        kind: OptionKind::Size,
        help: "bytes of old data that may wait in memory for the target; 0: writes wait for it",
        default: Some("0"),
    },
    spec("spill-size", OptionKind::Size, "bytes of the spill node that are used; default: all"),
    OptionSpec {
        name: "staging-policy",
        kind: OptionKind::Choice(&["stall", "break-snapshot", "throttle"]),
        help: "what happens when that much old data waits",
        default: Some("stall"),
    },
];

filter_type!(CopyBeforeWrite, "copy-before-write", "old data is copied before it is overwritten");

impl CopyBeforeWrite {
    async fn open_node(&self, context: &mut OpenContext<'_>) -> Result<CopyBeforeWriteNode> {
        let mut options = take_options(&mut context.options)?;
        let min_len = take_min_cluster(&mut context.options)?;
        let children = open_children(context).await?;
        let Children { file, target, spill } = &children;
        options.spill_len = spill_len(spill.as_ref(), context.options.take_size("spill-size")?)?;
        if target.status_down_to(&file.node_name(), 0, 0).await.is_ok() {
            check_target_above(options.staging_len)?;
            options.write_flags = WriteFlags::SERIALISING;
        }
        let info = target.info().await?;
        let granule = granule(min_len, info.cluster_size)?;
        let map = Arc::new(CopyMap::new(file.len(), granule)?);
        match take_bitmap(&mut context.options, file)? {
            Some(bits) => map.bitmap().merge(&bits)?,
            None => map.mark_all(),
        }
        make_node(context, children, Snapshot::new(map, options)?, false)
    }
}

/// The filter of a job, which shares its snapshot.
#[derive(Clone, Debug)]
pub struct SharedCopyBeforeWrite {
    snapshot: Arc<Snapshot>,
    shares_writes: bool,
}

impl SharedCopyBeforeWrite {
    /// A filter that keeps this snapshot. `shares_writes`: lets the job write to the file, to
    /// discard what was copied.
    pub fn new(snapshot: Arc<Snapshot>, shares_writes: bool) -> Self {
        Self { snapshot, shares_writes }
    }
}

impl DriverType for SharedCopyBeforeWrite {
    fn name(&self) -> &'static str {
        "copy-before-write"
    }

    fn category(&self) -> Category {
        Category::Filter
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        &OPEN_OPTIONS[..3]
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let children = open_children(context).await?;
            let snapshot = Arc::clone(&self.snapshot);
            let node = make_node(context, children, snapshot, self.shares_writes)?;
            Ok(Box::new(node) as Box<dyn Driver>)
        })
    }
}

/// Checks a snapshot whose target has the disk below it: readers of the target see the disk where
/// nothing was copied. Each write to the target must wait for them
/// ([`WriteFlags::SERIALISING`](bds_core::driver::WriteFlags)), and must be there before the disk
/// changes.
///
/// # Errors
/// `InvalidInput`: data would be staged.
pub fn check_target_above(staging_len: u64) -> Result<()> {
    if staging_len == 0 {
        return Ok(());
    }
    let words = "readers of a target on top of the disk would miss staged data: use another target \
                 and read through snapshot-access";
    Err(Error::new(ErrorKind::InvalidInput, words).field("staging-size", staging_len))
}

/// Bytes that are kept together: at least [`MIN_GRANULE`], `min_len` and the target's clusters.
///
/// # Errors
/// `InvalidInput`: more than 2 GiB.
pub fn granule(min_len: u64, cluster_len: Option<u64>) -> Result<u32> {
    let len = min_len.max(cluster_len.unwrap_or(0)).max(u64::from(MIN_GRANULE));
    u32::try_from(len).ok().filter(|len| len.is_power_of_two()).ok_or_else(|| {
        let words = "the cluster size must be a power of two up to 2 GiB";
        Error::new(ErrorKind::InvalidInput, words).field("min-cluster-size", len)
    })
}

/// The nodes below the filter.
struct Children {
    file: Child,
    target: Child,
    spill: Option<Child>,
}

async fn open_children(context: &mut OpenContext<'_>) -> Result<Children> {
    let file = context.child("file", Role::FILTERED | Role::PRIMARY).await?;
    // Without a role: the target holds none of this node's bytes, so its flush is not this node's.
    let target = context.child("target", Role::empty()).await?;
    if file.len() != target.len() {
        let words = "Source and target image have different sizes";
        return Err(Error::new(ErrorKind::InvalidInput, words));
    }
    let spill = context.reference("spill", Role::empty(), None).await?;
    Ok(Children { file, target, spill })
}

/// Bytes of the spill node that are used; 0 without one.
///
/// # Errors
/// `InvalidInput`: it is shorter than that; there is none, and a size was given.
fn spill_len(spill: Option<&Child>, wanted: Option<u64>) -> Result<u64> {
    let wrong = |words: String| Err(Error::new(ErrorKind::InvalidInput, words));
    let Some(spill) = spill else {
        return match wanted {
            None | Some(0) => Ok(0),
            Some(_) => wrong("option 'spill-size' needs a node as 'spill'".to_owned()),
        };
    };
    match (wanted.filter(|len| *len != 0), spill.len()) {
        (Some(wanted), len) if wanted > len => {
            let name = spill.node_name();
            wrong(format!("spill node '{name}' has only {len} bytes: make it larger"))
        }
        (_, 0) => wrong(format!("spill node '{}' is empty: make it larger", spill.node_name())),
        (wanted, len) => Ok(wanted.unwrap_or(len)),
    }
}

fn make_node(
    context: &OpenContext<'_>,
    Children { file, target, spill }: Children,
    snapshot: Arc<Snapshot>,
    shares_writes: bool,
) -> Result<CopyBeforeWriteNode> {
    if snapshot.map().len() != file.len() {
        let words = "the disk was resized meanwhile";
        return Err(Error::new(ErrorKind::InvalidInput, words));
    }
    spill_len(spill.as_ref(), Some(snapshot.options.spill_len))?;
    snapshot.attach(context.node_name, context.events.clone())?;
    let parts = Arc::new(Parts { file, target, spill, snapshot, shares_writes });
    parts.snapshot.set_parts(&parts);
    Ok(CopyBeforeWriteNode(parts))
}

/// The dirty bits of the bitmap that the options name.
fn take_bitmap(options: &mut Options, file: &Child) -> Result<Option<HBitmap>> {
    let (node, name) = (options.take_str("bitmap.node")?, options.take_str("bitmap.name")?);
    let wrong = |words: &str| Error::new(ErrorKind::InvalidInput, words);
    match (node, name) {
        (None, None) => Ok(None),
        (Some(node), Some(name)) if node == file.node_name() => file.copy_bitmap(&name).map(Some),
        (Some(node), Some(_)) => {
            Err(wrong("the bitmap must be one of the file's node").field("bitmap.node", node))
        }
        _ => Err(wrong("option 'bitmap' needs both 'node' and 'name'")),
    }
}

fn take_min_cluster(options: &mut Options) -> Result<u64> {
    let len = options.take_size("min-cluster-size")?.unwrap_or(0);
    if len != 0 && !len.is_power_of_two() {
        let words = "min-cluster-size needs to be a power of 2";
        return Err(Error::new(ErrorKind::InvalidInput, words).field("min-cluster-size", len));
    }
    Ok(len)
}

fn take_options(options: &mut Options) -> Result<SnapshotOptions> {
    let on_error = options.take_choice(
        "on-cbw-error",
        &[
            ("break-guest-write", OnCbwError::BreakGuestWrite),
            ("break-snapshot", OnCbwError::BreakSnapshot),
        ],
    )?;
    let timeout = options.take_u64("cbw-timeout")?.unwrap_or(0);
    let at_limit = options.take_choice(
        "staging-policy",
        &[
            ("stall", AtLimit::Stall),
            ("break-snapshot", AtLimit::BreakSnapshot),
            ("throttle", AtLimit::Throttle),
        ],
    )?;
    Ok(SnapshotOptions {
        on_error: on_error.unwrap_or_default(),
        timeout: (timeout != 0).then(|| Duration::from_secs(timeout)),
        staging_len: options.take_size("staging-size")?.unwrap_or(0),
        at_limit: at_limit.unwrap_or_default(),
        ..SnapshotOptions::default()
    })
}

//! Copy on read: a read writes what it finds below into the node it reads.
//!
//! Requested by [`ReadFlags::COPY_ON_READ`] or by a [`CopyOnReadGuard`] of the node. What the node
//! itself holds is read as usual. The rest is copied in pieces of whole units (those in which the
//! node's zero writes work best: its clusters or subclusters):
//!
//! ```text
//! piece registered as serialising ─► status again ─► read through the driver
//!   ─► written back, unchanged ─► caller gets a copy
//! ```
//!
//! A task copies a piece, is in flight at the node, and holds the piece's range: a late write of
//! what was read before must not overwrite what the guest writes next, so it ends before the range
//! is free, even if the reader is gone. It calls only the driver, never this node's request path,
//! so it cannot wait for its own range.
//!
//! What is read is the same before, during and after; a read fails if its copy cannot be written.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::holder_kind::HolderKind;
use bds_io::{Buf, IoVec};

use super::admit::{Admission, DetachedGuard, Entered, RequestScope};
use super::block_io::{self, bounce_align, read_aligned, write_aligned};
use super::range::{self, CheckedRange, round_down, round_up};
use super::{status, zero};
use crate::driver::{Limits, ReadFlags, StatusFlags, WriteFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Access, Edge, NodeRef, Perm, Root};

/// Longest piece, in bytes (longer only if a single block of the node is). A power of two.
const PIECE_LEN: u64 = 16 << 20;
/// Length of the buffer that a prefetch repeats to say how many bytes it wants: their values are
/// not used.
const BLIND_LEN: usize = 64 << 10;

/// Makes reads of its node copy what they find below into the node while it lives. Guards add up.
#[derive(Debug)]
#[must_use = "reads copy until this is dropped"]
pub struct CopyOnReadGuard {
    node: NodeRef,
    /// Holds the permission to write unchanged bytes, here and further down.
    _root: Arc<Edge>,
}

impl NodeRef {
    /// Makes reads of this node copy what they find below into it, as long as the guard lives. The
    /// guard keeps the node open.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::{Precision, StatusFlags};
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let guard = top.enable_copy_on_read()?;
    /// let guest = Backend::new(&top, BackendOptions::registered("guest"))?;
    /// guest.read(0, bds_io::Buf::zeroed(512, 512).iov()).await?;
    /// let run = guest.layer_status(0, 4096, Precision::Exact).await?;
    /// assert!(run.flags.contains(StatusFlags::ALLOCATED), "the block is in 'top' now");
    ///
    /// let error = graph.reopen(&top, Options::parse("read-only=on")?).await.unwrap_err();
    /// assert!(error.to_string().contains("end copy-on-read first"), "{error}");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `ReadOnly` or `Inactive` if the node is, `InUse` if a user of the node does not share
    /// writing.
    #[track_caller]
    pub fn enable_copy_on_read(&self) -> Result<CopyOnReadGuard> {
        if !self.could_write() {
            let words = "copy-on-read writes to the node, which is read-only; open it for writing";
            return Err(Error::new(ErrorKind::ReadOnly, words).node(self.name()));
        }
        let root = Root {
            kind: HolderKind::User,
            name: "copy-on-read",
            access: Access { perm: Perm::WRITE_UNCHANGED, shared: Perm::all() },
            is_fixed: true,
            is_backend: false,
        };
        let root = self.graph().attach_root(Some(self), &root)?;
        self.copy_on_read().fetch_add(1, Ordering::Relaxed);
        Ok(CopyOnReadGuard { node: self.clone(), _root: root })
    }
}

impl CopyOnReadGuard {
    /// The node whose reads copy.
    pub fn node(&self) -> &NodeRef {
        &self.node
    }
}

impl Drop for CopyOnReadGuard {
    fn drop(&mut self) {
        self.node.copy_on_read().fetch_sub(1, Ordering::Relaxed);
    }
}

/// Copies a range up without returning its bytes, for a request that has entered. `memory`, as long
/// as the range, is what the copy may use for its bytes.
pub(super) async fn copy_up(
    edge: &Arc<Edge>,
    node: &Entered<'_>,
    range: CheckedRange,
    memory: Option<IoVec>,
) -> Result<()> {
    let CheckedRange { start, end } = range;
    let mut at = start;
    while at < end {
        let next = end.min(at + PIECE_LEN);
        let piece = CheckedRange { start: at, end: next };
        let memory = memory.as_ref().map(|iov| iov.slice(index(at - start)..index(next - start)));
        let flags = ReadFlags::PREFETCH | ReadFlags::COPY_ON_READ;
        read_into(edge, node, piece, Destination::Nowhere(memory), flags).await?;
        at = next;
    }
    Ok(())
}

/// Reads and copies up, for a request that has entered.
pub(super) async fn read(
    edge: &Arc<Edge>,
    node: &Entered<'_>,
    range: CheckedRange,
    iov: IoVec,
    flags: ReadFlags,
) -> Result<()> {
    let to = match flags.contains(ReadFlags::PREFETCH) {
        true => Destination::Nowhere(None),
        false => Destination::Caller(iov),
    };
    read_into(edge, node, range, to, flags).await
}

/// Where the bytes go that are read.
enum Destination {
    /// To the caller, who may change its buffer meanwhile.
    Caller(IoVec),
    /// Nowhere: only the copy matters. It may use this memory, as long as the range, which no one
    /// else writes to.
    Nowhere(Option<IoVec>),
}

async fn read_into(
    edge: &Arc<Edge>,
    node: &Entered<'_>,
    range: CheckedRange,
    to: Destination,
    flags: ReadFlags,
) -> Result<()> {
    let CheckedRange { start: offset, end } = range;
    let below = flags.difference(ReadFlags::COPY_ON_READ);
    let is_requested = flags.contains(ReadFlags::COPY_ON_READ);
    // An inactive node is not written to, nor is a read-only one that merely has a guard.
    if !node.is_active() || !is_requested && !node.is_writable() {
        let iov = match to {
            Destination::Caller(iov) => iov,
            Destination::Nowhere(_) => blind(index(end - offset)),
        };
        return block_io::read(node, range, iov, below).await;
    }
    if is_requested {
        range::check_write(edge, node, 0, range::write_perms(true))?;
    }
    let limits = node.limits();
    let align = u64::from(limits.request_alignment);
    // Units longer than a piece are not copied as wholes, so that a buffer is bounded.
    let unit = align.max(PIECE_LEN.min(limits.zero_alignment.into()));
    let reach = round_up(node.len(), align);
    // The caller's bytes from `done` on are not filled yet.
    let mut done = offset;
    let part = |iov: &IoVec, range: &Range<u64>| {
        iov.slice(index(range.start - offset)..index(range.end - offset))
    };
    while done < end.min(reach) {
        let len = end.min(reach).min(round_down(done, unit) + PIECE_LEN.max(unit)) - done;
        let (len, held) = status::run_entered(node, done, len).await?;
        if len == 0 {
            break;
        }
        // At the end of a node that ends inside a block, the run ends there too.
        let next = end.min(done + len);
        if is_held(held) {
            if let Destination::Caller(iov) = &to {
                let range = CheckedRange { start: done, end: next };
                block_io::read(node, range, part(iov, &(done..next)), below).await?;
            }
        } else {
            let piece = round_down(done, unit)..round_up(next, unit).min(reach);
            let head = index(done - piece.start);
            let is_inside = offset <= piece.start && piece.end <= end;
            let memory = match &to {
                Destination::Nowhere(Some(iov)) if is_inside => Some(part(iov, &piece)),
                _ => None,
            };
            let copied = copy_piece(node, limits, piece, memory).await?;
            if let Destination::Caller(iov) = &to {
                let wanted = part(iov, &(done..next));
                wanted.copy_from_iov(0, &copied.slice(head..head + wanted.len()));
            }
        }
        done = next;
    }
    if let Destination::Caller(iov) = to
        && done < end
    {
        iov.fill(index(done - offset)..iov.len(), 0);
    }
    Ok(())
}

/// A buffer of this length whose bytes are not used.
fn blind(len: usize) -> IoVec {
    let block = Buf::zeroed(len.min(BLIND_LEN), 1);
    let mut iov = IoVec::default();
    let mut left = len;
    while left > 0 {
        let take = left.min(BLIND_LEN);
        iov.push(block.slice(0..take));
        left -= take;
    }
    iov
}

/// True if there is nothing to copy. Zeros that no layer holds are zeros because nothing lies
/// below.
fn is_held(flags: StatusFlags) -> bool {
    flags.intersects(StatusFlags::ALLOCATED | StatusFlags::ZERO)
}

/// Copies what the node does not hold of `piece` (whole units, or up to the node's end). Returns
/// all of its bytes as the node shows them. `memory`: as long as the piece; by default a buffer of
/// our own, because a guest may change its buffer while we write.
async fn copy_piece(
    node: &Entered<'_>,
    limits: Limits,
    piece: Range<u64>,
    memory: Option<IoVec>,
) -> Result<IoVec> {
    let guard = node.detached_guard();
    let iov = memory.unwrap_or_else(|| {
        Buf::zeroed(index(piece.end - piece.start), bounce_align(&limits)).iov()
    });
    let copy = async move { copy_detached(&guard, &limits, piece, iov).await };
    bds_io::spawn(copy).detach_on_drop().await
}

async fn copy_detached(
    node: &DetachedGuard,
    limits: &Limits,
    piece: Range<u64>,
    iov: IoVec,
) -> Result<IoVec> {
    let scope = node.admit(Admission::read(piece.clone()).serialising()).await?;
    read_aligned(node, limits, piece.start, iov.clone(), ReadFlags::empty()).await?;
    let align = u64::from(limits.request_alignment);
    let mut at = piece.start;
    while at < piece.end {
        let (len, held) = status::run_entered(node, at, piece.end - at).await?;
        if len == 0 {
            break;
        }
        let next = round_up(at + len, align).min(piece.end);
        if !is_held(held) {
            let part = iov.slice(index(at - piece.start)..index(next - piece.start));
            write_back(node, &scope, limits, at, part)
                .await
                .map_err(|e| e.context("cannot keep what was read from below").at(at))?;
        }
        at = next;
    }
    Ok(iov)
}

async fn write_back(
    node: &DetachedGuard,
    scope: &RequestScope<'_>,
    limits: &Limits,
    offset: u64,
    iov: IoVec,
) -> Result<()> {
    let _writing = node.writing();
    let len = iov.len();
    if node.driver().zero_flags().is_some() && iov.is_zero(0..len) {
        return zero::keep_zeroes(scope, limits, offset, offset + len as u64).await;
    }
    write_aligned(scope, limits, offset, iov, WriteFlags::UNCHANGED).await.map(drop)
}

/// A distance inside one request.
fn index(len: u64) -> usize {
    usize::try_from(len).expect("a request fits into memory")
}

//! Copy on read: what a read finds below is kept in the node that was asked.
//!
//! Asked for by [`ReadFlags::COPY_ON_READ`] or by a [`CopyOnReadGuard`] of the node. What the node holds already is read as
//! ever. The rest goes up in pieces of whole units (those in which the node's zero writes work best: its clusters or subclusters):
//!
//! ```text
//! piece registered as serialising ─► status again ─► read through the driver ─► written back, unchanged ─► caller gets a copy
//! ```
//!
//! A piece is copied by a task of its own that is inside the node and holds the piece's place: a late write of what was
//! read before must not overwrite what the guest writes next, so it ends before the range is free, whether or not the reader
//! is still there. Only the driver is called, never this node's corridor, so nothing waits for its own place.
//!
//! What is read is the same before, during and after; a read fails if its copy cannot be kept.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::holder_kind::HolderKind;
use bds_io::{Buf, IoVec};

use super::begun::Inside;
use super::dispatch::{bounce_align, read_aligned, read_inside, write_aligned};
use super::enter::{DetachedGuard, Entered};
use super::range::{self, round_down, round_up};
use super::{status, zero};
use crate::driver::{Limits, ReadFlags, StatusFlags, WriteFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Access, Edge, NodeRef, Perm, Root};

/// Longest piece, in bytes (longer only if a single block of the node is). A power of two.
const PIECE_LEN: u64 = 16 << 20;
/// What says "so many bytes" where nobody looks at them.
const BLIND_LEN: usize = 64 << 10;

/// While it lives, reads of its node copy what they find below into the node. Guards add up.
#[derive(Debug)]
#[must_use = "reads copy until this is dropped"]
pub struct CopyOnReadGuard {
    node: NodeRef,
    /// Holds the permission to write what is read anyway, here and further down.
    _root: Arc<Edge>,
}

impl NodeRef {
    /// Lets reads of this node copy what they find below into it, for as long as the guard lives. The guard keeps the
    /// node open.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let base = open(&graph, "driver=memory,node-name=base,size=1M").await?;
    /// let layer = "driver=layer,node-name=top,file.driver=memory,file.size=1M,backing=base";
    /// let top = open(&graph, layer).await?;
    /// let guard = top.enable_copy_on_read()?;
    /// let guest = Backend::new(&top, BackendOptions::registered("guest"))?;
    /// guest.read(0, bds_io::Buf::zeroed(512, 512).iov()).await?;
    /// let run = guest.layer_status(0, 4096, true).await?;
    /// assert!(run.flags.contains(StatusFlags::ALLOCATED), "the block is in 'top' now");
    ///
    /// let error = graph.reopen(&top, Options::parse("read-only=on")?).await.unwrap_err();
    /// assert!(error.to_string().contains("end copy-on-read first"), "{error}");
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// `ReadOnly` or `Inactive` if the node is, `InUse` if somebody does not bear that it is written to.
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
            stays: true,
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

/// Copies up without giving anything back, for a request that is inside.
pub(super) async fn copy_up(
    edge: &Arc<Edge>,
    node: &Entered<'_>,
    offset: u64,
    len: u64,
) -> Result<()> {
    let flags = ReadFlags::PREFETCH | ReadFlags::COPY_ON_READ;
    let end = range::check(offset, len)?;
    let mut at = offset;
    while at < end {
        let next = end.min(at + PIECE_LEN);
        let mut left = usize::try_from(next - at).expect("a piece fits into memory");
        let blind = Buf::zeroed(left.min(BLIND_LEN), 1);
        let mut iov = IoVec::default();
        while left > 0 {
            let take = left.min(BLIND_LEN);
            iov.push(blind.slice(0..take));
            left -= take;
        }
        read(edge, node, at, iov, flags).await?;
        at = next;
    }
    Ok(())
}

/// Reads and copies, for a request that is inside.
pub(super) async fn read(
    edge: &Arc<Edge>,
    node: &Entered<'_>,
    offset: u64,
    iov: IoVec,
    flags: ReadFlags,
) -> Result<()> {
    let end = range::check_data(offset, iov.len() as u64)?;
    let below = flags.difference(ReadFlags::COPY_ON_READ);
    let is_asked = flags.contains(ReadFlags::COPY_ON_READ);
    // Whoever is not in charge of the bytes only reads them.
    if !node.is_active() || !is_asked && !node.is_writable() {
        return read_inside(node, offset, iov, below).await;
    }
    if is_asked {
        range::check_write(edge, node, 0, true)?;
    }
    let limits = node.limits();
    let align = u64::from(limits.request_alignment);
    // Units longer than a piece are not copied as wholes: a buffer is bounded, whatever a node says of itself.
    let unit = align.max(PIECE_LEN.min(limits.zero_alignment.into()));
    let reach = round_up(node.len(), align);
    // The caller's bytes from `done` on are not there yet.
    let mut done = offset;
    let part =
        |range: Range<u64>| iov.slice(index(range.start - offset)..index(range.end - offset));
    while done < end.min(reach) {
        let len = end.min(reach).min(round_down(done, unit) + PIECE_LEN.max(unit)) - done;
        let (len, held) = status::run_inside(node, done, len).await?;
        if len == 0 {
            break;
        }
        // At the end of a node that ends inside a block, the run ends there too.
        let next = end.min(done + len);
        let wanted = part(done..next);
        if is_held(held) {
            if !flags.contains(ReadFlags::PREFETCH) {
                read_inside(node, done, wanted, below).await?;
            }
        } else {
            let piece = round_down(done, unit)..round_up(next, unit).min(reach);
            let head = index(done - piece.start);
            let copied = copy_piece(node, limits, piece).await?;
            if !flags.contains(ReadFlags::PREFETCH) {
                wanted.copy_from_iov(0, &copied.slice(head..head + wanted.len()));
            }
        }
        done = next;
    }
    if done < end && !flags.contains(ReadFlags::PREFETCH) {
        iov.fill(index(done - offset)..iov.len(), 0);
    }
    Ok(())
}

/// Is there nothing to copy? Zeros that no layer holds are zeros because nothing lies below.
fn is_held(flags: StatusFlags) -> bool {
    flags.intersects(StatusFlags::ALLOCATED | StatusFlags::ZERO)
}

/// Copies what the node does not hold of `piece` (whole units, or up to the node's end). All of its bytes as the node shows them.
async fn copy_piece(node: &Entered<'_>, limits: Limits, piece: Range<u64>) -> Result<IoVec> {
    let inside = node.again();
    let copy = async move { copy_inside(&inside, &limits, piece).await };
    Unstoppable::new(bds_io::spawn(copy)).finish().await
}

/// A task that runs on when nobody waits for it any more.
struct Unstoppable<T>(Option<bds_io::Task<T>>);

impl<T> Unstoppable<T> {
    fn new(task: bds_io::Task<T>) -> Self {
        Self(Some(task))
    }

    /// Its output.
    async fn finish(mut self) -> T {
        let task = self.0.as_mut().expect("only `drop` and the line below take it");
        let result = task.await;
        self.0 = None;
        result
    }
}

impl<T> Drop for Unstoppable<T> {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.detach();
        }
    }
}

async fn copy_inside(node: &DetachedGuard, limits: &Limits, piece: Range<u64>) -> Result<IoVec> {
    let tracked = node.track(piece.clone(), true).await;
    let inside = Inside::alone(node.strong(), &tracked);
    // A buffer of our own: a guest may scribble over its while we write.
    let iov = Buf::zeroed(index(piece.end - piece.start), bounce_align(limits)).iov();
    read_aligned(node, limits, piece.start, iov.clone(), ReadFlags::empty()).await?;
    let align = u64::from(limits.request_alignment);
    let mut at = piece.start;
    while at < piece.end {
        let (len, held) = status::run_inside(node, at, piece.end - at).await?;
        if len == 0 {
            break;
        }
        let next = round_up(at + len, align).min(piece.end);
        if !is_held(held) {
            let part = iov.slice(index(at - piece.start)..index(next - piece.start));
            keep(node, &inside, limits, at, part)
                .await
                .map_err(|e| e.context("cannot keep what was read from below").at(at))?;
        }
        at = next;
    }
    Ok(iov)
}

async fn keep(
    node: &DetachedGuard,
    inside: &Inside<'_>,
    limits: &Limits,
    offset: u64,
    iov: IoVec,
) -> Result<()> {
    let _writing = node.writing();
    let len = iov.len();
    if node.driver().zero_flags().is_some() && iov.is_zero(0..len) {
        return zero::keep_zeroes(inside, limits, offset, offset + len as u64).await;
    }
    write_aligned(inside, limits, offset, iov, WriteFlags::UNCHANGED).await.map(drop)
}

/// A distance inside one request.
fn index(len: u64) -> usize {
    usize::try_from(len).expect("a request fits into memory")
}

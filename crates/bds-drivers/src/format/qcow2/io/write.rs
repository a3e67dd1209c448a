//! Guest writes.
//!
//! A write to clusters that are allocated and not shared goes straight to their offset; if the
//! child can take it at once, without a lock and without allocating ([`Image::try_write`]). All
//! other writes are split into steps: plan under the lock (find or allocate clusters, enter the
//! allocation among those in flight), write without it, link under it (`link.rs`).
//!
//! Two writes to one unallocated cluster: the later one waits for the earlier one and then finds a
//! cluster to write in place. Allocating writes run in tasks of their own, because other requests
//! may wait for them.

use std::sync::Arc;

use bds_core::driver::BoxFuture;
use bds_core::error::Result;
use bds_io::IoVec;

use super::link::AllocGuard;
use crate::format::qcow2::alloc::in_flight::PendingLink;
use crate::format::qcow2::layout::entry::Kind;
use crate::format::qcow2::layout::space::{DataOffset, Offset};
use crate::format::qcow2::layout::units::{mem_len, part_of};
use crate::format::qcow2::meta::lookup::{Found, Run};
use crate::format::qcow2::meta::tables::Slice;
use crate::format::qcow2::plan::{MetaResult, NeedMeta, corrupt_entry};
use crate::format::qcow2::srcu::{Srcu, SrcuGuard};
use crate::format::qcow2::state::{Image, Meta};
use crate::format::qcow2::task::{LazyUnordered, SpawnOnDrop, detach_on_drop};

/// Steps of one write in flight at once.
const STEPS_AT_ONCE: usize = 8;

/// One step of a write.
pub(crate) enum Step {
    /// Write here; the guard keeps the cluster from being reused meanwhile.
    InPlace { host: DataOffset, len: u64 },
    /// Write to clusters that are linked afterwards.
    Link(PendingLink),
}

impl Image {
    /// Writes in place what needs no waiting. `None`: nothing was done, call [`Image::write`].
    pub(crate) fn try_write(self: &Arc<Self>, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if !self.write_state.may_write() || self.broken.get().is_some() {
            return None;
        }
        let _srcu = self.srcu.read_lock();
        let host = self.in_place_offset(offset, iov.len() as u64)?;
        self.data().try_write(host, iov)
    }

    /// Where `len` bytes at `offset` may be written in place. The caller must hold a guard of
    /// `srcu`.
    #[inline]
    fn in_place_offset(&self, offset: u64, len: u64) -> Option<DataOffset> {
        if offset.checked_add(len)? > self.disk_len() {
            return None;
        }
        let Ok(Found::Run(run)) = self.lookup(offset, len) else { return None };
        let is_owned = run.kind == Kind::Normal && run.is_copied && run.len == len;
        // A hit is an error, which the slow path reports.
        let counted = self.space().counted(run.host);
        let is_safe = counted.is_none_or(|at| self.metadata.hit(at, len).is_none());
        (is_owned && is_safe && self.is_in_file(run.host, len)).then_some(run.host)
    }

    /// Writes; `is_copy` if the guest sees the same bytes already, which then must be durable
    /// before the link (rule O3).
    pub(crate) async fn write(
        self: &Arc<Self>,
        offset: u64,
        iov: IoVec,
        is_copy: bool,
    ) -> Result<()> {
        if self.write_state.may_write() && self.broken.get().is_none() {
            let srcu = self.srcu.read_lock_owned();
            if let Some(host) = self.in_place_offset(offset, iov.len() as u64) {
                let image = Arc::clone(self);
                let task_guard = self.tasks.begin();
                return SpawnOnDrop::new(async move {
                    let write = image.data().write(host, iov);
                    let result = write.await.map_err(|e| image.name_error(e));
                    drop((srcu, task_guard));
                    result
                })
                .await;
            }
        }
        let image = Arc::clone(self);
        let task_guard = self.tasks.begin();
        detach_on_drop(async move {
            image.prepare_to_write().await?;
            image.write_steps(offset, &iov, is_copy).await?;
            image.keep_within_budgets().await?;
            drop(task_guard);
            Ok(())
        })
        .await
    }

    /// Writes step by step, several at once. Runs in a task of its own. When it returns no step is
    /// in flight any more, also after a failure: a late step must not overwrite what the guest
    /// writes next.
    pub(crate) async fn write_all(self: &Arc<Self>, offset: u64, iov: &IoVec) -> Result<()> {
        self.write_steps(offset, iov, false).await
    }

    async fn write_steps(self: &Arc<Self>, offset: u64, iov: &IoVec, is_copy: bool) -> Result<()> {
        let mut under_way = LazyUnordered::new();
        let result = self.start_steps(offset, iov, is_copy, &mut under_way).await;
        let rest = wait_all(&mut under_way).await;
        result.and(rest)
    }

    /// Starts all steps; some are still in flight when it returns. A single step is done here.
    async fn start_steps(
        self: &Arc<Self>,
        offset: u64,
        iov: &IoVec,
        is_copy: bool,
        under_way: &mut LazyUnordered<BoxFuture<'static, Result<()>>>,
    ) -> Result<()> {
        let len = iov.len() as u64;
        let mut at = 0;
        let mut held = Vec::new();
        while at < len {
            let planned = {
                let mut meta = self.meta();
                self.plan_write(&mut meta, offset + at, len - at).map(|step| self.guard(step))
            };
            match planned {
                Ok((step, step_len)) => {
                    let piece = part_of(iov, at, step_len);
                    at += step_len;
                    if at == len && under_way.is_empty() {
                        return self.run_step(step, piece, is_copy).await;
                    }
                    let image = Arc::clone(self);
                    let step = async move { image.run_step(step, piece, is_copy).await };
                    under_way.push(Box::pin(step));
                    held.clear();
                    if under_way.len() >= STEPS_AT_ONCE {
                        under_way.next().await.transpose()?;
                    }
                }
                Err(need) => {
                    // A request that waits must hold nothing that other requests wait for.
                    wait_all(under_way).await?;
                    held.extend(self.resolve(need).await?);
                }
            }
        }
        Ok(())
    }

    /// Creates the guard of a planned step. Under the same lock as the plan: nothing may come in
    /// between.
    fn guard(self: &Arc<Self>, step: Step) -> (GuardedStep, u64) {
        match step {
            Step::InPlace { host, len } => {
                (GuardedStep::InPlace(host, self.srcu.read_lock_owned()), len)
            }
            Step::Link(work) => {
                let len = work.end - work.start;
                (GuardedStep::Link(self.guard_allocation(work)), len)
            }
        }
    }

    async fn run_step(
        self: &Arc<Self>,
        step: GuardedStep,
        iov: IoVec,
        is_copy: bool,
    ) -> Result<()> {
        match step {
            GuardedStep::InPlace(host, srcu) => {
                let write = self.data().write(host, iov);
                let result = write.await.map_err(|e| self.name_error(e));
                drop(srcu);
                result
            }
            GuardedStep::Link(mut guard) => {
                let mut copy = self.copy_around(&guard.work, iov).await?;
                copy.is_copy |= is_copy;
                guard.is_writing = true;
                let data = self.data();
                let host = guard.work.host.plus(copy.start - guard.work.guest);
                let written = match copy.iov.is_empty() {
                    true => Ok(()),
                    false => data.write(host, copy.iov.clone()).await,
                };
                guard.is_writing = false;
                written.map_err(|e| self.name_error(e))?;
                guard.link(&copy);
                Ok(())
            }
        }
    }

    /// Decides how the next bytes at `guest` are written, and allocates clusters if needed.
    fn plan_write(&self, meta: &mut Meta, guest: u64, max: u64) -> MetaResult<Step> {
        let max = self.before_in_flight(meta, guest, max)?;
        let (id, slice) = self.slice_to_write(meta, guest)?;
        let span = self.tables.slice_span();
        let max = max.min(span - (guest & (span - 1)));
        let index = self.index_in_slice(guest);
        let first =
            self.entry_run(slice.entry(index), guest).map_err(|b| corrupt_entry(b, guest))?;
        let in_place = self.may_write_in_place(meta, &slice, index, &first, guest)?;
        if first.kind == Kind::Normal && in_place {
            let len = self.in_place_run(meta, &slice, index, guest, max, |next, len| {
                next.kind == Kind::Normal && next.host == first.host.plus(len)
            })?;
            if !self.is_in_file(first.host, len) {
                return Err(NeedMeta::Fail(self.truncated_data_error(first.host, guest)));
            }
            if let Some(at) = self.space().counted(first.host) {
                self.check_overlap(at, len)?;
            }
            return Ok(Step::InPlace { host: first.host, len });
        }
        self.check_dirty_budget(meta, meta.slices.bytes_to_pin(id))?;
        let geometry = self.geometry();
        let start = geometry.cluster_floor(guest);
        let (len, host, is_new, is_fresh) = if in_place {
            let len = self.in_place_run(meta, &slice, index, guest, max, |next, len| {
                // In a data file every cluster has its offset.
                let is_adjacent = self.data_file.is_some() || next.host == first.host.plus(len);
                next.kind != Kind::Normal && is_adjacent
            })?;
            let kept_host = || DataOffset(first.host.0 - (guest - start));
            let host = self.space().at_guest(start).unwrap_or_else(kept_host);
            if let Some(at) = self.space().counted(host) {
                let clusters = geometry.clusters(guest + len - start);
                self.check_overlap(at, clusters << geometry.cluster_bits())?;
            }
            (len, host, false, false)
        } else {
            let wanted = self.clusters_to_allocate(meta, &slice, index, guest, max)?;
            let got = self.alloc_data(meta, wanted)?;
            let available = (got.clusters << geometry.cluster_bits()) - (guest - start);
            (max.min(available), self.space().allocated(got.offset), true, got.is_fresh)
        };
        let clusters = geometry.clusters(guest + len - start);
        let item = self.begin_allocation(meta, start, clusters, Some(id));
        let (end, start_of_bytes) = (guest + len, guest);
        Ok(Step::Link(PendingLink {
            item,
            id,
            slice,
            index,
            guest: start,
            host,
            clusters,
            is_new,
            is_fresh,
            start: start_of_bytes,
            end,
        }))
    }

    /// How many bytes from `guest` on (at most `max`) may be written in their clusters, as long as
    /// `goes_on` returns true for the next run and the length so far.
    fn in_place_run(
        &self,
        meta: &mut Meta,
        slice: &Slice,
        index: usize,
        guest: u64,
        max: u64,
        goes_on: impl Fn(&Run, u64) -> bool,
    ) -> MetaResult<u64> {
        let (mut len, mut index) = (0, index);
        while len < max {
            let at = guest + len;
            let next = self.entry_run(slice.entry(index), at).map_err(|b| corrupt_entry(b, at))?;
            if !goes_on(&next, len) || !self.may_write_in_place(meta, slice, index, &next, at)? {
                break;
            }
            len += next.len;
            if self.geometry().is_cluster_aligned(guest + len) {
                index += 1;
            }
        }
        Ok(len.min(max))
    }

    /// How many clusters from that of `guest` on must be allocated.
    fn clusters_to_allocate(
        &self,
        meta: &mut Meta,
        slice: &Slice,
        index: usize,
        guest: u64,
        max: u64,
    ) -> MetaResult<u64> {
        let geometry = self.geometry();
        let start = geometry.cluster_floor(guest);
        let all = geometry.clusters(guest + max - start);
        let mut count = 1;
        while count < all {
            let at = start + (count << geometry.cluster_bits());
            let entry = slice.entry(index + mem_len(count));
            let next = self.entry_run(entry, at).map_err(|b| corrupt_entry(b, at))?;
            if self.may_write_in_place(meta, slice, index + mem_len(count), &next, at)? {
                break;
            }
            count += 1;
        }
        Ok(count)
    }
}

/// Waits for all steps; returns the first failure.
async fn wait_all(under_way: &mut LazyUnordered<BoxFuture<'static, Result<()>>>) -> Result<()> {
    let mut first = Ok(());
    while let Some(result) = under_way.next().await {
        first = first.and(result);
    }
    first
}

/// A step with the guard that protects its clusters.
enum GuardedStep {
    InPlace(DataOffset, SrcuGuard<Arc<Srcu>>),
    Link(AllocGuard),
}

impl Image {
    /// Plans the allocation of whole unallocated clusters at `guest`. `None`: the one at `guest` is
    /// allocated already.
    pub(crate) fn plan_prealloc(
        &self,
        meta: &mut Meta,
        guest: u64,
        end: u64,
    ) -> MetaResult<Option<PendingLink>> {
        self.slice_to_write(meta, guest)?;
        let slice = self.tables.slice_id(guest).and_then(|id| self.tables.hold(id));
        let entry = slice.map(|slice| slice.entry(self.index_in_slice(guest)));
        let run = entry
            .map(|e| self.entry_run(e, guest))
            .transpose()
            .map_err(|b| corrupt_entry(b, guest))?;
        if run.is_some_and(|run| run.kind.has_place() || run.kind == Kind::Compressed) {
            return Ok(None);
        }
        match self.plan_write(meta, guest, end - guest)? {
            Step::Link(work) => Ok(Some(work)),
            Step::InPlace { .. } => Ok(None),
        }
    }
}

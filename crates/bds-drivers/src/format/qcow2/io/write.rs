//! Guest writes.
//!
//! A write to clusters of our own goes straight to their place; if the child can take it at once, without a lock and without allocating
//! ([`Image::try_write`]). All other writes are taken apart into steps: plan under the lock (find or allocate a place, enter the
//! allocation among those in flight), write without it, link under it. Linking is one synchronous section, so it
//! happens as a whole or not at all; the table it changes is held from the plan on, so it needs no I/O and cannot fail.
//!
//! Two writes to one cluster that has no place yet: the later one waits for the earlier one and then finds a cluster to write in place.
//! Allocating writes run in tasks of their own, because others may wait for them.

use std::sync::Arc;

use bds_core::driver::BoxFuture;
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::cow::CopyPlan;
use super::read::{mem_len, part_of};
use crate::format::qcow2::alloc::overlap::Class;
use crate::format::qcow2::alloc::release::{Freed, Why};
use crate::format::qcow2::layout::entry::{BadEntry, Kind, L1Entry, L2Entry};
use crate::format::qcow2::layout::space::{Clusters, DataOffset, MetaOffset, Offset};
use crate::format::qcow2::meta::lookup::Found;
use crate::format::qcow2::meta::tables::{Slice, SliceId};
use crate::format::qcow2::meta::write_back::add_slice;
use crate::format::qcow2::state::{Image, Meta, Plan, Stop, What};
use crate::format::qcow2::task::{Abreast, Done, Unstoppable, finish};

/// Steps of one write under way at once.
const STEPS_AT_ONCE: usize = 8;

/// An allocation in flight: guest clusters whose entries will change when its data is written.
#[derive(Debug)]
pub(crate) struct InFlight {
    /// Number of the first guest cluster.
    first: u64,
    /// One past the last.
    end: u64,
    /// The slice that will change, pinned meanwhile.
    slice: Option<SliceId>,
    pub done: Done,
}

/// One step of a write.
pub(crate) enum Step {
    /// Write here; the guard keeps the place ours meanwhile.
    InPlace { host: DataOffset, len: u64 },
    /// Write to clusters that are linked afterwards.
    Link(Linking),
}

/// Guest clusters about to get new entries.
pub(crate) struct Linking {
    item: Arc<InFlight>,
    id: SliceId,
    slice: Arc<Slice>,
    /// Index of the first entry in the slice.
    index: usize,
    /// Start of the first cluster.
    pub guest: u64,
    /// Its place.
    pub host: DataOffset,
    pub clusters: u64,
    /// The clusters are new (else they keep the place they have).
    pub is_new: bool,
    /// New, and nothing was ever there: they read as zeros.
    pub is_fresh: bool,
    /// The guest's bytes.
    pub start: u64,
    pub end: u64,
}

impl Linking {
    /// The old entry of the first cluster, and of the last.
    pub(crate) fn old_entries(&self) -> (L2Entry, L2Entry) {
        let last = self.index + mem_len(self.clusters) - 1;
        (self.slice.entry(self.index), self.slice.entry(last))
    }
}

/// Sees to it that a [`Linking`] ends: linked, or given up with its clusters given back and its waiters woken.
pub(crate) struct Guarded {
    image: Arc<Image>,
    pub work: Linking,
    /// Bytes are on their way to the new clusters: they must not be used again.
    is_writing: bool,
    is_over: bool,
}

impl Image {
    /// Writes in place what needs no waiting. `None`: nothing was done, ask [`Image::write`].
    pub(crate) fn try_write(self: &Arc<Self>, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if !self.charge.may_write() || self.broken.get().is_some() {
            return None;
        }
        let _inside = self.grace.enter();
        let host = self.own_place(offset, iov.len() as u64)?;
        self.data().try_write(host, iov)
    }

    /// Where `len` bytes at `offset` may be written in place. Who asks must be inside `grace`.
    #[inline]
    fn own_place(&self, offset: u64, len: u64) -> Option<DataOffset> {
        if offset.checked_add(len)? > self.disk_len() {
            return None;
        }
        let Ok(Found::Run(run)) = self.lookup(offset, len) else { return None };
        let is_ours = run.kind == Kind::Normal && run.is_copied && run.len == len;
        // A hit is an error, which the other way reports.
        let counted = self.space().counted(run.host);
        let is_safe = counted.is_none_or(|at| self.metadata.hit(at, len).is_none());
        (is_ours && is_safe && self.is_in_file(run.host, len)).then_some(run.host)
    }

    /// Writes; `is_copy` if the guest sees the same bytes already, which then must be durable before the link (rule O3).
    pub(crate) async fn write(
        self: &Arc<Self>,
        offset: u64,
        iov: IoVec,
        is_copy: bool,
    ) -> Result<()> {
        if self.charge.may_write() && self.broken.get().is_none() {
            let inside = self.grace.enter_owned();
            if let Some(host) = self.own_place(offset, iov.len() as u64) {
                let image = Arc::clone(self);
                let working = self.busy.begin();
                return Unstoppable::new(async move {
                    let write = image.data().write(host, iov);
                    let result = write.await.map_err(|e| image.name_error(e));
                    drop((inside, working));
                    result
                })
                .await;
            }
        }
        let image = Arc::clone(self);
        let working = self.busy.begin();
        finish(async move {
            image.prepare_to_write().await?;
            image.write_steps(offset, &iov, is_copy).await?;
            image.keep_budgets().await?;
            drop(working);
            Ok(())
        })
        .await
    }

    /// Writes step by step, several at once. Runs in a task of its own. When it returns nothing of it is under way any more,
    /// also after a failure: a late step must not overwrite what the guest writes next.
    pub(crate) async fn write_all(self: &Arc<Self>, offset: u64, iov: &IoVec) -> Result<()> {
        self.write_steps(offset, iov, false).await
    }

    async fn write_steps(self: &Arc<Self>, offset: u64, iov: &IoVec, is_copy: bool) -> Result<()> {
        let mut under_way = Abreast::new();
        let result = self.begin_steps(offset, iov, is_copy, &mut under_way).await;
        let rest = end_all(&mut under_way).await;
        result.and(rest)
    }

    /// Begins all steps; some are still under way when it returns. A single step is done here.
    async fn begin_steps(
        self: &Arc<Self>,
        offset: u64,
        iov: &IoVec,
        is_copy: bool,
        under_way: &mut Abreast<BoxFuture<'static, Result<()>>>,
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
                        return self.take_step(step, piece, is_copy).await;
                    }
                    let image = Arc::clone(self);
                    let step = async move { image.take_step(step, piece, is_copy).await };
                    under_way.push(Box::pin(step));
                    held.clear();
                    if under_way.len() >= STEPS_AT_ONCE {
                        under_way.next().await.transpose()?;
                    }
                }
                Err(stop) => {
                    // Who waits must hold nothing that others wait for.
                    end_all(under_way).await?;
                    held.extend(self.resolve(stop).await?);
                }
            }
        }
        Ok(())
    }

    /// Puts a planned step under guard. In the same breath as the plan: nothing may come in between.
    fn guard(self: &Arc<Self>, step: Step) -> (GuardedStep, u64) {
        match step {
            Step::InPlace { host, len } => {
                (GuardedStep::InPlace(host, self.grace.enter_owned()), len)
            }
            Step::Link(work) => {
                let len = work.end - work.start;
                (GuardedStep::Link(self.guard_link(work)), len)
            }
        }
    }

    pub(crate) fn guard_link(self: &Arc<Self>, work: Linking) -> Guarded {
        Guarded { image: Arc::clone(self), work, is_writing: false, is_over: false }
    }

    async fn take_step(
        self: &Arc<Self>,
        step: GuardedStep,
        iov: IoVec,
        is_copy: bool,
    ) -> Result<()> {
        match step {
            GuardedStep::InPlace(host, inside) => {
                let write = self.data().write(host, iov);
                let result = write.await.map_err(|e| self.name_error(e));
                drop(inside);
                result
            }
            GuardedStep::Link(mut guarded) => {
                let mut copy = self.copy_around(&guarded.work, iov).await?;
                copy.is_copy |= is_copy;
                guarded.is_writing = true;
                let data = self.data();
                let host = guarded.work.host.plus(copy.start - guarded.work.guest);
                let written = match copy.iov.is_empty() {
                    true => Ok(()),
                    false => data.write(host, copy.iov.clone()).await,
                };
                guarded.is_writing = false;
                written.map_err(|e| self.name_error(e))?;
                guarded.link(&copy);
                Ok(())
            }
        }
    }

    /// Finds out how the next bytes at `guest` are written, and allocates for them what they need.
    fn plan_write(&self, meta: &mut Meta, guest: u64, max: u64) -> Plan<Step> {
        let max = self.before_others(meta, guest, max)?;
        let (id, slice) = self.slice_to_write(meta, guest)?;
        let span = self.tables.slice_span();
        let max = max.min(span - (guest & (span - 1)));
        let index = self.index_in_slice(guest);
        let first = self.entry_run(slice.entry(index), guest).map_err(|b| bad(b, guest))?;
        let owns = self.owns(meta, &slice, index, &first, guest)?;
        if first.kind == Kind::Normal && owns {
            let len = self.copied_run(meta, &slice, index, guest, max)?;
            if !self.is_in_file(first.host, len) {
                return Err(Stop::Fail(self.lost_data(first.host, guest)));
            }
            if let Some(at) = self.space().counted(first.host) {
                self.check_overlap(at, len)?;
            }
            return Ok(Step::InPlace { host: first.host, len });
        }
        self.check_room(meta, meta.slices.bytes_to_pin(id))?;
        let geometry = self.geometry();
        let start = geometry.cluster_floor(guest);
        let (len, host, is_new, is_fresh) = if owns {
            let len = self.keeping_run(meta, &slice, index, guest, max)?;
            let in_place = || DataOffset(first.host.0 - (guest - start));
            let host = self.space().at_guest(start).unwrap_or_else(in_place);
            if let Some(at) = self.space().counted(host) {
                let clusters = geometry.clusters(guest + len - start);
                self.check_overlap(at, clusters << geometry.cluster_bits())?;
            }
            (len, host, false, false)
        } else {
            let wanted = self.clusters_without_place(meta, &slice, index, guest, max)?;
            let got = self.alloc_data(meta, wanted)?;
            let room = (got.clusters << geometry.cluster_bits()) - (guest - start);
            (max.min(room), self.space().allocated(got.offset), true, got.is_fresh)
        };
        let clusters = geometry.clusters(guest + len - start);
        let item = self.enter_flight(meta, start, clusters, Some(id));
        let (end, start_of_bytes) = (guest + len, guest);
        Ok(Step::Link(Linking {
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

    /// Enters an allocation in flight, which will change `slice`.
    pub(crate) fn enter_flight(
        &self,
        meta: &mut Meta,
        guest: u64,
        clusters: u64,
        slice: Option<SliceId>,
    ) -> Arc<InFlight> {
        let first = self.geometry().cluster_index(guest);
        let item = Arc::new(InFlight { first, end: first + clusters, slice, done: Done::new() });
        if let Some(id) = slice {
            meta.slices.pin(id);
        }
        meta.in_flight.push(Arc::clone(&item));
        item
    }

    /// How many of the bytes at `guest` can go on before they meet an allocation in flight. Stops if that is at the start.
    pub(crate) fn before_others(&self, meta: &Meta, guest: u64, max: u64) -> Plan<u64> {
        let geometry = self.geometry();
        let first = geometry.cluster_index(guest);
        let last = geometry.cluster_index(guest + (max - 1));
        let mut max = max;
        for item in meta.in_flight.iter().filter(|i| i.first <= last && i.end > first) {
            if item.first <= first {
                return Err(Stop::Wait(Arc::clone(item)));
            }
            max = max.min((item.first << geometry.cluster_bits()) - guest);
        }
        Ok(max)
    }

    pub(crate) fn index_in_slice(&self, guest: u64) -> usize {
        mem_len((guest & (self.tables.slice_span() - 1)) >> self.geometry().cluster_bits())
    }

    /// How far from `guest` on everything can be written in place, in one piece.
    fn copied_run(
        &self,
        meta: &mut Meta,
        slice: &Slice,
        index: usize,
        guest: u64,
        max: u64,
    ) -> Plan<u64> {
        let mut run = self.entry_run(slice.entry(index), guest).map_err(|b| bad(b, guest))?;
        let mut index = index;
        while run.len < max && self.geometry().is_cluster_aligned(guest + run.len) {
            index += 1;
            let at = guest + run.len;
            let next = self.entry_run(slice.entry(index), at).map_err(|b| bad(b, at))?;
            let goes_on = next.kind == Kind::Normal && next.host == run.host.plus(run.len);
            if !goes_on || !self.owns(meta, slice, index, &next, at)? {
                break;
            }
            run.len += next.len;
        }
        Ok(run.len.min(max))
    }

    /// How far from `guest` on clusters keep adjacent places but are not data yet. In a data file every cluster has its place.
    fn keeping_run(
        &self,
        meta: &mut Meta,
        slice: &Slice,
        index: usize,
        guest: u64,
        max: u64,
    ) -> Plan<u64> {
        let has_data_file = self.data_file.is_some();
        let first = self.entry_run(slice.entry(index), guest).map_err(|b| bad(b, guest))?;
        let (mut len, mut index) = (0, index);
        while len < max {
            let at = guest + len;
            let next = self.entry_run(slice.entry(index), at).map_err(|b| bad(b, at))?;
            let goes_on = has_data_file || next.host == first.host.plus(len);
            if next.kind == Kind::Normal || !goes_on || !self.owns(meta, slice, index, &next, at)? {
                break;
            }
            len += next.len;
            if self.geometry().is_cluster_aligned(guest + len) {
                index += 1;
            }
        }
        Ok(len.min(max))
    }

    /// How many clusters from that of `guest` on need a new place.
    fn clusters_without_place(
        &self,
        meta: &mut Meta,
        slice: &Slice,
        index: usize,
        guest: u64,
        max: u64,
    ) -> Plan<u64> {
        let geometry = self.geometry();
        let start = geometry.cluster_floor(guest);
        let all = geometry.clusters(guest + max - start);
        let mut count = 1;
        while count < all {
            let at = start + (count << geometry.cluster_bits());
            let entry = slice.entry(index + mem_len(count));
            let next = self.entry_run(entry, at).map_err(|b| bad(b, at))?;
            if self.owns(meta, slice, index + mem_len(count), &next, at)? {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// The slice that maps `guest`, in a table that is ours alone: made or copied if need be.
    pub(crate) fn slice_to_write(
        &self,
        meta: &mut Meta,
        guest: u64,
    ) -> Plan<(SliceId, Arc<Slice>)> {
        let id = self.tables.slice_id(guest).filter(|id| id.table < meta.l1.entries);
        let Some(id) = id else {
            return Err(Stop::Fail(
                Error::new(ErrorKind::OutOfRange, "a write beyond the L1 table").at(guest),
            ));
        };
        let l1 = self.tables.l1(id.table);
        match l1.table(self.geometry()).map_err(|b| bad(b, guest))? {
            None => {
                self.check_room(meta, meta.slices.bytes_to_pin(id))?;
                let got = self.alloc_metadata(meta, 1, Class::ACTIVE_L2)?;
                meta.slices.add_unlinked(id.table, !got.is_fresh);
                self.set_table(meta, id.table, got.offset);
            }
            Some(old) if !l1.is_copied() => self.copy_table(meta, id.table, old)?,
            Some(_) => {}
        }
        if let Some(slice) = self.tables.hold(id) {
            slice.touch();
            return Ok((id, slice));
        }
        if meta.slices.is_unlinked(id.table) {
            // The file knows nothing of this table: what is not in memory is empty.
            let is_extended = self.geometry().has_extended_l2();
            let slice = Arc::new(Slice::empty(self.config.load().slice_len, is_extended));
            return Ok((id, add_slice(self, meta, id, slice)));
        }
        Err(Stop::Load(What::Slice(id)))
    }

    fn set_table(&self, meta: &mut Meta, table: u32, place: MetaOffset) {
        self.tables.set_l1(table, L1Entry::new(place, true));
        meta.l1.mark(table);
    }

    /// A table that a snapshot shares: from now on ours is a copy. All of it is in memory, so only its place changes.
    fn copy_table(&self, meta: &mut Meta, table: u32, old: MetaOffset) -> Plan<()> {
        let pieces = u32::try_from(self.tables.slices_per_table()).expect("at most 4096");
        let ids = (0..pieces).map(|piece| SliceId { table, piece });
        if ids.clone().any(|id| self.tables.hold(id).is_none()) {
            return Err(Stop::Load(What::Table(table)));
        }
        self.check_room(meta, self.geometry().cluster_len())?;
        let got = self.alloc_metadata(meta, 1, Class::ACTIVE_L2)?;
        meta.slices.add_unlinked(table, false);
        for id in ids {
            meta.slices.mark_all(id);
        }
        self.set_table(meta, table, got.offset);
        meta.frees.push(Freed::metadata(Clusters { start: old, count: 1 }));
        Ok(())
    }
}

/// Waits for all of them; the first failure.
async fn end_all(under_way: &mut Abreast<BoxFuture<'static, Result<()>>>) -> Result<()> {
    let mut first = Ok(());
    while let Some(result) = under_way.next().await {
        first = first.and(result);
    }
    first
}

/// A step under guard.
enum GuardedStep {
    InPlace(DataOffset, crate::format::qcow2::srcu::Inside<Arc<crate::format::qcow2::srcu::Grace>>),
    Link(Guarded),
}

/// An entry that cannot be followed, found under the lock.
pub(crate) fn bad(bad: BadEntry, guest: u64) -> Stop {
    Stop::Corrupt { what: format!("{bad}, for guest offset {guest:#x}"), at: guest }
}

impl Guarded {
    /// The bytes are there: the guest sees them from now on.
    fn link(mut self, copy: &CopyPlan) {
        let image = Arc::clone(&self.image);
        let mut meta = image.meta();
        let work = &self.work;
        let geometry = image.geometry();
        for i in 0..mem_len(work.clusters) {
            let offset = (i as u64) << geometry.cluster_bits();
            let old = work.slice.entry(work.index + i);
            let bitmap = if geometry.has_extended_l2() {
                new_bitmap(&image, old, work.guest + offset, copy, !work.is_new)
            } else {
                0
            };
            let place = work.host.plus(offset);
            work.slice.set_entry(work.index + i, L2Entry::at_cluster(place, true, bitmap));
            // Its count was set, or looked up, when this was planned.
            work.slice.note_checked(work.index + i);
            if work.is_new {
                image.free_entry(&mut meta, old, Why::Reuse);
            }
        }
        let entry_len = geometry.l2_entry_len();
        let len = mem_len(work.clusters) * entry_len;
        meta.slices.mark(work.id, work.index * entry_len, len);
        let is_new_here = self.work.is_new && image.data_file.is_none();
        meta.owed.data_flush |=
            copy.is_copy || is_new_here || image.config.load().data_before_metadata;
        self.is_over = true;
        self.work.item.leave(&mut meta);
    }
}

impl Guarded {
    /// Links clusters that read as zeros already. Extended entries get their place only: their subclusters stay what they are.
    pub(crate) fn link_empty(self) {
        let is_extended = self.image.geometry().has_extended_l2();
        let covers = if is_extended {
            self.work.guest..self.work.guest
        } else {
            self.work.start..self.work.end
        };
        let start = self.work.start;
        // The zeros of reused clusters must be there before the link.
        let is_copy = !self.work.is_fresh;
        self.link(&CopyPlan { start, iov: IoVec::new(), covers, is_copy });
    }
}

impl Image {
    /// Whole clusters at `guest` that have no place get one. `None`: that at `guest` has one already.
    pub(crate) fn plan_prealloc(
        &self,
        meta: &mut Meta,
        guest: u64,
        end: u64,
    ) -> Plan<Option<Linking>> {
        self.slice_to_write(meta, guest)?;
        let slice = self.tables.slice_id(guest).and_then(|id| self.tables.hold(id));
        let entry = slice.map(|slice| slice.entry(self.index_in_slice(guest)));
        let run = entry.map(|e| self.entry_run(e, guest)).transpose().map_err(|b| bad(b, guest))?;
        if run.is_some_and(|run| run.kind.has_place() || run.kind == Kind::Compressed) {
            return Ok(None);
        }
        match self.plan_write(meta, guest, end - guest)? {
            Step::Link(work) => Ok(Some(work)),
            Step::InPlace { .. } => Ok(None),
        }
    }
}

impl InFlight {
    /// It is over: others may go on.
    pub(crate) fn leave(self: &Arc<Self>, meta: &mut Meta) {
        meta.in_flight.retain(|item| !Arc::ptr_eq(item, self));
        if let Some(id) = self.slice {
            meta.slices.unpin(id);
        }
        self.done.set();
    }
}

/// The subclusters of a cluster after a write: what was written is data, the rest stays what it was.
fn new_bitmap(image: &Image, old: L2Entry, guest: u64, copy: &CopyPlan, keeps: bool) -> u64 {
    let geometry = image.geometry();
    let bits = geometry.subcluster_bits();
    let from = copy.covers.start.max(guest) - guest;
    let to = copy.covers.end.min(guest + geometry.cluster_size()).saturating_sub(guest);
    let (first, end) = (from >> bits, to.div_ceil(1 << bits));
    let written = if first < end { ((1u64 << end) - 1) & !((1u64 << first) - 1) } else { 0 };
    let (alloc, zero) = if old.is_compressed() {
        (0, 0)
    } else {
        (u64::from(old.alloc_bits()), u64::from(old.zero_bits()))
    };
    // In a new place only what was written has data; the plan covers all that had any.
    let alloc = if keeps { alloc | written } else { written };
    alloc | (zero & !written) << 32
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let image = Arc::clone(&self.image);
        let mut meta = image.meta();
        let bits = image.geometry().cluster_bits();
        // If bytes may still be on their way (the executor died), the clusters stay counted: a leak is harmless.
        let unused = image.space().counted(self.work.host);
        if let Some(first) = unused.filter(|_| self.work.is_new && !self.is_writing) {
            for i in 0..self.work.clusters {
                let start = first.plus(i << bits);
                if image.lower(&mut meta, start).is_err() {
                    meta.frees.push(Freed::unused(Clusters { start, count: 1 }));
                }
            }
        }
        self.work.item.leave(&mut meta);
    }
}

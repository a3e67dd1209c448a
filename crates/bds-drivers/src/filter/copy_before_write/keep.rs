//! Keeps old data: what a change of the node does before it goes on.
//!
//! With staging, a write that meets a copy by a job does not wait for it, as the job may wait for
//! the target: it keeps the old data a second time, in the staging area. If the job's copy fails,
//! the job finds the old data there (`OldData` reads it), or the staging area writes it.

use std::ops::Range;
use std::sync::Arc;

use bds_core::Result;
use bds_core::copy::{self, Claim, Content, CopyRead, Examined, Found, Observed, RunOptions};
use bds_core::driver::Child;

use super::snapshot::{OnCbwError, Snapshot};
use super::stage::{Data, Space, Staging};

/// What the node shares with the tasks that write staged data.
pub(super) struct Parts {
    pub(super) file: Child,
    pub(super) target: Child,
    /// Takes staged data that memory has no space for.
    pub(super) spill: Option<Child>,
    pub(super) snapshot: Arc<Snapshot>,
    /// Shares the file with a writer: the job that discards what it copied.
    pub(super) shares_writes: bool,
}

impl Parts {
    /// Keeps the old data of a range that is about to be changed.
    pub(super) async fn keep(self: &Arc<Self>, range: Range<u64>) -> Result<()> {
        let snapshot = &self.snapshot;
        if range.start >= range.end || snapshot.lets_pass(&range) {
            return Ok(());
        }
        let granules = snapshot.map.granules_around(range);
        let keep = async {
            match snapshot.options.staging_len {
                0 => self.copy_now(granules.clone()).await,
                _ => self.stage(&granules).await,
            }
        };
        if let Err(error) = snapshot.in_time(keep).await {
            match snapshot.options.on_error {
                OnCbwError::BreakGuestWrite => {
                    return Err(error.context("cannot keep old data before the write"));
                }
                OnCbwError::BreakSnapshot => snapshot.break_off(granules.start, &error),
            }
        }
        if !snapshot.is_off() {
            snapshot.frozen.wait_free(&granules).await;
        }
        Ok(())
    }

    /// Copies what is still to be kept to the target.
    async fn copy_now(&self, granules: Range<u64>) -> Result<()> {
        let options = &self.snapshot.options;
        let run = RunOptions {
            range: Some(granules.clone()),
            max_requests: 8,
            above: options.above,
            write_flags: options.write_flags,
            compress: options.compress,
            may_unmap: true,
            observer: options.observer.clone(),
            ..RunOptions::default()
        };
        copy::run(&self.snapshot.map, &self.file, &self.target, &run, &()).await?;
        self.snapshot.let_pass(granules);
        Ok(())
    }

    /// Takes what is still to be kept into the staging area.
    async fn stage(self: &Arc<Self>, granules: &Range<u64>) -> Result<()> {
        let snapshot = &self.snapshot;
        while let Some(run) = snapshot.next_unpassed(granules) {
            if let Some(staging) = snapshot.stage.begin(run.start, run.end) {
                // Another write may have kept it before this one had its turn.
                if snapshot.next_unpassed(&staging.range).as_ref() == Some(&staging.range) {
                    self.stage_run(staging).await?;
                }
            } else {
                snapshot.stage.wait_not_being_staged(run.start).await;
            }
            if snapshot.is_off() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Keeps the beginning of a run, as far as its granules are in one state.
    async fn stage_run(self: &Arc<Self>, mut staging: Staging<'_>) -> Result<()> {
        let (snapshot, run) = (&self.snapshot, staging.range.clone());
        let first = snapshot.map.granules_around(run.start..run.start + 1);
        if let Some(mut claim) = snapshot.map.claim_shared(first.clone(), 1) {
            claim.extend(run.end - run.start);
            let claimed = claim.range();
            staging.shrink(claimed.end);
            return self.stage_old_data(claimed, Some(claim)).await;
        }
        if snapshot.map.is_clean_in(&run) {
            snapshot.let_pass(run);
        } else if snapshot.map.is_clean_in(&first) {
            snapshot.let_pass(first);
        } else if self.shares_writes {
            // A job that discards the disk's data behind its copy: only the copy has it then.
            snapshot.map.wait_claimable(first).await;
        } else {
            // A job copies it, and may wait for the target: its old data is kept here too.
            staging.shrink(first.end);
            self.stage_old_data(first, None).await?;
        }
        Ok(())
    }

    /// Reads old data into the staging area and lets it be changed, unless the snapshot breaks.
    async fn stage_old_data(
        self: &Arc<Self>,
        range: Range<u64>,
        claim: Option<Claim<'static>>,
    ) -> Result<()> {
        let snapshot = &self.snapshot;
        let len = range.end - range.start;
        snapshot.delay(snapshot.stage.delay(len)).await;
        let fails = snapshot.options.on_error == OnCbwError::BreakGuestWrite;
        match snapshot.stage.reserve(len, fails).await {
            Space::Reserved => {}
            Space::Full(error) => {
                snapshot.break_off(range.start, &error);
                return Ok(());
            }
            Space::Failing(error) => return Err(error),
        }
        let mut reserved = Reserved { parts: self, len, is_used: false };
        match (self.old_data(&range).await?, claim) {
            // Not part of the snapshot.
            (None, Some(claim)) => claim.done(),
            // The job finds that out too, and does not wait for the target.
            (None, None) => {
                snapshot.map.wait_claimable(range).await;
                return Ok(());
            }
            (Some(data), claim) => {
                reserved.is_used = true;
                let is_claimed = claim.is_some();
                let starts = snapshot.stage.put(range.clone(), claim, data, len);
                self.start_tasks(starts, range.start, is_claimed);
            }
        }
        snapshot.let_pass(range);
        Ok(())
    }

    /// Reads old data; `None` for what does not belong to the snapshot.
    async fn old_data(&self, range: &Range<u64>) -> Result<Option<Data>> {
        let len = range.end - range.start;
        let options = &self.snapshot.options;
        let found = self.file.found(range.start, len, options.above).await;
        match found.ok().filter(|run| run.len >= len).map(|run| run.found) {
            Some(Found::Unallocated) => return Ok(None),
            Some(Found::Zero) if options.write_flags.is_empty() => return Ok(Some(Data::Zero)),
            _ => {}
        }
        let buffer = bds_io::Buf::zeroed(usize::try_from(len).unwrap_or(0), 4096).iov();
        self.file.read(range.start, buffer.clone()).await?;
        Ok(Some(Data::Memory(buffer)))
    }

    /// Shows the observer of the copy what is to be written to the target.
    pub(super) async fn observe(
        &self,
        offset: u64,
        content: Content<'_>,
        is_unit: bool,
    ) -> Result<Observed> {
        let request = Examined { offset, content, is_unit, target: &self.target };
        Observed::new(self.snapshot.options.observer.as_ref(), request).await
    }
}

/// Space in the staging area that is given back unless it is used.
struct Reserved<'p> {
    parts: &'p Parts,
    len: u64,
    is_used: bool,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.is_used {
            self.parts.snapshot.stage.unreserve(self.len);
        }
    }
}

//! Keeps old data: what a change of the node does before it goes on, and the task that writes
//! staged data to the target.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bds_core::copy::{
    self, Claim, Content, CopyRead, CopyWrite, Examined, Found, Observed, RunOptions,
};
use bds_core::driver::{Child, ZeroFlags};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;
use futures_util::StreamExt as _;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesUnordered;

use super::snapshot::{OnCbwError, Snapshot};
use super::stage::{Next, Space, ToWrite};

/// Longest run that is staged at once: bounds how long a write waits for the read of old data.
const MAX_STAGED: u64 = 1 << 20;

/// Staged runs that are written to the target at once.
const MAX_WRITES: usize = 16;

/// What the node shares with the task that writes staged data.
pub(super) struct Parts {
    pub(super) file: Child,
    pub(super) target: Child,
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
            if let Some(claim) = snapshot.map.claim_shared(run.clone(), MAX_STAGED) {
                let claimed = claim.range();
                if self.stage_claim(claim).await? {
                    snapshot.let_pass(claimed);
                }
            } else if snapshot.map.is_clean_in(&run) {
                snapshot.let_pass(run);
            } else {
                snapshot.wait_progress(&run).await;
            }
            if snapshot.is_off() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// False: the snapshot was broken.
    async fn stage_claim(self: &Arc<Self>, claim: Claim<'static>) -> Result<bool> {
        let snapshot = &self.snapshot;
        let range = claim.range();
        let len = range.end - range.start;
        snapshot.delay(snapshot.stage.delay(len)).await;
        let fails = snapshot.options.on_error == OnCbwError::BreakGuestWrite;
        match snapshot.stage.reserve(len, fails).await {
            Space::Reserved => {}
            Space::Full => {
                let words = "the staging area is full";
                let error = Error::new(ErrorKind::NoMemory, words);
                snapshot.break_off(range.start, &error);
                return Ok(false);
            }
            Space::Failing(error) => return Err(error),
        }
        let mut reserved = Reserved { parts: self, len, is_used: false };
        let Some(data) = self.old_data(&range).await? else {
            // Not part of the snapshot.
            claim.done();
            return Ok(true);
        };
        reserved.is_used = true;
        if snapshot.stage.put(claim, data) {
            bds_io::spawn(write_staged(Arc::clone(self))).detach();
        }
        Ok(true)
    }

    /// Reads old data: `Some(None)` for zeros, `None` for what does not belong to the snapshot.
    async fn old_data(&self, range: &Range<u64>) -> Result<Option<Option<IoVec>>> {
        let len = range.end - range.start;
        let options = &self.snapshot.options;
        let found = self.file.found(range.start, len, options.above).await;
        match found.ok().filter(|run| run.len >= len).map(|run| run.found) {
            Some(Found::Unallocated) => return Ok(None),
            Some(Found::Zero) if options.write_flags.is_empty() => return Ok(Some(None)),
            _ => {}
        }
        let buffer = bds_io::Buf::zeroed(usize::try_from(len).unwrap_or(0), 4096).iov();
        self.file.read(range.start, buffer.clone()).await?;
        Ok(Some(Some(buffer)))
    }

    /// Writes one staged run to the target.
    async fn write_to_target(&self, work: &ToWrite) -> Result<()> {
        let (start, len) = (work.range.start, work.range.end - work.range.start);
        let target: &dyn CopyWrite = &self.target;
        let options = &self.snapshot.options;
        let Some(data) = &work.data else {
            let seen = self.observe(start, Content::Zeros(len), false).await?;
            for range in seen.missing() {
                let len = range.end - range.start;
                let zeroed = target.write_zeroes(range.start, len, ZeroFlags::MAY_UNMAP).await;
                let _only_without_fallback = zeroed?;
            }
            seen.written();
            return Ok(());
        };
        let unit = options.compress.and_then(|unit| usize::try_from(unit).ok());
        for at in (0..data.len()).step_by(unit.unwrap_or(data.len()).max(1)) {
            let piece = data.slice(at..data.len().min(at + unit.unwrap_or(data.len())));
            let piece_start = start + at as u64;
            let seen = self.observe(piece_start, Content::Data(&piece), unit.is_some()).await?;
            for range in seen.missing() {
                let part = seen.part(&piece, range);
                match unit {
                    Some(_) => target.write_compressed(range.start, part).await?,
                    None => target.write(range.start, part, options.write_flags).await?,
                }
            }
            seen.written();
        }
        Ok(())
    }

    async fn observe(&self, offset: u64, content: Content<'_>, is_unit: bool) -> Result<Observed> {
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

/// Writes staged data to the target until there is none, or the snapshot is off.
async fn write_staged(parts: Arc<Parts>) {
    let stage = &parts.snapshot.stage;
    let mut writes = FuturesUnordered::new();
    loop {
        let next = match writes.len() {
            MAX_WRITES.. => Next::Wait(Some(Duration::MAX)),
            under_way => stage.take_next(under_way == 0),
        };
        let time = match next {
            Next::End => return,
            Next::Write(work) => {
                writes.push(parts.write_one(work));
                continue;
            }
            Next::Wait(time) => time,
        };
        let ended = async {
            match writes.next().await {
                Some(ended) => ended,
                None => std::future::pending().await,
            }
        };
        if let Either::Left((ended, _)) = select(pin!(ended), pin!(parts.wait_work(time))).await {
            parts.count_written(ended);
        }
    }
}

impl Parts {
    /// Waits for the next entry that may be written. `Duration::MAX`: no more may be written now.
    async fn wait_work(&self, time: Option<Duration>) {
        match time {
            Some(Duration::MAX) => self.snapshot.wait_off().await,
            None => self.snapshot.stage.wait_work().await,
            Some(time) => {
                let work = self.snapshot.stage.wait_work();
                select(pin!(work), pin!(bds_io::sleep(time))).await;
            }
        }
    }

    async fn write_one(&self, work: ToWrite) -> (u64, Result<()>) {
        let result = self.write_to_target(&work).await;
        (work.range.start, result)
    }

    fn count_written(&self, (start, result): (u64, Result<()>)) {
        let snapshot = &self.snapshot;
        let breaks = match &result {
            Err(error) if snapshot.options.on_error == OnCbwError::BreakSnapshot => {
                Some(error.duplicate())
            }
            _ => None,
        };
        snapshot.stage.written(start, result);
        if let Some(error) = breaks {
            snapshot.break_off(start, &error);
        }
    }
}

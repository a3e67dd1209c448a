//! The tasks behind the guest: write staged data to the target, and to the spill file.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bds_core::copy::{Content, CopyWrite};
use bds_core::driver::{ReadFlags, WriteFlags, ZeroFlags};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;
use futures_util::StreamExt as _;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesUnordered;

use super::keep::Parts;
use super::snapshot::OnCbwError;
use super::stage::{Data, Next, SpillRange, Starts, ToSpill, ToWrite};

/// Staged runs that are written to the target at once.
const MAX_WRITES: usize = 16;

/// Staged runs that are written to the spill file at once.
const MAX_SPILLS: usize = 4;

impl Parts {
    /// Starts the tasks that what was put into the staging area needs.
    pub(super) fn start_tasks(self: &Arc<Self>, starts: Starts, start: u64, is_claimed: bool) {
        if starts.writer {
            bds_io::spawn(write_staged(Arc::clone(self))).detach();
        }
        if starts.spiller {
            bds_io::spawn(spill_staged(Arc::clone(self))).detach();
        }
        if !is_claimed {
            bds_io::spawn(settle(Arc::clone(self), start)).detach();
        }
    }

    /// Writes one staged run to the target.
    async fn write_to_target(&self, work: &ToWrite) -> Result<()> {
        let (start, len) = (work.range.start, work.range.end - work.range.start);
        let target: &dyn CopyWrite = &self.target;
        let data = match &work.data {
            Data::Zero => {
                let seen = self.observe(start, Content::Zeros(len), false).await?;
                for range in seen.missing() {
                    let len = range.end - range.start;
                    let zeroed = target.write_zeroes(range.start, len, ZeroFlags::MAY_UNMAP).await;
                    let _only_without_fallback = zeroed?;
                }
                seen.written();
                return Ok(());
            }
            Data::Memory(data) => data.clone(),
            Data::Spilled(place) => {
                let len = usize::try_from(len).unwrap_or(0);
                let buffer = bds_io::Buf::zeroed(len, 4096).iov();
                self.read_spilled(place, 0, buffer.clone()).await?;
                buffer
            }
        };
        let options = &self.snapshot.options;
        let unit = options.compress.and_then(|unit| usize::try_from(unit).ok());
        let piece_len = unit.unwrap_or(data.len()).max(1);
        for at in (0..data.len()).step_by(piece_len) {
            let piece = data.slice(at..data.len().min(at + piece_len));
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

    /// Fills `iov` with spilled data, from byte `at` of its run on.
    pub(super) async fn read_spilled(&self, place: &SpillRange, at: u64, iov: IoVec) -> Result<()> {
        let spill = self.spill.as_ref().ok_or_else(no_spill_file)?;
        for (offset, bytes) in place.places(at, at + iov.len() as u64) {
            let part = iov.slice(index(bytes.start - at)..index(bytes.end - at));
            let read = spill.read(offset, part, ReadFlags::empty()).await;
            read.map_err(|error| error.context("cannot read the spill file"))?;
        }
        Ok(())
    }

    async fn spill(&self, work: &ToSpill) -> Result<()> {
        let spill = self.spill.as_ref().ok_or_else(no_spill_file)?;
        for (offset, bytes) in work.place.places(0, work.data.len() as u64) {
            let part = work.data.slice(index(bytes.start)..index(bytes.end));
            let written = spill.write(offset, part, WriteFlags::empty()).await;
            written.map_err(|error| error.context("cannot write the spill file"))?;
        }
        Ok(())
    }

    /// Waits for the next entry that may be written. `Duration::MAX`: no more may be written now.
    async fn wait_work(&self, time: Option<Duration>, under_way: usize) {
        match time {
            Some(Duration::MAX) => self.snapshot.wait_off().await,
            None => self.snapshot.stage.wait_work(under_way).await,
            Some(time) => {
                let work = self.snapshot.stage.wait_work(under_way);
                let _first = select(pin!(work), pin!(bds_io::sleep(time))).await;
            }
        }
    }

    async fn write_one(&self, work: ToWrite) -> (u64, Result<()>) {
        let result = self.write_to_target(&work).await;
        (work.range.start, result)
    }

    async fn spill_one(&self, work: ToSpill) -> (ToSpill, Result<()>) {
        let result = self.spill(&work).await;
        (work, result)
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

/// Writes staged data to the target until there is none, or the snapshot is off.
async fn write_staged(parts: Arc<Parts>) {
    let mut writes = FuturesUnordered::new();
    loop {
        let next = match writes.len() {
            MAX_WRITES.. if !parts.snapshot.is_off() => Next::Wait(Some(Duration::MAX)),
            under_way => parts.snapshot.stage.take_next(under_way),
        };
        let time = match next {
            Next::End => return,
            Next::Write(work) => {
                writes.push(parts.write_one(work));
                continue;
            }
            Next::Wait(time) => time,
        };
        let work = parts.wait_work(time, writes.len());
        let ended = pin!(next_ended(&mut writes));
        if let Either::Left((ended, _)) = select(ended, pin!(work)).await {
            parts.count_written(ended);
        }
    }
}

/// Writes staged data to the spill file while memory is short, until there is none, or the snapshot
/// is off.
async fn spill_staged(parts: Arc<Parts>) {
    let stage = &parts.snapshot.stage;
    let mut writes = FuturesUnordered::new();
    loop {
        let next = match writes.len() {
            MAX_SPILLS.. if !parts.snapshot.is_off() => Next::Wait(Some(Duration::MAX)),
            under_way => stage.take_to_spill(under_way),
        };
        let time = match next {
            Next::End => return,
            Next::Write(work) => {
                writes.push(parts.spill_one(work));
                continue;
            }
            Next::Wait(time) => time,
        };
        let under_way = writes.len();
        let wait = async {
            match time {
                Some(Duration::MAX) => parts.snapshot.wait_off().await,
                Some(time) => {
                    let off = parts.snapshot.wait_off();
                    let _first = select(pin!(off), pin!(bds_io::sleep(time))).await;
                }
                None => stage.wait_spill_work(under_way).await,
            }
        };
        let ended = pin!(next_ended(&mut writes));
        if let Either::Left(((work, result), _)) = select(ended, pin!(wait)).await {
            stage.spilled(work, result);
        }
    }
}

/// The next write that ends; none under way never ends.
async fn next_ended<F: Future>(writes: &mut FuturesUnordered<F>) -> F::Output {
    match writes.next().await {
        Some(ended) => ended,
        None => std::future::pending().await,
    }
}

/// Waits until the copy of a range has ended whose old data was staged too, and lets the staging
/// area decide what becomes of that.
async fn settle(parts: Arc<Parts>, start: u64) {
    let snapshot = &parts.snapshot;
    loop {
        let claimable = snapshot.map.wait_claimable(start..start + 1);
        if let Either::Right(_) = select(pin!(claimable), pin!(snapshot.wait_off())).await {
            return;
        }
        if snapshot.stage.settle(start, &snapshot.map) {
            return;
        }
    }
}

fn index(byte: u64) -> usize {
    usize::try_from(byte).unwrap_or(usize::MAX)
}

fn no_spill_file() -> Error {
    Error::new(ErrorKind::NotSupported, "there is no spill file")
}

//! One worker: takes pieces, moves them through its one buffer.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bds_io::IoVec;
use bds_io::sync::Notify;

use super::plan::{Kind, Piece};
use super::{Job, sparse};
use crate::driver::{Attempt, WriteFlags, ZeroFlags};
use crate::error::{Error, Result};

/// When a read fails while salvaging, the piece is read again in steps of this size.
const SALVAGE_STEP: u64 = 512;

/// A pause is made in steps of this length: a low rate can ask for minutes, and a flag cannot wake what sleeps.
const PAUSE_STEP: Duration = Duration::from_millis(50);

/// Lets pieces be written in the order of their numbers.
#[derive(Default)]
pub(super) struct Turns {
    now: AtomicU64,
    passed: Notify,
}

impl Turns {
    async fn wait(&self, number: u64) {
        loop {
            let mut passed = pin!(self.passed.notified());
            passed.as_mut().enable();
            if self.now.load(Ordering::SeqCst) >= number {
                return;
            }
            passed.await;
        }
    }

    fn pass(&self, number: u64) {
        self.now.fetch_max(number + 1, Ordering::SeqCst);
        self.passed.notify_waiters();
    }

    /// After a failure nobody waits for a piece that will never be written.
    fn release_all(&self) {
        self.pass(u64::MAX - 1);
    }
}

/// Moves pieces until there are none.
pub(super) struct Worker<'a> {
    job: &'a Job<'a>,
    buffer: Option<IoVec>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(job: &'a Job<'a>) -> Self {
        Self { job, buffer: None }
    }

    /// Ends at the end of the plan, at a failure (its own: with the error), or when another worker failed.
    pub(super) async fn run(mut self) -> Result<()> {
        let result = self.work().await;
        if result.is_err() {
            self.job.failed.store(true, Ordering::Relaxed);
            self.job.turns.release_all();
        }
        result
    }

    async fn work(&mut self) -> Result<()> {
        let job = self.job;
        loop {
            job.check_cancel()?;
            let piece = {
                let mut planner = job.planner.lock().await;
                if job.is_stopped() {
                    return Ok(());
                }
                planner.next().await?
            };
            let Some(piece) = piece else { return Ok(()) };
            if piece.kind == Kind::Data {
                let limit = job.options.rate_limit.as_ref();
                self.pause(limit.map_or(Duration::ZERO, |limit| limit(piece.len))).await?;
                if job.is_stopped() {
                    return Ok(());
                }
            }
            self.move_piece(&piece).await?;
            job.progress(piece.len);
        }
    }

    /// Waits as the rate limit asks, or until the copy ends for another reason.
    async fn pause(&self, mut rest: Duration) -> Result<()> {
        while !rest.is_zero() && !self.job.is_stopped() {
            let step = rest.min(PAUSE_STEP);
            bds_io::sleep(step).await;
            rest -= step;
            self.job.check_cancel()?;
        }
        Ok(())
    }

    async fn move_piece(&mut self, piece: &Piece) -> Result<()> {
        let job = self.job;
        let data = match piece.kind {
            Kind::Data if self.offload(piece).await? => {
                self.wait_turn(piece).await;
                job.turns.pass(piece.number);
                return Ok(());
            }
            Kind::Data => Some(self.read(piece).await?),
            Kind::Zero | Kind::Skip => None,
        };
        self.wait_turn(piece).await;
        if job.is_stopped() {
            return Ok(());
        }
        let result = match (piece.kind, data) {
            (Kind::Skip, _) => {
                job.counts.skipped.fetch_add(piece.len, Ordering::Relaxed);
                Ok(())
            }
            (Kind::Data, Some(data)) => self.write(piece, data).await,
            (_, _) => self.zero(piece.target_offset, piece.len).await,
        };
        result?;
        job.turns.pass(piece.number);
        Ok(())
    }

    /// Compressed clusters may land in any order: each goes to the end of the file anyway.
    async fn wait_turn(&self, piece: &Piece) {
        let options = self.job.options;
        if !options.out_of_order && options.compress.is_none() && options.workers > 1 {
            self.job.turns.wait(piece.number).await;
        }
    }

    /// True if the host copied the piece.
    async fn offload(&self, piece: &Piece) -> Result<bool> {
        let job = self.job;
        if !job.options.offload {
            return Ok(false);
        }
        let source = &job.sources[piece.source].backend;
        let attempt = job
            .target
            .copy_range_from(source, piece.offset, piece.target_offset, piece.len)
            .await
            .map_err(|e| e.context("the host cannot copy to the target").at(piece.target_offset))?;
        if attempt == Attempt::Unsupported {
            return Ok(false);
        }
        job.counts.written.fetch_add(piece.len, Ordering::Relaxed);
        Ok(true)
    }

    fn buffer(&mut self, len: u64) -> IoVec {
        let job = self.job;
        let most = match job.options.compress {
            Some(cluster_len) => usize::try_from(cluster_len).unwrap_or(job.options.buffer_len),
            None => job.options.buffer_len,
        };
        let buffer = self.buffer.get_or_insert_with(|| job.pool.take(most).slice(0..most));
        // Pieces are cut to the buffer.
        buffer.slice(0..usize::try_from(len).unwrap_or(most).min(most))
    }

    async fn read(&mut self, piece: &Piece) -> Result<IoVec> {
        let data = self.buffer(piece.len);
        let source = &self.job.sources[piece.source].backend;
        match source.read(piece.offset, data.clone()).await {
            Ok(()) => {}
            Err(_) if self.job.options.salvage.is_some() => {
                self.salvage(piece, &data).await?;
            }
            Err(error) => return Err(error.context("cannot read the source").at(piece.offset)),
        }
        Ok(data)
    }

    /// Reads step by step; what fails becomes zeros and is told.
    async fn salvage(&self, piece: &Piece, data: &IoVec) -> Result<()> {
        let source = &self.job.sources[piece.source].backend;
        let step_len = usize::try_from(SALVAGE_STEP).unwrap_or(512);
        let mut at = 0;
        while at < data.len() {
            self.job.check_cancel()?;
            let end = data.len().min(at + step_len);
            let offset = piece.offset + at as u64;
            if let Err(error) = source.read(offset, data.slice(at..end)).await {
                data.fill(at..end, 0);
                let len = (end - at) as u64;
                self.job.counts.salvaged.fetch_add(len, Ordering::Relaxed);
                if let Some(tell) = &self.job.options.salvage {
                    tell(offset, len, &error);
                }
            }
            at = end;
        }
        Ok(())
    }

    async fn write(&self, piece: &Piece, data: IoVec) -> Result<()> {
        let job = self.job;
        if job.options.compress.is_some() {
            return self.write_compressed(piece, data).await;
        }
        for part in sparse::parts(&data, piece.target_offset, job.options.sparse_len) {
            let offset = piece.target_offset + part.range.start as u64;
            let len = part.range.len() as u64;
            if part.is_zero {
                self.zero(offset, len).await?;
                continue;
            }
            job.target
                .write(offset, data.slice(part.range), WriteFlags::empty())
                .await
                .map_err(|e| target_failed(e, offset))?;
            job.counts.written.fetch_add(len, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn write_compressed(&self, piece: &Piece, data: IoVec) -> Result<()> {
        let job = self.job;
        if job.options.sparse_len != 0 && data.is_zero(0..data.len()) {
            return self.zero(piece.target_offset, piece.len).await;
        }
        job.target
            .write_compressed(piece.target_offset, data)
            .await
            .map_err(|e| target_failed(e, piece.target_offset))?;
        job.counts.written.fetch_add(piece.len, Ordering::Relaxed);
        Ok(())
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let job = self.job;
        if job.options.target_is_zero {
            job.counts.skipped.fetch_add(len, Ordering::Relaxed);
            return Ok(());
        }
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, job.options.may_unmap);
        let done = job.target.write_zeroes(offset, len, flags).await;
        let _without_fallback_only = done.map_err(|e| target_failed(e, offset))?;
        job.counts.zeroed.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}

fn target_failed(error: Error, offset: u64) -> Error {
    error.context("cannot write the target").at(offset)
}

//! Copies pieces: a worker takes them from the planner and copies them through its buffer, in order
//! of their writes.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bds_io::IoVec;

use super::job::Job;
use super::plan::{Kind, Piece, Segment};
use super::sparse;
use crate::driver::{Attempt, WriteFlags, ZeroFlags};
use crate::error::{Error, Result};
use crate::graph::walk;
use crate::request::Backend;

/// When a read fails while salvaging, the piece is read again in steps of this size.
const SALVAGE_STEP: u64 = 512;

/// Length of a step of a pause: a low rate can require minutes, and setting the cancel flag wakes
/// no sleeper.
const PAUSE_STEP: Duration = Duration::from_millis(50);

/// Copies pieces until there are none.
pub(super) struct Worker<'a> {
    job: &'a Job<'a>,
    buffer: Option<IoVec>,
    /// Holds what the target shows already, where that is compared.
    old_buffer: Option<IoVec>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(job: &'a Job<'a>) -> Self {
        Self { job, buffer: None, old_buffer: None }
    }

    /// Runs until the plan ends, the worker fails (with the error) or another worker failed.
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
            self.copy_piece(&piece).await?;
            job.progress(piece.len);
        }
    }

    /// Pauses for the rate limit, at most until the copy ends for another reason.
    async fn pause(&self, mut rest: Duration) -> Result<()> {
        while !rest.is_zero() && !self.job.is_stopped() {
            let step = rest.min(PAUSE_STEP);
            bds_io::sleep(step).await;
            rest -= step;
            self.job.check_cancel()?;
        }
        Ok(())
    }

    async fn copy_piece(&mut self, piece: &Piece) -> Result<()> {
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

    /// Polls a write once, which begins it, and passes the turn of `piece` before it ends.
    async fn pass_at_begin<T>(&self, piece: &Piece, write: impl Future<Output = T>) -> T {
        let mut write = pin!(write);
        let mut has_passed = false;
        poll_fn(|cx| {
            let polled = write.as_mut().poll(cx);
            if !std::mem::replace(&mut has_passed, true) {
                self.job.turns.pass(piece.number);
            }
            polled
        })
        .await
    }

    /// Compressed clusters may be written in any order: each goes to the end of the file anyway.
    async fn wait_turn(&self, piece: &Piece) {
        let options = self.job.options;
        if !options.out_of_order && options.compress.is_none() && options.workers > 1 {
            self.job.turns.wait(piece.number).await;
        }
    }

    /// True if the host copied the piece.
    async fn offload(&self, piece: &Piece) -> Result<bool> {
        let job = self.job;
        // Comparing needs the bytes here.
        if !job.options.offload || job.options.target_shows.is_some() {
            return Ok(false);
        }
        let source = &job.sources[piece.first.source].backend;
        let attempt = job
            .target
            .copy_range_from(source, piece.first.offset, piece.target_offset, piece.len)
            .await
            .map_err(|e| e.context("the host cannot copy to the target").at(piece.target_offset))?;
        if attempt == Attempt::Unsupported {
            return Ok(false);
        }
        job.counts.written.fetch_add(piece.len, Ordering::Relaxed);
        Ok(true)
    }

    fn buffer_len(&self) -> usize {
        let job = self.job;
        match job.options.compress {
            Some(cluster_len) => usize::try_from(cluster_len).unwrap_or(job.options.buffer_len),
            None => job.options.buffer_len,
        }
    }

    fn buffer(&mut self, len: u64) -> IoVec {
        let (most, pool) = (self.buffer_len(), &self.job.pool);
        let buffer = self.buffer.get_or_insert_with(|| pool.take(most).slice(0..most));
        // Pieces are cut to the buffer.
        buffer.slice(0..usize::try_from(len).unwrap_or(most).min(most))
    }

    async fn read(&mut self, piece: &Piece) -> Result<IoVec> {
        let data = self.buffer(piece.len);
        let mut at = 0;
        for segment in piece.segments() {
            let end = data.len().min(at + usize::try_from(segment.len).unwrap_or(data.len()));
            self.read_segment(segment, data.slice(at..end)).await?;
            at = end;
        }
        Ok(data)
    }

    async fn read_segment(&self, segment: Segment, data: IoVec) -> Result<()> {
        let source = &self.job.sources[segment.source].backend;
        match source.read(segment.offset, data.clone()).await {
            Ok(()) => Ok(()),
            Err(_) if self.job.options.salvage.is_some() => self.salvage(segment, &data).await,
            Err(error) => {
                let error = match source.node().as_deref().and_then(walk::filename) {
                    Some(file) => error.file(file),
                    None => error,
                };
                Err(error.context("cannot read the source").at(segment.offset))
            }
        }
    }

    /// Reads step by step; steps that fail become zeros and are reported.
    async fn salvage(&self, segment: Segment, data: &IoVec) -> Result<()> {
        let source = &self.job.sources[segment.source].backend;
        let step_len = usize::try_from(SALVAGE_STEP).unwrap_or(512);
        let report = |lost: Option<(u64, u64, Error)>| {
            if let (Some(salvaged), Some((offset, len, error))) = (&self.job.options.salvage, lost)
            {
                salvaged(offset, len, &error);
            }
        };
        let mut at = 0;
        // A lost run is reported once, with its first error.
        let mut lost: Option<(u64, u64, Error)> = None;
        while at < data.len() {
            self.job.check_cancel()?;
            let end = data.len().min(at + step_len);
            let offset = segment.offset + at as u64;
            if let Err(error) = source.read(offset, data.slice(at..end)).await {
                data.fill(at..end, 0);
                let len = (end - at) as u64;
                self.job.counts.salvaged.fetch_add(len, Ordering::Relaxed);
                lost = match lost {
                    Some((start, so_far, first)) => Some((start, so_far + len, first)),
                    None => Some((offset, len, error)),
                };
            } else {
                report(lost.take());
            }
            at = end;
        }
        report(lost);
        Ok(())
    }

    /// The parts of the data that the target does not show already.
    async fn differing(
        &mut self,
        piece: &Piece,
        data: &IoVec,
        shown: &Backend,
    ) -> Result<Vec<Range<usize>>> {
        let job = self.job;
        let most = self.buffer_len();
        let old = self.old_buffer.get_or_insert_with(|| job.pool.take(most).slice(0..most));
        let old = old.slice(0..data.len());
        let shown_len = shown.len().saturating_sub(piece.target_offset);
        let old_len = usize::try_from(shown_len).unwrap_or(usize::MAX).min(data.len());
        // Behind its end an image shows zeros.
        old.fill(old_len..data.len(), 0);
        if old_len > 0 {
            let read = shown.read(piece.target_offset, old.slice(0..old_len)).await;
            read.map_err(|e| {
                e.context("cannot read what the target shows already").at(piece.target_offset)
            })?;
        }
        Ok(sparse::differing(data, &old, piece.target_offset))
    }

    async fn write(&mut self, piece: &Piece, data: IoVec) -> Result<()> {
        let job = self.job;
        let compresses = job.options.compress.is_some();
        let Some(shown) = &job.options.target_shows else {
            return match compresses {
                true => self.write_compressed(piece, data).await,
                false => self.write_parts(piece, 0, data, true).await,
            };
        };
        let differing = self.differing(piece, &data, shown).await?;
        let differing_len = differing.iter().map(Range::len).sum::<usize>();
        if compresses && differing_len > 0 {
            return self.write_compressed(piece, data).await;
        }
        job.counts.skipped.fetch_add((data.len() - differing_len) as u64, Ordering::Relaxed);
        let last_end = differing.last().map(|range| range.end);
        for range in differing {
            let is_last = last_end == Some(range.end);
            self.write_parts(piece, range.start, data.slice(range), is_last).await?;
        }
        Ok(())
    }

    /// Writes the bytes of a piece from `start` on. `is_last`: no bytes of the piece are written
    /// after them.
    async fn write_parts(
        &self,
        piece: &Piece,
        start: usize,
        data: IoVec,
        is_last: bool,
    ) -> Result<()> {
        let job = self.job;
        let target_offset = piece.target_offset + start as u64;
        for part in sparse::parts(&data, target_offset, job.options.sparse_len) {
            let offset = target_offset + part.range.start as u64;
            let len = part.range.len() as u64;
            if part.is_zero {
                self.zero(offset, len).await?;
                continue;
            }
            let passes = is_last && part.range.end == data.len();
            let write = job.target.write(offset, data.slice(part.range), WriteFlags::empty());
            let written = match passes {
                true => self.pass_at_begin(piece, write).await,
                false => write.await,
            };
            written.map_err(|e| target_failed(e, offset))?;
            job.counts.written.fetch_add(len, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn write_compressed(&self, piece: &Piece, data: IoVec) -> Result<()> {
        let job = self.job;
        if job.options.sparse_len != 0 && data.is_zero(0..data.len()) {
            return self.zero(piece.target_offset, piece.len).await;
        }
        let data = self.whole_cluster(piece, data).await?;
        job.target
            .write_compressed(piece.target_offset, data)
            .await
            .map_err(|e| target_failed(e, piece.target_offset))?;
        job.counts.written.fetch_add(piece.len, Ordering::Relaxed);
        Ok(())
    }

    /// Completes a compressed cluster with the target's bytes behind the end of the last source.
    async fn whole_cluster(&self, piece: &Piece, mut data: IoVec) -> Result<IoVec> {
        let Job { target, options, pool, .. } = self.job;
        let Some(cluster_len) = options.compress else { return Ok(data) };
        let end = piece.target_offset + piece.len;
        let whole_end = end.next_multiple_of(cluster_len).min(target.len());
        let Ok(rest_len @ 1..) = usize::try_from(whole_end.saturating_sub(end)) else {
            return Ok(data);
        };
        let rest = pool.take(rest_len).slice(0..rest_len);
        target.read(end, rest.clone()).await.map_err(|e| {
            e.context("cannot read what the target holds behind the end of the source").at(end)
        })?;
        data.push(rest);
        Ok(data)
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

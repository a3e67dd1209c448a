//! Copies what a [`CopyMap`] names, with many requests in flight: the engine of jobs and of
//! copy-before-write.
//!
//! ```text
//! claim ─► status ─► data │ zeros │ nothing ─► request (up to 64, see `Window`) ─► done
//!   ▲                                                 │ failed: the range is dirty again
//!   └──── verdict: retry, skip, or fail ◄─────────────┘
//! ```
//!
//! Status is queried after the claim: what a guest writes later marks its granules again, so an old
//! answer is never the last word. The requests run in the caller's future, one claim each.

mod options;
mod request;
#[cfg(test)]
mod tests;
mod window;

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use futures_util::StreamExt as _;
use futures_util::future::select;
use futures_util::stream::FuturesUnordered;

use super::control::{CopyControl, ErrorVerdict};
use super::map::{Claim, CopyMap};
use super::sides::{CopyRead, CopyWrite, Found};
use crate::driver::BoxFuture;
use crate::error::Result;

pub use options::{MAX_CHUNK, MAX_OFFLOAD, MAX_REQUESTS, MEMORY, RunOptions};
use request::{Ended, Failure, Shared};
use window::Window;

/// Copies every granule that is dirty in the map (or in a range of it), also those that are marked
/// meanwhile. Returns when it is clean and no claim in it is under way, also none of another user.
///
/// The future must be polled until it ends or is dropped, as in a task of a job or in a driver's
/// operation: claims that are not polled stay busy for ever. [`run_in_task`] has no such condition.
/// Dropped, it stops: claims are dirty again, requests that a driver has begun run to completion
/// and keep later writes of their range waiting at the target.
///
/// # Errors
/// The error for which `control` said [`ErrorVerdict::Fail`]; it names the side, the node and the
/// offset. Nothing of this copy is in flight any more, and what was not copied is dirty.
/// `InvalidInput`: wrong options.
pub async fn run(
    map: &CopyMap,
    source: &dyn CopyRead,
    target: &dyn CopyWrite,
    options: &RunOptions,
    control: &dyn CopyControl,
) -> Result<()> {
    options.check(map)?;
    let shared = Shared::new(map, (source, target), options);
    let mut engine = Engine {
        shared: &shared,
        control,
        requests: FuturesUnordered::new(),
        window: Window::new(options),
        memory: 0,
        cursor: shared.range.start,
        failure: None,
    };
    engine.work().await?;
    if options.compress.is_some() && options.range.is_none() {
        let padded = target.write_compressed(map.len(), bds_io::IoVec::default()).await;
        padded.map_err(|e| e.context("cannot finish the compressed target"))?;
    }
    Ok(())
}

/// As [`run`], in a task: the future may also be kept without being polled, or forgotten; the copy
/// then runs to its end.
///
/// # Errors
/// As [`run`].
pub async fn run_in_task(
    map: Arc<CopyMap>,
    source: Arc<dyn CopyRead>,
    target: Arc<dyn CopyWrite>,
    options: RunOptions,
    control: Arc<dyn CopyControl>,
) -> Result<()> {
    bds_io::spawn_now(async move { run(&map, &*source, &*target, &options, &*control).await }).await
}

struct Engine<'s, 'a> {
    shared: &'s Shared<'a>,
    control: &'a dyn CopyControl,
    requests: FuturesUnordered<BoxFuture<'s, Ended>>,
    window: Window,
    /// Bytes of buffers in use.
    memory: u64,
    /// Where the search for dirty granules goes on.
    cursor: u64,
    /// The first failure since the last verdict.
    failure: Option<Failure>,
}

impl<'s> Engine<'s, '_> {
    async fn work(&mut self) -> Result<()> {
        loop {
            if self.failure.is_some() || self.control.should_pause() {
                self.wait_all().await;
                self.ask_verdict().await?;
                if self.control.should_pause() {
                    self.control.pause_point().await;
                }
                continue;
            }
            self.window.note_use(bds_io::now(), self.control.is_disk_in_use());
            if self.requests.len() >= self.window.limit() {
                self.wait_one().await;
            } else if let Some(claim) = self.claim() {
                self.begin(claim).await;
            } else if !self.requests.is_empty() {
                self.wait_one().await;
            } else if self.shared.map.is_clean_in(&self.shared.range) {
                return Ok(());
            } else {
                // Others copy: what they fail to copy is dirty again.
                let claimable = pin!(self.shared.map.wait_claimable(self.shared.range.clone()));
                select(claimable, self.control.pause_requested()).await;
            }
        }
    }

    /// The next claim from the cursor on, around the end.
    fn claim(&mut self) -> Option<Claim<'s>> {
        let (shared, map) = (self.shared, self.shared.map);
        let chunk = shared.chunk(self.window.max_len());
        let found = map.claim(self.cursor..shared.range.end, chunk);
        let claim = found.or_else(|| map.claim(shared.range.start..self.cursor, chunk))?;
        self.cursor = claim.range().end;
        Some(claim)
    }

    /// Begins the copy of a claim, or of the part of it that is of one kind.
    async fn begin(&mut self, mut claim: Claim<'s>) {
        let shared = self.shared;
        let chunk = shared.chunk(self.window.max_len());
        let kind = self.alongside(shared.plan(&mut claim, chunk)).await;
        let range = claim.range();
        self.cursor = range.end;
        let len = range.end - range.start;
        let memory = if kind == Found::Data { len.min(MAX_CHUNK) } else { 0 };
        while self.memory + memory > shared.options.memory && !self.requests.is_empty() {
            self.wait_one().await;
        }
        if self.failure.is_some() {
            return; // The claim is dropped, which leaves its range dirty.
        }
        self.memory += memory;
        self.requests.push(Box::pin(shared.copy(claim, kind, memory)));
        if kind == Found::Data {
            // It begins before the pause for its bytes.
            let throttle = self.control.throttle(len);
            self.alongside(throttle).await;
        }
    }

    /// Awaits a future while the requests in flight are polled.
    async fn alongside<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        poll_fn(|cx| {
            while let Poll::Ready(Some(ended)) = self.requests.poll_next_unpin(cx) {
                self.count(ended);
            }
            future.as_mut().poll(cx)
        })
        .await
    }

    async fn wait_one(&mut self) {
        if let Some(ended) = self.requests.next().await {
            self.count(ended);
        }
    }

    async fn wait_all(&mut self) {
        while let Some(ended) = self.requests.next().await {
            self.count(ended);
        }
    }

    fn count(&mut self, ended: Ended) {
        self.memory -= ended.memory;
        if let (Ok(bytes), Some(took)) = (&ended.result, ended.took) {
            self.window.note(*bytes, took);
        }
        match ended.result {
            Ok(bytes) => self.control.copied(bytes),
            // Later ones are dirty again: what fails for good fails again.
            Err(failure) => drop(self.failure.get_or_insert(failure)),
        }
    }

    /// Asks about the first failure. Nothing is in flight.
    async fn ask_verdict(&mut self) -> Result<()> {
        let Some(Failure { side, site, error }) = self.failure.take() else { return Ok(()) };
        let range = site.offset..site.offset + site.len;
        match self.control.on_error(side, site, &error).await {
            ErrorVerdict::Retry => Ok(()),
            ErrorVerdict::Skip => {
                self.shared.map.skip(range.clone());
                self.control.copied(range.end - range.start);
                Ok(())
            }
            ErrorVerdict::Fail => Err(error),
        }
    }
}

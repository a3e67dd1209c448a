//! Tests the engine: against a byte model with faults, pauses and marks meanwhile; dropped and
//! forgotten at every await; requests by table.
#![expect(clippy::cast_possible_truncation, reason = "small numbers of tests")]

mod cancel;
mod model;
mod requests;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bds_io::IoVec;

use crate::copy::{
    CopyControl, CopyRead, CopyWrite, ErrorSite, ErrorVerdict, Found, FoundRun, Side,
};
use crate::driver::{Attempt, BoxFuture, WriteFlags, ZeroFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::NodeId;
use crate::test_kit::{lock, yield_times};

const GRANULE: u64 = 4096;

/// A small random number generator of the tests: the same seed, the same faults.
#[derive(Debug)]
struct Dice(AtomicU64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1))
    }

    fn roll(&self, sides: u64) -> u64 {
        let mut x = self.0.load(Ordering::Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.store(x, Ordering::Relaxed);
        (x >> 11) % sides.max(1)
    }
}

/// One side in memory, which yields, fails by chance and checks that writes do not overlap.
struct Fake {
    name: &'static str,
    bytes: Mutex<Vec<u8>>,
    /// Runs that are not data.
    found: Mutex<Vec<(Range<u64>, Found)>>,
    dice: Dice,
    /// One operation in so many fails; 0: none.
    fails: AtomicU64,
    writing: Mutex<Vec<Range<u64>>>,
    reading: AtomicUsize,
    most: AtomicUsize,
    log: Mutex<Vec<(&'static str, Range<u64>)>>,
}

impl Fake {
    fn new(name: &'static str, bytes: Vec<u8>, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            name,
            bytes: Mutex::new(bytes),
            found: Mutex::default(),
            dice: Dice::new(seed),
            fails: AtomicU64::new(0),
            writing: Mutex::default(),
            reading: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            log: Mutex::default(),
        })
    }

    fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    fn in_flight(&self) -> usize {
        lock(&self.writing).len() + self.reading.load(Ordering::SeqCst)
    }

    async fn pass(&self, offset: u64) -> Result<()> {
        yield_times(usize::try_from(self.dice.roll(4)).unwrap()).await;
        let fails = self.fails.load(Ordering::SeqCst);
        if fails != 0 && self.dice.roll(fails) == 0 {
            return Err(Error::new(ErrorKind::Io, "injected").node("below").at(offset));
        }
        Ok(())
    }

    async fn change(&self, what: &'static str, range: Range<u64>, data: &[u8]) -> Result<()> {
        lock(&self.log).push((what, range.clone()));
        {
            let mut writing = lock(&self.writing);
            let overlaps = |w: &Range<u64>| w.start < range.end && range.start < w.end;
            assert!(!writing.iter().any(overlaps), "two copies of {range:?} at once");
            writing.push(range.clone());
            self.most.fetch_max(writing.len(), Ordering::SeqCst);
        }
        let _out = OnDrop(|| lock(&self.writing).retain(|w| *w != range));
        self.pass(range.start).await?;
        let at = usize::try_from(range.start).unwrap();
        lock(&self.bytes)[at..at + data.len()].copy_from_slice(data);
        self.pass(range.start).await
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

impl CopyRead for Fake {
    fn node_name(&self) -> String {
        self.name.to_owned()
    }

    fn read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            lock(&self.log).push(("read", offset..offset + iov.len() as u64));
            self.reading.fetch_add(1, Ordering::SeqCst);
            let _out = OnDrop(|| {
                self.reading.fetch_sub(1, Ordering::SeqCst);
            });
            self.pass(offset).await?;
            let at = usize::try_from(offset).unwrap();
            iov.copy_from(0, &lock(&self.bytes)[at..at + iov.len()]);
            self.pass(offset).await
        })
    }

    fn found(&self, at: u64, len: u64, above: Option<NodeId>) -> BoxFuture<'_, Result<FoundRun>> {
        assert!(above.is_none());
        Box::pin(async move {
            self.pass(at).await?;
            let found = lock(&self.found);
            let run = match found.iter().find(|(range, _)| range.contains(&at)) {
                Some((range, found)) => FoundRun { len: (range.end - at).min(len), found: *found },
                None => {
                    let next = found.iter().map(|(r, _)| r.start).filter(|s| *s > at).min();
                    FoundRun { len: next.map_or(len, |n| len.min(n - at)), found: Found::Data }
                }
            };
            Ok(run)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        lock(&self.log).push(("discard", offset..offset + len));
        Box::pin(async { Ok(()) })
    }
}

impl CopyWrite for Fake {
    fn node_name(&self) -> String {
        self.name.to_owned()
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        assert!(flags.is_empty());
        Box::pin(async move {
            let data = iov.to_vec(0..iov.len());
            self.change("write", offset..offset + data.len() as u64, &data).await
        })
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let data = iov.to_vec(0..iov.len());
            self.change("compressed", offset..offset + data.len() as u64, &data).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        let what = if flags == ZeroFlags::MAY_UNMAP { "unmap" } else { "zero" };
        Box::pin(async move {
            let zeros = vec![0; usize::try_from(len).unwrap()];
            self.change(what, offset..offset + len, &zeros).await?;
            Ok(Attempt::Done)
        })
    }
}

/// A control that pauses by chance, answers errors with one verdict, and checks that nothing is in
/// flight where that is promised.
struct Control {
    source: Arc<Fake>,
    target: Arc<Fake>,
    verdict: ErrorVerdict,
    dice: Dice,
    /// One question in so many pauses; 0: none.
    pauses: u64,
    wants_pause: AtomicBool,
    pause_points: AtomicUsize,
    copied: AtomicU64,
    throttled: AtomicU64,
    errors: Mutex<Vec<(Side, ErrorSite, String)>>,
}

impl Control {
    fn new(
        source: &Arc<Fake>,
        target: &Arc<Fake>,
        verdict: ErrorVerdict,
        pauses: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            source: source.clone(),
            target: target.clone(),
            verdict,
            dice: Dice::new(pauses + 77),
            pauses,
            wants_pause: AtomicBool::new(false),
            pause_points: AtomicUsize::new(0),
            copied: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
            errors: Mutex::default(),
        })
    }

    fn assert_idle(&self) {
        assert_eq!(self.source.in_flight() + self.target.in_flight(), 0);
    }
}

impl CopyControl for Control {
    fn should_pause(&self) -> bool {
        if self.pauses != 0 && self.dice.roll(self.pauses) == 0 {
            self.wants_pause.store(true, Ordering::SeqCst);
        }
        self.wants_pause.load(Ordering::SeqCst)
    }

    fn pause_point(&self) -> BoxFuture<'_, ()> {
        self.assert_idle();
        self.pause_points.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            yield_times(3).await;
            self.assert_idle();
            self.wants_pause.store(false, Ordering::SeqCst);
        })
    }

    fn throttle(&self, bytes: u64) -> BoxFuture<'_, ()> {
        self.throttled.fetch_add(bytes, Ordering::SeqCst);
        Box::pin(yield_times(usize::try_from(self.dice.roll(3)).unwrap()))
    }

    fn copied(&self, bytes: u64) {
        self.copied.fetch_add(bytes, Ordering::SeqCst);
    }

    fn on_error<'a>(
        &'a self,
        side: Side,
        site: ErrorSite,
        error: &'a Error,
    ) -> BoxFuture<'a, ErrorVerdict> {
        self.assert_idle();
        lock(&self.errors).push((side, site, error.to_string()));
        Box::pin(async { self.verdict })
    }
}

/// Bytes by granule, none of them zero.
fn pattern(len: u64, salt: u8) -> Vec<u8> {
    (0..len).map(|at| (at / GRANULE) as u8 ^ salt | 1).collect()
}

//! A guest that writes 4-KiB blocks at random offsets, and how long each write took.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bds_core::driver::WriteFlags;
use bds_core::graph::NodeRef;
use bds_core::request::{Backend, BackendOptions};
use bds_io::Buf;
use futures_util::future::try_join_all;
use serde_json::{Value, json};

use crate::settings::Settings;
use crate::{Failure, Result};

const BLOCK: usize = 4096;

/// Part of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Phase {
    Alone,
    During,
    Pivot,
}

impl Phase {
    const NAMES: [&str; 3] = ["alone", "during", "pivot"];
}

/// A guest at work, on a thread of its own.
pub(crate) struct GuestLoad {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<Vec<Sample>>>,
}

struct Shared {
    disk: Backend,
    phase: AtomicU8,
    is_over: AtomicBool,
    /// Writes that were given out.
    count: AtomicU64,
    /// Time between two writes; none: no clock.
    pause: Option<Duration>,
    start: Duration,
}

/// One write.
struct Sample {
    phase: u8,
    took: Duration,
}

impl GuestLoad {
    /// Starts it. `None`: there is none in these settings.
    pub(crate) fn start(node: &NodeRef, settings: &Settings) -> Result<Option<Self>> {
        if settings.depth == 0 {
            return Ok(None);
        }
        let options = BackendOptions { writable: true, ..BackendOptions::registered("guest") };
        let disk = Backend::new(node, options)?;
        let pause = (settings.rate > 0).then(|| Duration::from_secs(1) / settings.rate);
        let shared = Arc::new(Shared {
            disk,
            phase: AtomicU8::new(Phase::Alone as u8),
            is_over: AtomicBool::new(false),
            count: AtomicU64::new(0),
            pause,
            start: bds_io::now(),
        });
        let (own, depth) = (Arc::clone(&shared), settings.depth);
        let thread = std::thread::spawn(move || {
            let writers = (0..depth).map(|_| write_all(&own));
            let samples = bds_io::block_on(try_join_all(writers))?;
            Ok(samples.into_iter().flatten().collect())
        });
        Ok(Some(Self { shared, thread }))
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.shared.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Ends it and reports its writes, by phase.
    pub(crate) fn stop(self) -> Result<Value> {
        self.shared.is_over.store(true, Ordering::Relaxed);
        let samples = self.thread.join().map_err(|_| Failure::from("the guest panicked"))??;
        let mut report = json!({});
        for (phase, name) in (0_u8..).zip(Phase::NAMES) {
            let of_phase = samples.iter().filter(|sample| sample.phase == phase);
            let mut took: Vec<f64> =
                of_phase.map(|sample| sample.took.as_secs_f64() * 1e6).collect();
            took.sort_by(f64::total_cmp);
            report[name] = percentiles(&took);
        }
        Ok(report)
    }
}

/// One write after the other until it is over. By the clock, a write's time begins when it was due.
async fn write_all(shared: &Shared) -> Result<Vec<Sample>> {
    let buf = Buf::zeroed(BLOCK, BLOCK);
    buf.iov().copy_from(0, &[0x5a; BLOCK]);
    let blocks = shared.disk.len() / BLOCK as u64;
    let mut samples = Vec::new();
    while !shared.is_over.load(Ordering::Relaxed) {
        let number = shared.count.fetch_add(1, Ordering::Relaxed);
        let mut due = bds_io::now();
        if let Some(pause) = shared.pause {
            due = shared.start + pause * u32::try_from(number)?;
            if let Some(early) = due.checked_sub(bds_io::now()) {
                bds_io::sleep(early).await;
            }
        }
        let offset = random(number) % blocks * BLOCK as u64;
        let phase = shared.phase.load(Ordering::Relaxed);
        shared.disk.write(offset, buf.iov(), WriteFlags::empty()).await?;
        samples.push(Sample { phase, took: bds_io::now().saturating_sub(due) });
        if shared.pause.is_none() {
            // Inline writes never wait, and the writers share the thread.
            bds_io::yield_now().await;
        }
    }
    Ok(samples)
}

/// A number that looks random, of a counter (the finaliser of SplitMix64).
fn random(number: u64) -> u64 {
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Percentiles of sorted microseconds.
fn percentiles(took: &[f64]) -> Value {
    let at = |thousandths: usize| {
        let last = took.len().saturating_sub(1);
        took.get((took.len() * thousandths / 1000).min(last)).copied()
    };
    json!({
        "count": took.len(), "p50": at(500), "p99": at(990), "p999": at(999),
        "max": took.last(),
    })
}

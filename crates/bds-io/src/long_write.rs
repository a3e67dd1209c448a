//! `InlineLimit`: decides whether a buffered write runs on its own thread or in the engine.
//!
//! On ext4 the engine hands a buffered write to another thread. For a thread that has nothing else
//! to do meanwhile that only costs a hand-over: 64-KiB writes one after the other take 2.8 times as
//! long. For a thread with more such writes at hand (clusters that are copied on write) the copy
//! into the page cache overlaps the reads of the next ones.
//!
//! ```text
//! len <= 32 KiB            inline
//! len <= 256 KiB, alone    inline                 "alone": fewer than 2 other long writes
//! len <= 256 KiB           engine                 of this Context are in the engine or about to start
//! len >  256 KiB           engine
//! ```
//!
//! "About to start" is counted, not timed: a write that finds the engine empty lets the other ready
//! tasks run once and then looks how many long writes came after it. A future that is dropped or
//! forgotten meanwhile leaves no count behind.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Longest write that is inline whatever else is under way. Up to here the hand-over costs more
/// than the copy.
const SHORT_MAX_LEN: usize = 32 << 10;
/// Longest write that is inline if it is alone. Measured on ext4 (examples/ratios.rs): up to 256
/// KiB the engine costs up to twice the CPU and time; at 2 MiB they are close, and the write would
/// delay the thread's other tasks too long.
const ALONE_MAX_LEN: usize = 256 << 10;
/// Other long writes from which on the engine is used. With one other, the thread would still wait
/// for the engine most of the time.
const OTHERS_MIN: u64 = 2;

/// How long a buffered write of a file may be to run inline.
#[derive(Clone, Copy, Debug)]
pub(crate) enum InlineLimit {
    /// This many bytes, whatever else is under way.
    Fixed(usize),
    /// The measured limits, by what else is under way.
    Measured,
}

/// What the length alone says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByLen {
    Inline,
    Engine,
    /// Inline if [`Arrival::is_alone`].
    InlineIfAlone,
}

impl InlineLimit {
    /// Longest write that may run inline at all.
    pub(crate) fn max_len(self) -> usize {
        match self {
            InlineLimit::Fixed(max_len) => max_len,
            InlineLimit::Measured => ALONE_MAX_LEN,
        }
    }

    /// Decides by the length alone.
    pub(crate) fn by_len(self, len: usize) -> ByLen {
        match self {
            InlineLimit::Fixed(max_len) if len <= max_len => ByLen::Inline,
            InlineLimit::Measured if len <= SHORT_MAX_LEN => ByLen::Inline,
            InlineLimit::Measured if len <= ALONE_MAX_LEN => ByLen::InlineIfAlone,
            InlineLimit::Fixed(_) | InlineLimit::Measured => ByLen::Engine,
        }
    }
}

/// Whether too little is under way to be worth the engine: `in_engine` other long writes are there,
/// `came_later` wait to start.
fn is_alone(in_engine: usize, came_later: u64) -> bool {
    came_later.saturating_add(in_engine as u64) < OTHERS_MIN
}

/// The long writes of one Context.
#[derive(Debug, Default)]
pub(crate) struct LongWrites {
    /// How many asked for a place since the Context was made.
    arrived: Cell<u64>,
    /// How many the engine has.
    in_engine: Arc<AtomicUsize>,
}

/// The moment at which a write asked for a place.
pub(crate) struct Arrival {
    number: u64,
    in_engine: Arc<AtomicUsize>,
}

impl Arrival {
    /// Whether the engine has too little to be worth it, before the other tasks ran.
    pub(crate) fn finds_engine_idle(&self) -> bool {
        is_alone(self.in_engine(), 0)
    }

    /// Whether too little is under way, after the other tasks ran once. A task that moved to
    /// another Context meanwhile is alone there.
    pub(crate) fn is_alone(&self, writes: &LongWrites) -> bool {
        match writes.came_after(self) {
            Some(came_later) => is_alone(self.in_engine(), came_later),
            None => true,
        }
    }

    fn in_engine(&self) -> usize {
        self.in_engine.load(Ordering::Relaxed)
    }
}

impl LongWrites {
    /// Counts a write that asks for a place.
    pub(crate) fn arrive(&self) -> Arrival {
        let number = self.arrived.get() + 1;
        self.arrived.set(number);
        Arrival { number, in_engine: self.in_engine.clone() }
    }

    /// How many arrived after that one. `None`: that one arrived at another Context.
    fn came_after(&self, arrival: &Arrival) -> Option<u64> {
        let is_here = Arc::ptr_eq(&self.in_engine, &arrival.in_engine);
        is_here.then(|| self.arrived.get() - arrival.number)
    }

    /// Counts a write that goes to the engine.
    pub(crate) fn enter_engine(&self) -> InEngine {
        self.in_engine.fetch_add(1, Ordering::Relaxed);
        InEngine(self.in_engine.clone())
    }
}

/// Counts a long write that the engine has, until dropped (with its operation, on any thread).
#[derive(Debug)]
pub(crate) struct InEngine(Arc<AtomicUsize>);

impl Drop for InEngine {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1 << 10;

    #[test]
    fn the_length_decides_first() {
        use ByLen::*;
        let table = [
            (0, Inline),
            (32 * KIB, Inline),
            (32 * KIB + 1, InlineIfAlone),
            (256 * KIB, InlineIfAlone),
            (256 * KIB + 1, Engine),
        ];
        for (len, expected) in table {
            assert_eq!(InlineLimit::Measured.by_len(len), expected, "{len} bytes");
        }
        assert_eq!(InlineLimit::Fixed(0).by_len(1), Engine);
        assert_eq!(InlineLimit::Fixed(KIB).by_len(KIB), Inline, "a fixed limit asks nothing else");
        assert_eq!(InlineLimit::Fixed(1 << 30).by_len(64 * KIB), Inline);
    }

    #[test]
    fn two_others_make_the_engine_worth_it() {
        let table = [(0, 0, true), (1, 0, true), (0, 1, true), (1, 1, false), (2, 0, false)];
        for (in_engine, came_later, expected) in table {
            assert_eq!(is_alone(in_engine, came_later), expected, "{in_engine} + {came_later}");
        }
        assert!(!is_alone(usize::MAX, u64::MAX));
    }
}

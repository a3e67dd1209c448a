//! Progress of a job: a current value that only grows, and a total that may rise and fall.

use std::sync::atomic::{AtomicU64, Ordering};

/// Progress of a job, in bytes or in the units of its type. `total` = `current` + what remains.
///
/// `current == total` does not mean that the job is ready or over.
#[derive(Debug, Default)]
pub struct Progress {
    current: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// Adds work that was done.
    pub fn advance(&self, bytes: u64) {
        let before = self.current.fetch_add(bytes, Ordering::Relaxed);
        self.total.fetch_max(before.saturating_add(bytes), Ordering::Relaxed);
    }

    /// Says how much work remains.
    pub fn set_remaining(&self, bytes: u64) {
        let current = self.current.load(Ordering::Relaxed);
        self.total.store(current.saturating_add(bytes), Ordering::Relaxed);
    }

    /// Adds work that came up. May be combined with [`Progress::advance`].
    pub fn add_remaining(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What was done.
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::Relaxed)
    }

    /// What was done plus what remains.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed).max(self.current())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_follows_what_remains_and_the_current_value_only_grows() {
        let progress = Progress::default();
        let seen = |progress: &Progress| (progress.current(), progress.total());
        progress.set_remaining(100);
        progress.advance(30);
        assert_eq!(seen(&progress), (30, 100));
        progress.set_remaining(10);
        assert_eq!(seen(&progress), (30, 40));
        progress.add_remaining(5);
        progress.advance(50);
        assert_eq!(seen(&progress), (80, 80));
    }
}

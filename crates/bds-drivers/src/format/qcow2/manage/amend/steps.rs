//! Progress of an amendment in steps of about equal work, each a point where it may be cancelled.

use bds_core::driver::AmendControl;
use bds_core::error::Result;

/// Steps done, and those known so far.
pub(super) struct Steps {
    control: AmendControl,
    done: u64,
    total: u64,
}

impl Steps {
    pub(super) fn new(control: &AmendControl) -> Self {
        // One: the switch.
        Self { control: control.clone(), done: 0, total: 1 }
    }

    /// Adds work that is known now.
    pub(super) fn expect(&mut self, steps: u64) {
        self.total = self.total.saturating_add(steps);
    }

    /// Some steps were done.
    ///
    /// # Errors
    /// `Cancelled`.
    pub(super) fn advance(&mut self, steps: u64) -> Result<()> {
        self.done = self.done.saturating_add(steps);
        self.total = self.total.max(self.done.saturating_add(1));
        self.control.step(self.done, self.total)
    }

    /// All is done: a cancel comes too late.
    pub(super) fn finish(&mut self) {
        let _too_late = self.control.step(self.total, self.total);
    }
}

//! Collects the report of a check: counts, and a bounded list of messages.

use bds_core::driver::CheckReport;

/// Messages kept.
const MAX_MESSAGES: usize = 256;
/// Report under construction.
#[derive(Default)]
pub(crate) struct Findings {
    pub report: CheckReport,
}

impl Findings {
    fn add_message(&mut self, message: String) {
        if self.report.messages.len() < MAX_MESSAGES {
            self.report.messages.push(message);
        } else {
            self.report.messages_dropped += 1;
        }
    }

    pub(crate) fn corruption(&mut self, times: u32, message: impl Into<String>) {
        self.report.corruptions = self.report.corruptions.saturating_add(u64::from(times));
        self.add_message(message.into());
    }

    pub(crate) fn leak(&mut self, clusters: u64, message: impl Into<String>) {
        self.report.leaks = self.report.leaks.saturating_add(clusters);
        self.add_message(message.into());
    }

    pub(crate) fn unreadable(&mut self, times: u64, message: impl Into<String>) {
        self.report.check_errors = self.report.check_errors.saturating_add(times);
        self.add_message(message.into());
    }

    pub(crate) fn remark(&mut self, message: impl Into<String>) {
        self.add_message(message.into());
    }
}

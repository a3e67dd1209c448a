//! Failed requests of one job: attempts at each range, and which errors become events.
//!
//! A request that is tried again for ever would fill every queue: of errors that are ignored one a
//! second becomes an event, with the number of those it stands for. An error that changes the
//! job's state (`report`, `stop`) always does.

use std::collections::VecDeque;
use std::time::Duration;

use bds_core::Error;
use bds_core::copy::{ErrorSite, Side};

use crate::event::JobEvent;
use crate::policy::{JobErrorAction, RetryPolicy};

/// Shortest time between two events of ignored errors.
const EVENT_GAP: Duration = Duration::from_secs(1);
/// Ranges whose attempts are counted; the oldest is forgotten.
const SITES: usize = 256;

/// What was attempted: a range by its offset, or a flush.
type Site = (Side, Option<u64>);

fn key(side: Side, site: &ErrorSite) -> Site {
    (side, (!is_flush(site)).then_some(site.offset))
}

/// A request of no bytes is a flush.
pub(crate) fn is_flush(site: &ErrorSite) -> bool {
    site.len == 0
}

/// Errors of one job.
#[derive(Debug)]
pub(crate) struct ErrorLog {
    pub(crate) retry: RetryPolicy,
    /// Ranges that failed and attempts at them, oldest first.
    sites: VecDeque<(Site, u32)>,
    reported_at: Option<Duration>,
    /// Errors since the last event, and the event of the last one.
    unreported: u64,
    last: Option<JobEvent>,
}

impl ErrorLog {
    pub(crate) fn new(retry: RetryPolicy) -> Self {
        Self { retry, sites: VecDeque::new(), reported_at: None, unreported: 0, last: None }
    }

    /// Counts an attempt at the range, or to flush: 1 for the first.
    pub(crate) fn count_attempt(&mut self, side: Side, site: &ErrorSite) -> u32 {
        let key = key(side, site);
        if let Some((_, attempts)) = self.sites.iter_mut().find(|(known, _)| *known == key) {
            *attempts = attempts.saturating_add(1);
            return *attempts;
        }
        if self.sites.len() == SITES {
            self.sites.pop_front();
        }
        self.sites.push_back((key, 1));
        1
    }

    /// A flush of this side succeeded: the attempts to flush it count from the beginning.
    pub(crate) fn forget_flushes(&mut self, side: Side) {
        self.sites.retain(|(known, _)| *known != (side, None));
    }

    /// Every range counts from the beginning: a user has resumed the job.
    pub(crate) fn forget_attempts(&mut self) {
        self.sites.clear();
    }

    /// The event of an error, unless it is held back.
    pub(crate) fn event(
        &mut self,
        now: Duration,
        id: &str,
        failed: (Side, &ErrorSite, &Error),
        (action, attempts): (JobErrorAction, u32),
    ) -> Option<JobEvent> {
        let (side, site, error) = failed;
        self.unreported += 1;
        let event = JobEvent::Error {
            id: id.to_owned(),
            side,
            action,
            offset: site.offset,
            len: site.len,
            errno: error.errno(),
            node: site.node.clone(),
            attempts,
            count: self.unreported,
        };
        let is_due = self.reported_at.is_none_or(|at| now.saturating_sub(at) >= EVENT_GAP);
        if action == JobErrorAction::Ignore && !is_due {
            self.last = Some(event);
            return None;
        }
        if action == JobErrorAction::Ignore {
            self.reported_at = Some(now);
        }
        self.unreported = 0;
        self.last = None;
        Some(event)
    }

    /// The event of the errors that were held back, at the end of the job.
    pub(crate) fn take_unreported(&mut self) -> Option<JobEvent> {
        self.unreported = 0;
        self.last.take()
    }
}

//! The gate of an edge: open or closed in one word, with tickets that tell whether it was closed in
//! between.

use std::sync::atomic::{AtomicU64, Ordering};

use bds_io::sync::Notify;

/// The state of an open gate, as a request read it. See [`Edge::ticket`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// How many closings are in force (low half) and how often it was closed (high half), in one word.
#[derive(Default)]
pub(super) struct Gate {
    word: AtomicU64,
    opened: Notify,
}

const CLOSED: u64 = 0xFFFF_FFFF;
const CLOSING: u64 = (1 << 32) + 1;

impl Gate {
    /// The word, if the gate is open. Equal tickets: the gate was not closed in between.
    #[inline]
    pub(super) fn ticket(&self) -> Option<Ticket> {
        let word = self.word.load(Ordering::SeqCst);
        (word & CLOSED == 0).then_some(Ticket(word))
    }

    pub(super) fn close(&self) {
        self.word.fetch_add(CLOSING, Ordering::SeqCst);
    }

    pub(super) fn open(&self) {
        let before = self.word.fetch_sub(1, Ordering::SeqCst);
        if before & CLOSED == 1 {
            self.opened.notify_waiters();
        }
    }

    pub(super) async fn wait_open(&self) {
        self.opened.wait_until(|| self.ticket().is_some()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_invalid_after_a_close_and_open() {
        let gate = Gate::default();
        let ticket = gate.ticket().unwrap();
        gate.close();
        assert_eq!(gate.ticket(), None);
        gate.open();
        assert_ne!(gate.ticket(), Some(ticket));
    }

    #[test]
    fn closings_nest() {
        let gate = Gate::default();
        gate.close();
        gate.close();
        gate.open();
        assert_eq!(gate.ticket(), None);
        gate.open();
        assert!(gate.ticket().is_some());
    }
}

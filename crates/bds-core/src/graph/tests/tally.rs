//! Counts what a search reached, so that one that reaches nothing fails.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Counts by name, over all cases of a search.
#[derive(Debug, Default)]
pub(super) struct Tally(Mutex<BTreeMap<&'static str, u64>>);

impl Tally {
    /// Adds one.
    pub(super) fn count(&self, what: &'static str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what).or_default() += 1;
    }

    /// Adds one if the condition holds.
    pub(super) fn count_if(&self, has_happened: bool, what: &'static str) {
        if has_happened {
            self.count(what);
        }
    }

    /// Fails unless each count reaches its minimum.
    #[track_caller]
    pub(super) fn assert_least(&self, wanted: &[(&'static str, u64)]) {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        println!("{counts:?}");
        for (what, least) in wanted {
            let found = counts.get(what).copied().unwrap_or(0);
            assert!(found >= *least, "{what}: {found}, at least {least} wanted, of {counts:?}");
        }
    }
}

#[test]
#[should_panic(expected = "drains: 1, at least 2 wanted")]
fn a_search_that_reached_too_little_fails() {
    let tally = Tally::default();
    tally.count("drains");
    tally.assert_least(&[("drains", 1)]);
    tally.assert_least(&[("drains", 2)]);
}

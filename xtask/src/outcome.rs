//! Counting what a test run said: passed, failed, skipped with its reason.
//!
//! A test that printed a line `skipped: why` did not test; it counts as skipped, not as passed. So does an ignored one.

use std::collections::BTreeMap;

/// Sums over any number of test binaries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// Why, and how often.
    pub(crate) reasons: BTreeMap<String, u64>,
    /// Names of failed tests.
    pub(crate) failures: Vec<String>,
}

impl Outcome {
    /// Adds another sum.
    pub(crate) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        for (why, count) in &other.reasons {
            *self.reasons.entry(why.clone()).or_default() += count;
        }
        self.failures.extend(other.failures.iter().cloned());
    }

    /// One more skip.
    pub(crate) fn skip(&mut self, why: &str) {
        self.skipped += 1;
        *self.reasons.entry(why.to_owned()).or_default() += 1;
    }

    /// One more failure.
    pub(crate) fn fail(&mut self, what: &str) {
        self.failed += 1;
        self.failures.push(what.to_owned());
    }

    /// The line that ends a run.
    pub(crate) fn line(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Reads the output of `cargo test -- --show-output` line by line.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    outcome: Outcome,
    /// In the list of passed tests' output?
    in_successes: bool,
    /// A passed test's captured output is being shown; has it been counted as skipped?
    showing: Option<bool>,
}

impl Counter {
    /// Takes in one line.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            self.result(rest);
        } else if line.starts_with("---- ") && line.ends_with(" stdout ----") {
            self.showing = self.in_successes.then_some(false);
        } else if line == "failures:" || line == "successes:" {
            self.in_successes = line == "successes:";
            self.showing = None;
        } else if let Some(name) = line.strip_prefix("test ") {
            self.test(name);
        } else if let Some(why) = line.strip_prefix("skipped: ")
            && self.showing == Some(false)
        {
            self.showing = Some(true);
            self.outcome.passed = self.outcome.passed.saturating_sub(1);
            self.outcome.skip(why);
        }
    }

    /// The sum so far.
    pub(crate) fn finish(self) -> Outcome {
        self.outcome
    }

    fn test(&mut self, rest: &str) {
        if let Some(name) = rest.strip_suffix(" ... FAILED") {
            self.outcome.failures.push(name.to_owned());
        } else if rest.ends_with(" ... ok") {
            self.outcome.passed += 1;
        } else if let Some((_, why)) = rest.split_once(" ... ignored") {
            self.outcome.skip(why.trim_start_matches(", "));
        }
    }

    /// The summary of one binary. Passed tests were counted by their own lines, because skips are taken off again
    /// before this line comes.
    fn result(&mut self, rest: &str) {
        let failed = rest.split("; ").find_map(|part| part.trim().strip_suffix(" failed"));
        self.outcome.failed += failed.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_are_not_passes() {
        let mut counter = Counter::default();
        let text = "running 4 tests\ntest a ... ok\ntest b ... ok\ntest c ... FAILED\ntest d ... ignored, too long\n\nsuccesses:\n\n\
                    ---- b stdout ----\nskipped: no qemu-img\nskipped: no qemu-img\n\n\nsuccesses:\n    a\n    b\n\nfailures:\n\n\
                    ---- c stdout ----\nskipped: one half\nassertion failed\n\nfailures:\n    c\n\ntest result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        text.lines().for_each(|line| counter.line(line));
        let outcome = counter.finish();
        assert_eq!(outcome.line(), "1 passed, 1 failed, 2 skipped");
        assert_eq!(outcome.failures, ["c"]);
        assert_eq!(outcome.reasons.get("no qemu-img"), Some(&1));
        assert_eq!(outcome.reasons.get("too long"), Some(&1));
    }
}

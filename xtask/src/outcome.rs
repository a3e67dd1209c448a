//! Counts the tests of a `cargo test` run: passed, failed, skipped with the reason.
//!
//! A test that printed a line `skipped: why` did not test; it counts as skipped, not as passed. So
//! does an ignored one.

use std::collections::{BTreeMap, VecDeque};

/// Lines of a failed test's output that are kept, and characters of each: its last words are shown
/// where the log is out of reach.
const LAST_LINES: usize = 12;
const LINE_CHARS: usize = 600;

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
    /// The last lines that failed tests printed.
    pub(crate) last_lines: BTreeMap<String, VecDeque<String>>,
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
        self.last_lines
            .extend(other.last_lines.iter().map(|(name, lines)| (name.clone(), lines.clone())));
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
    /// Passed tests of the current binary that printed a skip.
    skips_of_binary: u64,
    /// Failures counted when the last binary ended.
    failed_before: u64,
    /// In the list of passed tests' output?
    in_successes: bool,
    /// A passed test's captured output is being shown; has it been counted as skipped?
    showing: Option<bool>,
    /// The failed test whose captured output is being shown.
    failing: Option<String>,
}

impl Counter {
    /// Takes in one line.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            self.result(rest);
            self.failing = None;
        } else if let Some(name) = output_of(line) {
            self.showing = self.in_successes.then_some(false);
            self.failing = (!self.in_successes).then(|| name.to_owned());
        } else if line == "failures:" || line == "successes:" {
            self.in_successes = line == "successes:";
            self.showing = None;
            self.failing = None;
        } else if self.failing.is_some() {
            self.keep(line);
        } else if let Some((_, target)) = line.split_once("test failed, to rerun pass ") {
            self.binary_failed(target);
        } else if let Some(name) = line.strip_prefix("test ") {
            self.test(name);
        } else if let Some(why) = line.strip_prefix("skipped: ")
            && self.showing == Some(false)
        {
            self.showing = Some(true);
            self.skips_of_binary += 1;
            self.outcome.skip(why);
        }
    }

    /// Keeps a line that a failed test printed.
    fn keep(&mut self, line: &str) {
        let Some(name) = self.failing.clone().filter(|_| !line.trim().is_empty()) else { return };
        let lines = self.outcome.last_lines.entry(name).or_default();
        lines.push_back(line.chars().take(LINE_CHARS).collect());
        if lines.len() > LAST_LINES {
            lines.pop_front();
        }
    }

    /// The sum so far.
    pub(crate) fn finish(self) -> Outcome {
        self.outcome
    }

    fn test(&mut self, rest: &str) {
        if let Some(name) = rest.strip_suffix(" ... FAILED") {
            self.outcome.failures.push(name.to_owned());
        } else if let Some((_, why)) = rest.split_once(" ... ignored") {
            self.outcome.skip(why.trim_start_matches(", "));
        }
    }

    /// The summary of one binary: the only line that counts, because a test may print what looks
    /// like another one (trybuild prints `test FILE ... ok`).
    fn result(&mut self, rest: &str) {
        let rest = rest.split_once(". ").map_or(rest, |(_, rest)| rest);
        let count = |what: &str| {
            let part = rest.split("; ").find_map(|part| part.trim().strip_suffix(what));
            part.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0)
        };
        let passed = count(" passed");
        self.outcome.passed += passed.saturating_sub(std::mem::take(&mut self.skips_of_binary));
        self.outcome.failed += count(" failed");
    }

    /// Cargo's line after each binary that did not end with 0. Without a failed test since the last
    /// one, the binary crashed or could not be run.
    fn binary_failed(&mut self, target: &str) {
        if self.outcome.failed == self.failed_before {
            let target = target.trim_matches('`');
            self.outcome.fail(&format!("{target}: ended without a result; see the log"));
        }
        self.failed_before = self.outcome.failed;
        self.skips_of_binary = 0;
    }
}

/// The test whose captured output this line begins.
fn output_of(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
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
        assert_eq!(outcome.last_lines["c"], ["skipped: one half", "assertion failed"]);
        assert_eq!(outcome.last_lines.len(), 1);
        assert_eq!(outcome.reasons.get("no qemu-img"), Some(&1));
        assert_eq!(outcome.reasons.get("too long"), Some(&1));
    }

    #[test]
    fn a_failed_test_has_its_last_lines() {
        let many: String = (0..40).map(|n| format!("line {n}\n\n")).collect();
        let outcome = counted(&format!(
            "test a ... FAILED\n\nfailures:\n\n---- a stdout ----\n{many}{}\n\nfailures:\n    a\n\n\
             test result: FAILED. 0 passed; 1 failed; 0 ignored\n",
            "x".repeat(10_000)
        ));
        let lines = &outcome.last_lines["a"];
        assert_eq!((lines.len(), &lines[0][..]), (LAST_LINES, "line 29"));
        assert_eq!(lines[LAST_LINES - 1].len(), LINE_CHARS);
    }

    #[track_caller]
    fn counted(text: &str) -> Outcome {
        let mut counter = Counter::default();
        text.lines().for_each(|line| counter.line(line));
        counter.finish()
    }

    #[test]
    fn a_crashed_binary_is_a_failure_beside_ordinary_ones() {
        let failed = "running 1 test\ntest a ... FAILED\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\n\
                      error: test failed, to rerun pass `-p x --lib`\n";
        let crashed = "running 2 tests\ntest b ... ok\nerror: test failed, to rerun pass `-p y --lib`\n\
                       \nCaused by:\n  process didn't exit successfully (signal: 11, SIGSEGV)\n";
        for text in [format!("{failed}{crashed}"), format!("{crashed}{failed}")] {
            let outcome = counted(&text);
            assert_eq!(outcome.line(), "0 passed, 2 failed, 0 skipped");
            assert!(outcome.failures.iter().any(|name| name.starts_with("-p y --lib: ")));
        }
        assert_eq!(counted(failed).line(), "0 passed, 1 failed, 0 skipped");
        let doctest = "error: doctest failed, to rerun pass `-p z --doc`\n";
        assert_eq!(counted(doctest).line(), "0 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn lines_of_trybuild_are_no_tests() {
        let text = "running 1 test\ntest tests/ui/a.rs ... ok\ntest tests/ui/b.rs ... ok\ntest ui ... ok\n\n\
                    test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(counted(text).line(), "1 passed, 0 failed, 0 skipped");
    }
}

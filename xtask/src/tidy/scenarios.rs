//! Checks the table of `docs/jobs-scenarios.md`: every number has a row, and every test exists.
//!
//! A test is written `` `crate/path::name` ``: `jobs/chain/power::x` is the test `x` in a file
//! `chain/power.rs` of the crate `bds-jobs`, in its sources or tests.

use super::files::Text;

/// The table.
pub(super) const TABLE: &str = "docs/jobs-scenarios.md";
/// Prefix of the numbers, and how many there are.
const NUMBERS: [(&str, usize); 3] = [("F", 10), ("C", 18), ("", 40)];

/// Adds findings about the table.
pub(super) fn check(table: &str, code: &[Text], findings: &mut Vec<String>) {
    for (prefix, count) in NUMBERS {
        for number in 1..=count {
            let start = format!("| {prefix}{number} |");
            let rows: Vec<&str> = table.lines().filter(|line| line.starts_with(&start)).collect();
            match rows.as_slice() {
                [row] if has_answer(row) => {}
                [_] => findings.push(format!("{TABLE}: {prefix}{number} names no test")),
                rows => {
                    findings.push(format!("{TABLE}: {prefix}{number} has {} rows", rows.len()));
                }
            }
        }
    }
    for name in names(table) {
        if !exists(name, code) {
            findings.push(format!("{TABLE}: there is no test `{name}`"));
        }
    }
}

/// A row names tests, or says what is missing, or where else it is described.
fn has_answer(row: &str) -> bool {
    names(row).next().is_some() || ["missing: ", "see ["].iter().any(|word| row.contains(word))
}

/// Names of tests in a text: what stands in backquotes and has a path.
fn names(text: &str) -> impl Iterator<Item = &str> {
    let is_name = |word: &&str| word.contains("::") && word.contains('/') && !word.contains(' ');
    let quoted = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    quoted.filter(is_name).filter(|word| !word.starts_with("crate/") && !word.ends_with("::x"))
}

fn exists(name: &str, code: &[Text]) -> bool {
    let Some((path, test)) = name.rsplit_once("::") else { return false };
    let Some((krate, path)) = path.split_once('/') else { return false };
    let (start, end) = (format!("crates/bds-{krate}/"), format!("/{path}.rs"));
    let is_in = |text: &str| {
        let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
        let begins = [format!("fn {test}("), format!("async fn {test}(")];
        lines.windows(3).any(|window| {
            begins.iter().any(|begin| window[2].starts_with(begin))
                && window[..2].contains(&"#[test]")
        })
    };
    code.iter()
        .filter(|file| file.name.starts_with(&start) && file.name.ends_with(&end))
        .any(|file| is_in(&file.text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code() -> Vec<Text> {
        let text = "//! x\n#[test]\nfn works() {}\n\nfn helper() {}\n".to_owned();
        vec![Text { name: "crates/bds-jobs/tests/it/chain/power.rs".to_owned(), text }]
    }

    fn table(tests: &str) -> String {
        let rows = NUMBERS.iter().flat_map(|(prefix, count)| {
            (1..=*count).map(move |number| format!("| {prefix}{number} | what | {tests} |\n"))
        });
        rows.collect()
    }

    fn found(table: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check(table, &code(), &mut findings);
        findings.dedup();
        findings
    }

    #[test]
    fn tests_that_exist_are_accepted() {
        assert_eq!(found(&table("`jobs/chain/power::works`")), Vec::<String>::new());
        assert_eq!(found(&table("missing: exports")), Vec::<String>::new());
    }

    #[test]
    fn tests_that_do_not_exist_are_found() {
        for name in
            ["jobs/chain/power::gone", "jobs/chain/power::helper", "core/chain/power::works"]
        {
            let expected = format!("{TABLE}: there is no test `{name}`");
            assert_eq!(found(&table(&format!("`{name}`"))), [expected]);
        }
    }

    #[test]
    fn rows_that_are_missing_or_empty_are_found() {
        let all = table("`jobs/chain/power::works`");
        let less = all.replace("| C7 |", "| C99 |");
        assert_eq!(found(&less), [format!("{TABLE}: C7 has 0 rows")]);
        let empty = all.replacen("`jobs/chain/power::works`", "nothing", 1);
        assert_eq!(found(&empty), [format!("{TABLE}: F1 names no test")]);
    }
}

//! Formats results as a table, one row a case: medians, spread, ratios.

use super::cases::{Case, Measured};
use super::stage::Runs;

/// The table's head.
pub(crate) const HEAD: &str = "\
| case | bds | qemu-img (best) | speed ratio | CPU bds | CPU qemu | CPU ratio | peak MiB bds / qemu | target | note |
|---|---|---|---|---|---|---|---|---|---|
";

/// The row of one case. The first contestant is ours; extra ones whose name starts with "bds"
/// follow in the first column.
pub(crate) fn row(case: &Case, runs: &[Runs]) -> String {
    let Some((ours, others)) = runs.split_first() else { return String::new() };
    let own: Vec<&Runs> = others.iter().filter(|r| r.name.starts_with("bds")).collect();
    let theirs = others
        .iter()
        .filter(|r| !r.name.starts_with("bds") && !r.costs.is_empty())
        .min_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    let mut first = speed(case, ours);
    for extra in own {
        let ratio = seconds(extra) / seconds(ours);
        first = format!("{first}; {}: {} (ratio {ratio:.2})", extra.name, speed(case, extra));
    }
    let Some(theirs) = theirs else {
        return format!(
            "| {} | {first} | - | - | {} | - | - | {} | {} | {} |",
            case.name,
            cpu(case, ours),
            peak(ours),
            case.target,
            note(case, ours, None),
        );
    };
    format!(
        "| {} | {first} | {} {} | {:.2} | {} | {} | {:.2} | {} / {} | {} | {} |",
        case.name,
        speed(case, theirs),
        theirs.name,
        seconds(theirs) / seconds(ours),
        cpu(case, ours),
        cpu(case, theirs),
        cpu_seconds(ours) / cpu_seconds(theirs),
        peak(ours),
        peak(theirs),
        case.target,
        note(case, ours, Some(theirs)),
    )
}

/// Flushes of one run of each, where a case counts them.
fn note(case: &Case, ours: &Runs, theirs: Option<&Runs>) -> String {
    if !case.counts_syncs {
        return String::new();
    }
    let number = |runs: &Runs| runs.syncs.map_or_else(|| "?".to_owned(), |n| n.to_string());
    match (ours.syncs, theirs) {
        (None, _) => "flushes not counted: perf or its tracepoint is missing".to_owned(),
        (Some(_), None) => format!("{} flushes", number(ours)),
        (Some(_), Some(theirs)) => format!("{} / {} flushes", number(ours), number(theirs)),
    }
}

fn speed(case: &Case, runs: &Runs) -> String {
    let all = sorted(runs.costs.iter().map(|c| c.reported_s));
    let (min, max) =
        (all.first().copied().unwrap_or(f64::NAN), all.last().copied().unwrap_or(f64::NAN));
    let median = middle(&all);
    let crashed =
        if runs.failed == 0 { String::new() } else { format!(" [{} runs crashed]", runs.failed) };
    match case.measured {
        Measured::Requests(count) => {
            let kilo = |s: f64| f64::from(count) / s / 1000.0;
            format!("{:.0}k/s ({:.0}..{:.0}){crashed}", kilo(median), kilo(max), kilo(min))
        }
        Measured::Seconds => format!("{median:.3}s ({min:.3}..{max:.3}){crashed}"),
    }
}

fn cpu(case: &Case, runs: &Runs) -> String {
    match case.measured {
        Measured::Requests(count) => format!("{:.2}us", cpu_seconds(runs) / f64::from(count) * 1e6),
        Measured::Seconds => format!("{:.3}s", cpu_seconds(runs)),
    }
}

fn seconds(runs: &Runs) -> f64 {
    middle(&sorted(runs.costs.iter().map(|c| c.reported_s)))
}

fn cpu_seconds(runs: &Runs) -> f64 {
    middle(&sorted(runs.costs.iter().map(|c| c.cpu_s)))
}

fn peak(runs: &Runs) -> String {
    let kib = runs.costs.iter().map(|c| c.peak_kib).max().unwrap_or(0);
    format!("{}", kib / 1024)
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn middle(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

//! `cargo xtask bench`: bds beside qemu-img, in one interleaved run. Numbers only; never a verdict
//! of pass or fail.
//!
//! Every case runs all its contestants in turn, again and again (the machine is noisy: neighbours
//! in time see the same noise), another one first each time, and reports medians with minimum and
//! maximum. Free memory is touched before each case. qemu-img counts with its best variant (its aio
//! modes).

mod cases;
mod graph;
mod images;
mod job_disks;
mod jobs;
pub(crate) mod measure;
mod memory;
mod nbd_guest;
mod pair_table;
mod qmp;
mod stage;
mod syncs;
mod table;

use self::cases::{Case, Contestant};
use self::measure::measure;
use self::stage::{Runs, Stage};
use crate::run::{cargo, output, run, say};

/// Builds the tool, makes the images, runs the cases, prints the table and writes
/// `target/bench/report.md`.
pub(crate) fn bench(quick: bool, only: Option<&str>) -> Result<(), String> {
    run(cargo().args(["build", "--quiet", "--release", "--package", "bds-cli", "--bin", "bds"]))?;
    let stage = Stage::new(quick)?;
    if !stage.has_qemu {
        say("qemu-img is not installed: bds runs alone, there are no ratios");
    }
    let is_wanted = |name: &str| only.is_none_or(|part| name.contains(part));
    let mut report = String::new();
    let cases: Vec<Case> =
        cases::all(&stage).into_iter().filter(|case| is_wanted(&case.name)).collect();
    if !cases.is_empty() {
        images::make(&stage)?;
        report.push_str(table::HEAD);
        say(table::HEAD.trim_end());
    }
    for case in cases {
        let runs = interleaved(&stage, &case)?;
        let row = table::row(&case, &runs);
        say(&row);
        report.push_str(&row);
        report.push('\n');
    }
    if is_wanted("graph") {
        let text = graph::graph(&stage)?;
        say(text.trim_end());
        report.push_str(&text);
    }
    if is_wanted("ffi") {
        let text = ffi()?;
        say(text.trim_end());
        report.push_str(&text);
    }
    if only.is_none_or(jobs::is_wanted) {
        let text = jobs::jobs(&stage, only)?;
        say(text.trim_end());
        report.push_str(&text);
    }
    let path = stage.dir.join("report.md");
    std::fs::write(&path, report).map_err(|e| format!("{}: {e}", path.display()))?;
    say(&format!("\nwritten to {}", path.display()));
    Ok(())
}

/// What calls and queues of the C library cost beside the Rust API; the bench itself takes turns.
fn ffi() -> Result<String, String> {
    let mut command = cargo();
    command.args(["bench", "--quiet", "--package", "bds-ffi", "--bench", "boundary"]);
    let table = output(&mut command)?;
    Ok(format!("\nThe C library, in one process:\n\n{table}"))
}

/// Runs all contestants of a case in turn, another one first each round.
fn interleaved(stage: &Stage, case: &Case) -> Result<Vec<Runs>, String> {
    let contestants: Vec<&Contestant> =
        case.contestants.iter().filter(|c| stage.has_qemu || c.name.starts_with("bds")).collect();
    let mut runs: Vec<Runs> = contestants
        .iter()
        .map(|c| Runs { name: c.name.clone(), costs: Vec::new(), failed: 0, syncs: None })
        .collect();
    let rounds = if stage.quick { 3 } else { case.rounds };
    memory::touch_free();
    for round in 0..rounds {
        for turn in 0..contestants.len() {
            let index = (round + turn) % contestants.len();
            let (contestant, runs) = (contestants[index], &mut runs[index]);
            for command in &contestant.before {
                images::prepare(stage, command)?;
            }
            match measure(&contestant.command, &stage.dir) {
                Ok(cost) => runs.costs.push(cost),
                Err(why) if contestant.name.starts_with("bds") => return Err(why),
                Err(_) => runs.failed += 1,
            }
        }
    }
    if case.counts_syncs {
        for (contestant, runs) in contestants.iter().zip(&mut runs) {
            for command in &contestant.before {
                images::prepare(stage, command)?;
            }
            runs.syncs = syncs::count(&contestant.command, &stage.dir);
        }
    }
    Ok(runs)
}

//! `cargo xtask bench`: bds beside qemu-img, in one interleaved run. Numbers only; never a verdict of pass or fail.
//!
//! Every case runs all its contestants in turn, again and again (the machine is noisy: neighbours in time see the same
//! noise), another one first each time, and reports medians with minimum and maximum. Free memory is touched before each case. qemu-img
//! counts with its best variant (its aio modes).

mod cases;
mod graph;
mod images;
pub(crate) mod measure;
mod memory;
mod qmp;
mod syncs;
mod table;

use std::path::PathBuf;

use crate::run::{cargo, run, say, target_dir, which};
use cases::{Case, Contestant};
use measure::{Cost, measure};

/// Results of one contestant.
pub(crate) struct Runs {
    pub(crate) who: String,
    pub(crate) costs: Vec<Cost>,
    /// Runs that did not come to their end: qemu-img bench can overflow its stack when requests complete at once.
    pub(crate) failed: usize,
    /// Flushes of one more run, if the case asks for them and they can be counted.
    pub(crate) syncs: Option<u64>,
}

/// Builds the tool, makes the images, runs the cases, prints the table and writes `target/bench/report.md`.
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
        let runs = stage.interleaved(&case)?;
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
    let path = stage.dir.join("report.md");
    std::fs::write(&path, report).map_err(|e| format!("{}: {e}", path.display()))?;
    say(&format!("\nwritten to {}", path.display()));
    Ok(())
}

/// Where the benches run and with what.
pub(crate) struct Stage {
    pub(crate) dir: PathBuf,
    pub(crate) bds: String,
    pub(crate) has_qemu: bool,
    pub(crate) quick: bool,
}

impl Stage {
    fn new(quick: bool) -> Result<Self, String> {
        let dir = target_dir().join("bench");
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let bds = target_dir().join("release/bds").display().to_string();
        Ok(Self { dir, bds, has_qemu: which("qemu-img").is_some(), quick })
    }

    fn interleaved(&self, case: &Case) -> Result<Vec<Runs>, String> {
        let contestants: Vec<&Contestant> =
            case.contestants.iter().filter(|c| self.has_qemu || c.who.starts_with("bds")).collect();
        let mut runs: Vec<Runs> = contestants
            .iter()
            .map(|c| Runs { who: c.who.clone(), costs: Vec::new(), failed: 0, syncs: None })
            .collect();
        let rounds = if self.quick { 3 } else { case.rounds };
        memory::touch_free();
        for round in 0..rounds {
            for turn in 0..contestants.len() {
                let index = (round + turn) % contestants.len();
                let (contestant, runs) = (contestants[index], &mut runs[index]);
                for command in &contestant.before {
                    images::prepare(self, command)?;
                }
                match measure(&contestant.command, &self.dir) {
                    Ok(cost) => runs.costs.push(cost),
                    Err(why) if contestant.who.starts_with("bds") => return Err(why),
                    Err(_) => runs.failed += 1,
                }
            }
        }
        if case.counts_syncs {
            for (contestant, runs) in contestants.iter().zip(&mut runs) {
                for command in &contestant.before {
                    images::prepare(self, command)?;
                }
                runs.syncs = syncs::count(&contestant.command, &self.dir);
            }
        }
        Ok(runs)
    }
}

//! Measures the graph: many nodes, long chains, changes under load; beside qemu-storage-daemon
//! where it has the same operation.
//!
//! Both run in turn, again and again; medians with minimum and maximum. The daemon is asked over
//! QMP, which costs it and its client about 0.05 ms a command on an idle machine: part of its
//! figures, not of ours.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use super::pair_table::{PairTable, spread};
use super::qmp::Daemon;
use super::stage::Stage;
use crate::run::{cargo, output, run, say, which};

/// Runs all of it and returns the table.
pub(super) fn graph(stage: &Stage) -> Result<String, String> {
    run(cargo().args(["build", "--quiet", "--release"]).args([
        "--package",
        "bds-drivers",
        "--example",
        "graph",
    ]))?;
    let has_daemon = which("qemu-storage-daemon").is_some();
    if !has_daemon {
        say("qemu-storage-daemon is not installed: bds runs alone in the group 'graph'");
    }
    let dir = match Path::new("/dev/shm").is_dir() {
        true => Path::new("/dev/shm").join(format!("bds-bench-{}", std::process::id())),
        false => stage.dir.join("graph"),
    };
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut bench = Bench { stage, dir: &dir, has_daemon, table: PairTable::default() };
    let done = bench.all();
    drop(std::fs::remove_dir_all(&dir));
    done?;
    Ok(bench.table.text("graph", 0))
}

struct Bench<'a> {
    stage: &'a Stage,
    dir: &'a Path,
    has_daemon: bool,
    table: PairTable,
}

impl Bench<'_> {
    fn all(&mut self) -> Result<(), String> {
        let (rounds, counts, snapshots): (_, &[u32], _) = match self.stage.quick {
            true => (3, &[100, 1000], 50),
            false => (5, &[100, 1000, 10_000], 200),
        };
        for count in counts {
            for round in 0..rounds {
                self.our_pairs(*count)?;
                // The daemon needs minutes for ten thousand: once must do.
                if round == 0 || *count <= 1000 {
                    self.their_pairs(*count)?;
                }
            }
        }
        for _ in 0..rounds {
            self.our_snapshots(snapshots, "snapshots")?;
            self.their_snapshots(snapshots)?;
        }
        if !self.stage.quick {
            self.our_snapshots(1000, "overlays")?;
        }
        let requests = if self.stage.quick { 100_000 } else { 1_000_000 };
        for _ in 0..rounds {
            self.load(requests)?;
        }
        for _ in 0..rounds {
            let report = self.ours(&["reap".into(), "10000".into()])?;
            self.table.note("close a chain of 10,000 nodes, a node", "us", true, report("reap_us"));
        }
        Ok(())
    }

    /// Runs our example; its report answers by key.
    fn ours(&self, words: &[String]) -> Result<impl Fn(&str) -> f64 + use<>, String> {
        let program = crate::run::target_dir().join("release/examples/graph");
        let text = output(Command::new(program).args(words))?;
        let report: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        Ok(move |key: &str| {
            let (key, index) =
                key.split_once('.').map_or((key, None), |(k, i)| (k, i.parse().ok()));
            let value = &report[key];
            index.map_or(value, |index: usize| &value[index]).as_f64().unwrap_or(f64::NAN)
        })
    }

    fn our_pairs(&mut self, count: u32) -> Result<(), String> {
        let report = self.ours(&["pairs".into(), count.to_string()])?;
        let total = report("add_us") + report("query_us") + report("del_us");
        let note = |table: &mut PairTable, what: &str, unit, value| {
            table.note(&pair_row(count, what), unit, true, value);
        };
        note(&mut self.table, "in all", "us", total);
        note(&mut self.table, "added", "us", report("add_us"));
        note(&mut self.table, "asked about", "us", report("query_us"));
        note(&mut self.table, "deleted", "us", report("del_us"));
        note(&mut self.table, "memory", "KiB", report("bytes") / 1024.0);
        Ok(())
    }

    fn their_pairs(&mut self, count: u32) -> Result<(), String> {
        if !self.has_daemon {
            return Ok(());
        }
        let mut daemon = Daemon::start(self.dir)?;
        let before = daemon.resident()?;
        let add = Instant::now();
        for i in 0..count {
            let null = json!({"driver": "null-co", "node-name": format!("n{i}"), "size": 1 << 20});
            daemon.ask("blockdev-add", &null)?;
            let raw =
                json!({"driver": "raw", "node-name": format!("r{i}"), "file": format!("n{i}")});
            daemon.ask("blockdev-add", &raw)?;
        }
        let add = each(add, count);
        let memory = (daemon.resident()? - before) / f64::from(count);
        let query = Instant::now();
        daemon.ask("query-named-block-nodes", &json!({"flat": true}))?;
        let query = each(query, count);
        let del = Instant::now();
        for i in 0..count {
            daemon.ask("blockdev-del", &json!({"node-name": format!("r{i}")}))?;
            daemon.ask("blockdev-del", &json!({"node-name": format!("n{i}")}))?;
        }
        let del = each(del, count);
        let mut note = |what: &str, unit, value| {
            self.table.note(&pair_row(count, what), unit, false, value);
        };
        note("in all", "us", add + query + del);
        note("added", "us", add);
        note("asked about", "us", query);
        note("deleted", "us", del);
        note("memory", "KiB", memory / 1024.0);
        Ok(())
    }

    /// Fresh images `layer1.qcow2` and so on.
    fn layers(&self, count: u32) -> Result<(), String> {
        for i in 1..=count {
            let path = self.dir.join(format!("layer{i}.qcow2"));
            let mut command = Command::new(&self.stage.bds);
            run(command.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("64M"))?;
        }
        Ok(())
    }

    fn our_snapshots(&mut self, count: u32, what: &str) -> Result<(), String> {
        self.layers(count)?;
        let dir = self.dir.display().to_string();
        let report = self.ours(&["snapshots".into(), dir, count.to_string()])?;
        for (index, which) in [(0, "first"), (1, "last")] {
            let key = |key: &str| report(&format!("{key}.{index}"));
            let name = format!("the {which} tenth of {count} live {what}: change");
            self.table.note(&name, "us", true, key("change_us"));
            let name = format!("the {which} tenth of {count} live {what}: with the opening");
            self.table.note(&name, "us", true, key("change_us") + key("open_us"));
        }
        let name = format!("{count} live {what}: torn down, a layer");
        self.table.note(&name, "us", true, report("teardown_us"));
        Ok(())
    }

    fn their_snapshots(&mut self, count: u32) -> Result<(), String> {
        if !self.has_daemon {
            return Ok(());
        }
        self.layers(count)?;
        let mut daemon = Daemon::start(self.dir)?;
        let base = json!({"driver": "null-co", "node-name": "layer0", "size": 1 << 26});
        daemon.ask("blockdev-add", &base)?;
        let (mut open, mut change) = (Vec::new(), Vec::new());
        for i in 1..=count {
            let path = self.dir.join(format!("layer{i}.qcow2"));
            let name = format!("layer{i}");
            let file = json!({"driver": "file", "filename": path});
            let overlay =
                json!({"driver": "qcow2", "node-name": name, "backing": null, "file": file});
            let begun = Instant::now();
            daemon.ask("blockdev-add", &overlay)?;
            open.push(each(begun, 1));
            let begun = Instant::now();
            let words = json!({"node": format!("layer{}", i - 1), "overlay": name});
            daemon.ask("blockdev-snapshot", &words)?;
            change.push(each(begun, 1));
        }
        let part = (change.len() / 10).max(1);
        for (range, which) in [(0..part, "first"), (change.len() - part..change.len(), "last")] {
            let (open, change) = (spread(&open[range.clone()]).0, spread(&change[range]).0);
            let name = format!("the {which} tenth of {count} live snapshots: change");
            self.table.note(&name, "us", false, change);
            let name = format!("the {which} tenth of {count} live snapshots: with the opening");
            self.table.note(&name, "us", false, change + open);
        }
        Ok(())
    }

    fn load(&mut self, requests: u32) -> Result<(), String> {
        self.layers(1)?;
        let dir = self.dir.display().to_string();
        let report = self.ours(&["load".into(), dir, requests.to_string()])?;
        let name = |what: &str| format!("change under load, {requests} requests: {what}");
        self.table.note(&name("changes"), "", true, report("changes"));
        self.table.note(&name("longest hold"), "us", true, report("longest_us"));
        self.table.note(&name("hold in the middle"), "us", true, report("middle_us"));
        let per_s = report("requests_per_s") / 1000.0;
        self.table.note(&name("requests"), "thousand/s", true, per_s);
        Ok(())
    }
}

fn pair_row(count: u32, what: &str) -> String {
    format!("{count} pairs by name, a pair: {what}")
}

/// Microseconds of a piece.
fn each(begun: Instant, count: u32) -> f64 {
    begun.elapsed().as_secs_f64() * 1e6 / f64::from(count)
}

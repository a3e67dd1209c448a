//! Measures block jobs, idle and beside a guest that writes, next to qemu-storage-daemon.
//!
//! Both run the same job on copies of the same images, in turn. Ours is a program with the guest
//! on a thread of its own; the daemon's guest comes over NBD, the only way to it. So absolute times
//! of writes differ by the transport, and each is also given as a multiple of what the same guest
//! had without a job. A job counts as ended when its result is durable: the daemon's targets are
//! flushed after it says so (it does not flush them itself).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::job_disks::{self, Kind, LEN};
use super::nbd_guest::{self, GuestLoad};
use super::pair_table::PairTable;
use super::qmp::Daemon;
use super::stage::Stage;
use crate::run::{cargo, output, run, say, which};

/// How long the guest writes before the job starts.
const ALONE: Duration = Duration::from_secs(2);
/// A mirror that is not ready by then is given up.
const READY_WITHIN: Duration = Duration::from_secs(15);
/// Longest time of a job.
const LIMIT: Duration = Duration::from_secs(300);

/// The guest of a case.
#[derive(Clone, Copy, Debug)]
struct Load {
    /// Writes a second; 0: no clock.
    rate: u32,
    /// Most in flight; 0: no guest.
    depth: usize,
}

const IDLE: Load = Load { rate: 0, depth: 0 };
/// A busy guest that leaves the disk time for the job.
const BUSY: Load = Load { rate: 1000, depth: 16 };
/// A guest that writes as fast as it can.
const FULL: Load = Load { rate: 0, depth: 16 };

/// One comparison.
struct Case {
    name: &'static str,
    kind: Kind,
    load: Load,
    latency_ms: u32,
    /// With the page cache of the host; else O_DIRECT.
    is_cached: bool,
    /// Words for our program alone.
    own: &'static [&'static str],
}

/// Whether `only` names these benches or one of them.
pub(super) fn is_wanted(only: &str) -> bool {
    "jobs".contains(only) || cases().iter().any(|case| is_of(case, only))
}

fn is_of(case: &Case, only: &str) -> bool {
    "jobs".contains(only) || case.name.contains(only)
}

/// Runs all cases that `only` names, and returns the table.
pub(super) fn jobs(stage: &Stage, only: Option<&str>) -> Result<String, String> {
    run(cargo()
        .args(["build", "--quiet", "--release", "--package", "bds-jobs"])
        .args(["--example", "jobs"]))?;
    let has_daemon = which("qemu-storage-daemon").is_some();
    if !has_daemon {
        say("qemu-storage-daemon is not installed: bds runs alone in the group 'jobs'");
    }
    let dir = stage.dir.join("jobs");
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut bench = Bench {
        stage,
        dir,
        has_daemon,
        table: PairTable::default(),
        failures: String::new(),
        has_failed: false,
    };
    let rounds = if stage.quick { 3 } else { 7 };
    for case in cases() {
        if only.is_some_and(|only| !is_of(&case, only)) {
            continue;
        }
        for round in 0..rounds {
            // Another one first each time.
            for turn in 0..2 {
                match (round + turn) % 2 {
                    0 => bench.ours(&case).unwrap_or_else(|why| {
                        bench.has_failed = true;
                        bench.note_failure(&case, "bds", &why);
                    }),
                    // It is known to crash now and then.
                    _ => bench
                        .theirs(&case)
                        .unwrap_or_else(|why| bench.note_failure(&case, "the daemon", &why)),
                }
            }
        }
        // The whole table comes after minutes.
        say(bench.table.rows(&format!("{}:", case.name), 2).trim_end());
    }
    drop(std::fs::remove_dir_all(&bench.dir));
    let text = bench.table.text("jobs", 2) + &bench.failures;
    if bench.has_failed {
        say(&text);
        return Err("a job of bds failed".to_owned());
    }
    Ok(text)
}

/// All comparisons.
fn cases() -> Vec<Case> {
    let case = |name: &'static str, kind, load, latency_ms, own| {
        let is_cached = name.ends_with("page cache");
        Case { name, kind, load, latency_ms, is_cached, own }
    };
    vec![
        case("idle backup", Kind::Backup, IDLE, 0, &[]),
        case("idle mirror", Kind::Mirror, IDLE, 0, &[]),
        case("idle stream", Kind::Stream, IDLE, 0, &[]),
        case("idle commit", Kind::Commit, IDLE, 0, &[]),
        case("idle active commit", Kind::Active, IDLE, 0, &[]),
        case("idle backup, page cache", Kind::Backup, IDLE, 0, &[]),
        case("idle mirror, page cache", Kind::Mirror, IDLE, 0, &[]),
        case("idle stream, page cache", Kind::Stream, IDLE, 0, &[]),
        case("idle commit, page cache", Kind::Commit, IDLE, 0, &[]),
        case("backup, reads take 5 ms", Kind::Backup, IDLE, 5, &[]),
        case("stream, reads take 5 ms", Kind::Stream, IDLE, 5, &[]),
        case("commit, writes take 5 ms", Kind::Commit, IDLE, 5, &[]),
        case("backup beside 1,000 writes/s", Kind::Backup, BUSY, 0, &["staging=64"]),
        case("mirror beside 1,000 writes/s", Kind::Mirror, BUSY, 0, &[]),
        case("stream beside 1,000 writes/s", Kind::Stream, BUSY, 0, &[]),
        case("commit beside 1,000 writes/s", Kind::Commit, BUSY, 0, &[]),
        case("mirror beside 16 writers", Kind::Mirror, FULL, 0, &["stall=20"]),
        case("active commit beside 16 writers", Kind::Active, FULL, 0, &["stall=20"]),
        case("compaction of 100 overlays", Kind::Chain, IDLE, 0, &[]),
    ]
}

struct Bench<'a> {
    stage: &'a Stage,
    dir: PathBuf,
    has_daemon: bool,
    table: PairTable,
    /// Runs that came to no end, a line each.
    failures: String,
    /// One of ours did.
    has_failed: bool,
}

impl Bench<'_> {
    fn note_failure(&mut self, case: &Case, who: &str, why: &str) {
        self.failures.push_str(&format!("\n{}: {who} failed: {why}", case.name));
    }

    fn ours(&mut self, case: &Case) -> Result<(), String> {
        job_disks::make(self.stage, &self.dir, case.kind)?;
        let program = crate::run::target_dir().join("release/examples/jobs");
        let Load { rate, depth } = case.load;
        let mut words = vec![case.kind.word().to_owned(), self.dir.display().to_string()];
        words.extend([format!("rate={rate}"), format!("depth={depth}")]);
        words.push(format!("direct={}", if case.is_cached { "off" } else { "on" }));
        words.push(format!("latency={}", case.latency_ms));
        words.extend(case.own.iter().map(|word| (*word).to_owned()));
        let text = output(Command::new(program).args(words))?;
        let report: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        self.note(case, true, &report);
        Ok(())
    }

    fn theirs(&mut self, case: &Case) -> Result<(), String> {
        // The daemon takes a null device below an overlay for unallocated, and streams nothing.
        let is_skipped = case.kind == Kind::Stream && case.latency_ms > 0;
        if !self.has_daemon || is_skipped {
            return Ok(());
        }
        job_disks::make(self.stage, &self.dir, case.kind)?;
        let report = Theirs::start(&self.dir, case)?.run(case)?;
        self.note(case, false, &report);
        Ok(())
    }

    /// Notes the figures of one run.
    #[expect(clippy::cast_precision_loss, reason = "lengths of disks fit a double")]
    fn note(&mut self, case: &Case, is_ours: bool, report: &Value) {
        let mut note = |what: &str, unit, value: Option<f64>| {
            let name = format!("{}: {what}", case.name);
            self.table.note(&name, unit, is_ours, value.unwrap_or(f64::NAN));
        };
        if report["is_cancelled"] == json!(true) {
            note("not ready within 15 s, runs", "", Some(1.0));
        } else if case.load.depth == 0 {
            let speed = |seconds: f64| LEN as f64 / f64::from(1 << 20) / seconds;
            note("time", "s", report["seconds"].as_f64());
            note("speed", "MiB/s", report["seconds"].as_f64().map(speed));
        } else {
            note("time", "s", report["seconds"].as_f64());
        }
        note("CPU", "s", report["cpu_s"].as_f64());
        note("peak memory", "MiB", report["peak_kib"].as_f64().map(|kib| kib / 1024.0));
        if case.kind.needs_complete() && case.load.depth > 0 {
            note("ready after", "s", report["ready_s"].as_f64());
            note("longest write of the pivot", "ms", figure(report, "pivot", "max"));
        }
        if case.load.depth > 0 {
            for key in ["p50", "p99", "p999"] {
                note(&format!("write {key} without the job"), "ms", figure(report, "alone", key));
                note(&format!("write {key}"), "ms", figure(report, "during", key));
            }
        }
    }
}

/// Milliseconds of a guest's writes.
fn figure(report: &Value, phase: &str, key: &str) -> Option<f64> {
    report["load"][phase][key].as_f64().map(|us| us / 1000.0)
}

/// The daemon with the disks of one case.
struct Theirs {
    daemon: Daemon,
    socket: PathBuf,
}

impl Theirs {
    fn start(dir: &Path, case: &Case) -> Result<Self, String> {
        let mut daemon = Daemon::start(dir)?;
        for node in job_disks::nodes(dir, case.kind, case.latency_ms, case.is_cached) {
            daemon.ask("blockdev-add", &node)?;
        }
        let socket = dir.join("nbd.sock");
        drop(std::fs::remove_file(&socket));
        let address = json!({"type": "unix", "data": {"path": socket}});
        daemon.ask("nbd-server-start", &json!({"addr": address}))?;
        let export = json!({
            "type": "nbd", "id": "guest", "name": "guest", "writable": true,
            "node-name": case.kind.guest(),
        });
        daemon.ask("block-export-add", &export)?;
        Ok(Self { daemon, socket })
    }

    fn run(mut self, case: &Case) -> Result<Value, String> {
        let Load { rate, depth } = case.load;
        let guest = match depth {
            0 => None,
            _ => Some(GuestLoad::start(&self.socket, "guest", rate, depth)?),
        };
        if guest.is_some() {
            std::thread::sleep(ALONE);
        }
        let (begun, cpu) = (Instant::now(), self.daemon.cpu_seconds()?);
        set_phase(guest.as_ref(), 1);
        let (command, arguments) = case.kind.command();
        self.daemon.ask(command, &arguments)?;
        let mut ready = None;
        if case.kind.needs_complete() {
            if self.daemon.wait_job(&["ready"], READY_WITHIN)?.is_none() {
                let load = guest.map(GuestLoad::stop).transpose()?;
                let cpu = self.daemon.cpu_seconds()? - cpu;
                return Ok(json!({"is_cancelled": true, "cpu_s": cpu, "load": load}));
            }
            ready = Some(begun.elapsed().as_secs_f64());
            set_phase(guest.as_ref(), 2);
            self.daemon.ask("job-complete", &json!({"id": "job0"}))?;
        }
        self.daemon.wait_job(&["concluded"], LIMIT)?.ok_or("the job does not end")?;
        self.make_durable(case)?;
        let seconds = begun.elapsed().as_secs_f64();
        let cpu = self.daemon.cpu_seconds()? - cpu;
        let load = guest.map(GuestLoad::stop).transpose()?;
        let peak = self.daemon.peak()?;
        Ok(json!({
            "seconds": seconds, "cpu_s": cpu, "peak_kib": peak / 1024.0, "ready_s": ready,
            "is_cancelled": false, "load": load,
        }))
    }

    /// Flushes what the daemon left unflushed. (Mirror and active commit flush themselves, commit
    /// does when its base is made read-only again.)
    fn make_durable(&mut self, case: &Case) -> Result<(), String> {
        let failed = self.daemon.job_error("job0")?;
        if let Some(why) = failed {
            return Err(format!("{}: {why}", case.name));
        }
        self.daemon.ask("job-dismiss", &json!({"id": "job0"}))?;
        match case.kind {
            Kind::Backup => {
                self.daemon.ask("blockdev-del", &json!({"node-name": "dst"}))?;
            }
            Kind::Stream => nbd_guest::flush(&self.socket, "guest")?,
            _ => {}
        }
        Ok(())
    }
}

fn set_phase(guest: Option<&GuestLoad>, phase: u8) {
    if let Some(guest) = guest {
        guest.set_phase(phase);
    }
}

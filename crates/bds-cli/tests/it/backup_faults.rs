//! `backup run` is killed at each system call that changes something, or each of them fails: the
//! points before are whole, the next run makes the point, as an increment where one was due, and
//! the one after it misses nothing. By strace, and skipped without it.

use std::path::Path;
use std::process::Command;

use bds_testkit::{Output, pattern, tool};

use crate::workdir::Workdir;

const LEN: usize = 1 << 20;
/// Calls that submit or wait for I/O, or change files.
const CHANGES: &str = "io_uring_enter,write,pwrite64,pwritev,pwritev2,ftruncate,fallocate,fsync,\
                       fdatasync,rename,unlink,mkdir";
/// Those that can fail without ending the program at its start.
const FALLIBLE: &str =
    "pwrite64,pwritev,pwritev2,ftruncate,fallocate,fsync,fdatasync,rename,unlink";

/// Disks, and a directory of backups that has `points` points of them.
struct Case {
    workdir: Workdir,
    disks: &'static [&'static str],
    points: u32,
    contents: Vec<Vec<u8>>,
}

impl Case {
    fn new(disks: &'static [&'static str], points: u32) -> Self {
        let workdir = Workdir::new();
        let contents = disks.iter().zip(1..).map(|(disk, seed)| {
            let content = pattern(seed, 0, LEN);
            workdir.write("base.raw", &content);
            workdir.must(&format!("convert -f raw -O qcow2 base.raw {disk}.qcow2"));
            content
        });
        let contents = contents.collect();
        let mut case = Self { workdir, disks, points, contents };
        for point in 0..points {
            case.must_run();
            case.write(usize::try_from(point).expect("small") * 131_072, 200_704, 40);
        }
        case
    }

    fn words(&self) -> String {
        let images: Vec<String> = self.disks.iter().map(|disk| format!("{disk}.qcow2")).collect();
        format!("backup run -q --record-interval 64k {} set", images.join(" "))
    }

    fn must_run(&self) {
        self.workdir.must(&self.words());
    }

    fn write(&mut self, at: usize, len: usize, byte: u8) {
        for (disk, content) in self.disks.iter().zip(&mut self.contents) {
            content[at..at + len].fill(byte);
            let words = format!("bench -q -w -c 1 -s {len} -o {at} --pattern {byte} {disk}.qcow2");
            let written = self.workdir.bds(&words);
            assert!(written.ok(), "{words}: {written:?}");
        }
    }

    /// A copy of all files.
    fn fork(&self) -> Self {
        let workdir = Workdir::new();
        let from = format!("{}/.", self.workdir.dir().display());
        let copied = Command::new("cp").args(["-a", &from]).arg(workdir.dir()).status();
        assert!(copied.expect("cp runs").success());
        Self { workdir, contents: self.contents.clone(), ..*self }
    }

    /// Runs a backup under strace. Returns `None` where no process may be traced.
    fn run_under(&self, engine: &str, (calls, inject): (&str, &str)) -> Option<Output> {
        let trace = &format!("trace={calls}");
        let mut command = Command::new("strace");
        command.args(["-f", "-qqq", "-o", "trace", "-e", trace, "-e", inject]);
        command.arg(env!("CARGO_BIN_EXE_bds")).args(self.words().split(' '));
        let output = command.env("BDS_ENGINE", engine).current_dir(self.workdir.dir()).output();
        let output = output.expect("strace was found");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let is_refused = stderr.contains("ptrace") && stderr.contains("not permitted");
        let code = output.status.code().unwrap_or(-1);
        (!is_refused).then(|| Output { code, stdout: String::new(), stderr })
    }

    fn has_point(&self, number: u32) -> bool {
        let name = if self.disks.len() > 1 { "point" } else { "manifest" };
        self.workdir.dir().join(format!("set/{number:06}.{name}")).exists()
    }

    /// Goes on after a fault: the newest point is the disks, and so is the next one.
    fn check(mut self, is_increment_due: bool, words: &str) {
        let mut point = self.points + 1;
        if !self.has_point(point) {
            // Written after the fault, into what may have been copied.
            self.write(65_536, 4096, 50);
            let or_full = if is_increment_due { "" } else { " --or-full" };
            let made = self.workdir.bds(&format!("{}{or_full}", self.words()));
            assert!(made.ok(), "{words}: {made:?}");
        }
        self.check_content(point, words);
        self.write(LEN - 4096, 4096, 51);
        let made = self.workdir.bds(&self.words());
        assert!(made.ok(), "{words}: {made:?}");
        point += 1;
        self.check_content(point, words);
        // Also what a kill after the last name has left.
        for set in self.sets() {
            let left = crate::backup_resume::unfinished(&self.workdir.dir().join(&set));
            assert_eq!(left, Vec::<String>::new(), "{words}");
        }
        self.workdir.must("backup verify -q set");
    }

    /// The directory of each disk.
    fn sets(&self) -> Vec<String> {
        match self.disks {
            [_] => vec!["set".to_owned()],
            disks => disks.iter().map(|disk| format!("set/{disk}")).collect(),
        }
    }

    fn check_content(&self, point: u32, words: &str) {
        assert!(self.has_point(point), "{words}");
        for (set, content) in self.sets().iter().zip(&self.contents) {
            self.workdir.must(&format!("backup restore -q -O raw {set} out.raw"));
            assert!(self.workdir.read("out.raw") == *content, "{words}: {set} at {point}");
            std::fs::remove_file(self.workdir.dir().join("out.raw")).expect("it was made");
        }
    }
}

/// Runs a backup with a fault at the n-th of these calls, for every n, or a sample; until one runs
/// to its end without it.
fn sweep(case: &Case, (calls, fault, engine): (&str, &str, &str), is_increment_due: bool) {
    if tool("strace").is_none() {
        return;
    }
    let full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    let (step, mut faults) = (if full { 1 } else { 11 }, 0);
    for n in (1..).step_by(step) {
        let fork = case.fork();
        let inject = format!("inject={calls}:{fault}:when={n}");
        let Some(output) = fork.run_under(engine, (calls, &inject)) else {
            bds_testkit::skip("no process may be traced");
            return;
        };
        let words = format!("{inject} ({engine}): {output:?}");
        let is_over = output.ok() && !was_injected(&fork.workdir.dir().join("trace"));
        fork.check(is_increment_due, &words);
        if is_over {
            assert!(faults > 3, "{faults} faults");
            return;
        }
        faults += 1;
    }
}

fn was_injected(trace: &Path) -> bool {
    std::fs::read_to_string(trace).is_ok_and(|text| text.contains("INJECTED"))
}

const KILL: (&str, &str, &str) = (CHANGES, "signal=KILL", "uring");

#[test]
fn a_first_point_is_made_after_a_kill_anywhere() {
    sweep(&Case::new(&["disk"], 0), KILL, false);
}

/// Also while bitmaps are stored: an increment never has to become a full backup.
#[test]
fn an_increment_is_made_after_a_kill_anywhere() {
    sweep(&Case::new(&["disk"], 1), KILL, true);
}

#[test]
fn a_point_of_two_disks_is_made_after_a_kill_anywhere() {
    sweep(&Case::new(&["data", "log"], 1), KILL, true);
}

#[test]
fn a_point_is_made_after_the_failure_of_any_call() {
    let case = Case::new(&["disk"], 1);
    for fault in ["error=EIO", "error=ENOSPC"] {
        sweep(&case, (FALLIBLE, fault, "pool"), false);
    }
}

//! Counts the flushes of a command.
//!
//! A sync by io_uring is no system call, so `strace` does not see it. The file system's tracepoint
//! does, through `perf stat`.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::run::which;

/// Tracepoints of file systems at the entry of a sync.
const EVENTS: [(&str, &str); 3] =
    [("ext4", "ext4_sync_file_enter"), ("xfs", "xfs_file_fsync"), ("btrfs", "btrfs_sync_file")];

/// Runs `command` in `dir` once; how often it synced a file. `None`: it failed, or this machine
/// cannot count.
pub(super) fn count(command: &[String], dir: &Path) -> Option<u64> {
    which("perf")?;
    let has = |event: &(&str, &str)| {
        let place = Path::new("/sys/kernel/tracing/events").join(event.0).join(event.1);
        place.is_dir()
    };
    let events: Vec<String> =
        EVENTS.iter().filter(|e| has(e)).map(|(system, name)| format!("{system}:{name}")).collect();
    if events.is_empty() {
        return None;
    }
    let report = dir.join("syncs.csv");
    let status = Command::new("perf")
        .args(["stat", "-x,", "-e", &events.join(","), "-o"])
        .arg(&report)
        .arg("--")
        .args(command)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .ok()?;
    if !status.success() {
        return None;
    }
    sum(&std::fs::read_to_string(&report).ok()?)
}

/// The counts of all events in `perf stat -x,`.
fn sum(report: &str) -> Option<u64> {
    let lines = report.lines().filter(|line| EVENTS.iter().any(|(_, name)| line.contains(name)));
    let counts: Vec<u64> = lines.filter_map(|line| line.split(',').next()?.parse().ok()).collect();
    (!counts.is_empty()).then(|| counts.iter().sum())
}

#[cfg(test)]
mod tests {
    #[test]
    fn counts_are_read_from_perfs_report() {
        let report = "# started\n\n14,,ext4:ext4_sync_file_enter,100,100.00,,\n2,,xfs:xfs_file_fsync,1,1,,\n";
        assert_eq!(super::sum(report), Some(16));
        assert_eq!(super::sum("<not counted>,,ext4:ext4_sync_file_enter,0,0.00,,\n"), None);
    }
}

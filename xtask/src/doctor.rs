//! `cargo xtask doctor`: prints which programs and kernel features are present, and the commands
//! that install missing ones. Installs nothing.

use std::fs;
use std::process::Command;

use crate::run::{say, target_dir, which};

/// Prints one line a capability.
pub(crate) fn doctor() -> Result<(), String> {
    tool("rustc", &["--version"], "rustup", true);
    tool("cc", &["--version"], "apt-get install gcc", true);
    tool("qemu-img", &["--version"], "apt-get install qemu-utils", false);
    tool("qemu-io", &["--version"], "apt-get install qemu-utils", false);
    tool("qemu-storage-daemon", &["--version"], "apt-get install qemu-system-common", false);
    tool("valgrind", &["--version"], "apt-get install valgrind", false);
    tool("perf", &["--version"], "apt-get install linux-perf", false);
    tool("cargo-mutants", &["mutants", "--version"], "cargo install cargo-mutants", false);
    nightly();
    io_uring();
    direct_io();
    Ok(())
}

fn tool(name: &str, args: &[&str], how: &str, needed: bool) {
    let answer = which(name).and_then(|path| Command::new(path).args(args).output().ok());
    match answer {
        Some(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            line(name, true, text.lines().next().unwrap_or("here"));
        }
        None => line(
            name,
            false,
            &format!("{}; {how}", if needed { "needed" } else { "tests that use it are skipped" }),
        ),
    }
}

fn nightly() {
    let output = Command::new("rustup").args(["run", "nightly", "rustc", "--version"]).output();
    match output {
        Ok(output) if output.status.success() => {
            line("nightly", true, String::from_utf8_lossy(&output.stdout).trim());
        }
        _ => line(
            "nightly",
            false,
            "sanitizers and fuzzing are skipped; rustup toolchain install nightly",
        ),
    }
}

fn io_uring() {
    match fs::read_to_string("/proc/sys/kernel/io_uring_disabled") {
        Ok(text) if text.trim() == "0" => line("io_uring", true, "enabled"),
        Ok(text) => line(
            "io_uring",
            false,
            &format!("kernel.io_uring_disabled = {}; the thread pool serves", text.trim()),
        ),
        Err(_) => {
            line("io_uring", false, "this kernel has no switch for it; the engine probes at start")
        }
    }
}

/// Can a file of the scratch directory be opened with O_DIRECT? Asked with dd(1), which reports it
/// by name.
fn direct_io() {
    let path = target_dir().join("doctor.tmp");
    let made = fs::create_dir_all(target_dir()).and_then(|()| fs::write(&path, [0u8; 4096]));
    let asked = made.and_then(|()| {
        Command::new("dd")
            .arg(format!("if={}", path.display()))
            .args(["of=/dev/null", "iflag=direct", "bs=4096", "count=1", "status=none"])
            .status()
    });
    match asked {
        Ok(status) if status.success() => line("O_DIRECT", true, "on the file system of target/"),
        Ok(_) => line(
            "O_DIRECT",
            false,
            "the file system of target/ refuses it; tests of cache=none are skipped",
        ),
        Err(e) => line("O_DIRECT", false, &format!("could not be tried: {e}")),
    }
    if let Err(e) = fs::remove_file(&path) {
        line("scratch", false, &format!("{}: {e}", path.display()));
    }
}

fn line(what: &str, is_here: bool, words: &str) {
    say(&format!("{} {what:20} {words}", if is_here { "ok     " } else { "missing" }));
}

//! Tests the process environment: output that cannot be written, resource limits, signals, removal
//! of partial outputs.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bds_testkit::pattern;

use crate::workdir::Workdir;

/// Ends a test that hangs.
const WATCHDOG: Duration = Duration::from_secs(120);

/// Waits for a child that must end by itself.
#[track_caller]
fn wait(child: &mut Child) -> ExitStatus {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status;
        }
        if begin.elapsed() > WATCHDOG {
            child.kill().expect("it is ours");
            panic!("still running after {WATCHDOG:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn words(child: &mut Child) -> String {
    let mut words = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut words).expect("the pipe ends");
    words
}

/// A directory with an image, a raw file and verbs that print, with their exit codes when all is
/// printed.
fn verbs() -> (Workdir, Vec<(&'static str, i32)>) {
    let workdir = Workdir::new();
    workdir.write("a.raw", &pattern(1, 0, 1 << 20));
    workdir.write("other.raw", &pattern(2, 0, 1 << 20));
    workdir.must("convert -f raw -O qcow2 a.raw a.qcow2");
    let verbs = vec![
        ("info a.qcow2", 0),
        ("info --output json --backing-chain a.qcow2", 0),
        ("check a.qcow2", 0),
        ("check --output json a.qcow2", 0),
        ("map a.qcow2", 0),
        ("map --output json a.qcow2", 0),
        ("measure -O qcow2 a.qcow2", 0),
        ("measure --output json --size 1M", 0),
        ("compare a.qcow2 a.raw", 0),
        ("compare a.raw other.raw", 1),
        ("create -f qcow2 b.qcow2 1M", 0),
        ("create -f qcow2 -o help", 0),
        ("resize a.qcow2 2M", 0),
        ("convert -p -O raw a.qcow2 c.raw", 0),
        ("bench -c 1 -f qcow2 a.qcow2", 0),
        ("bench -c 1 --json -f qcow2 a.qcow2", 0),
        ("graph a.qcow2", 0),
        ("graph --output svg a.qcow2", 0),
        ("drivers", 0),
        ("drivers --output json qcow2", 0),
        ("completions bash", 0),
        ("--help", 0),
        ("convert --help", 0),
        ("--version", 0),
    ];
    (workdir, verbs)
}

#[test]
fn output_that_cannot_be_written_is_an_error_with_a_message() {
    let (workdir, verbs) = verbs();
    for (verb, _) in verbs {
        let args: Vec<&str> = verb.split(' ').collect();
        let full = OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
        let mut child =
            workdir.command(&args).stdout(full).stderr(Stdio::piped()).spawn().expect("bds starts");
        let words = words(&mut child);
        // 1 of compare means "different".
        let code = if verb.starts_with("compare") { 2 } else { 1 };
        assert_eq!(wait(&mut child).code(), Some(code), "{verb}: {words}");
        assert_eq!(
            words, "bds: cannot write to standard output: No space left on device\n",
            "{verb}"
        );
    }
}

#[test]
fn a_closed_stdout_pipe_does_not_change_the_result() {
    let (workdir, verbs) = verbs();
    for (verb, code) in verbs {
        let args: Vec<&str> = verb.split(' ').collect();
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut child = workdir
            .command(&args)
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .expect("bds starts");
        assert_eq!(words(&mut child), "", "{verb}");
        assert_eq!(wait(&mut child).code(), Some(code), "{verb}");
    }
    assert_eq!(workdir.read("c.raw").len(), 2 << 20, "the conversion went on to its end");
}

#[test]
fn messages_that_cannot_be_written_do_not_change_the_exit_code() {
    let (workdir, _) = verbs();
    for (verb, code) in
        [("info nothing", 1), ("check a.raw", 63), ("compare a.raw nothing", 2), ("frobnicate", 1)]
    {
        let args: Vec<&str> = verb.split(' ').collect();
        let full = OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
        let mut child =
            workdir.command(&args).stdout(Stdio::null()).stderr(full).spawn().expect("bds starts");
        assert_eq!(wait(&mut child).code(), Some(code), "{verb}");
    }
}

#[test]
fn a_file_size_limit_is_an_error_and_not_a_fatal_signal() {
    let workdir = Workdir::new();
    // Random, so that no compression gets it below the limit.
    let mut big = vec![0; 4 << 20];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut big)).expect("random");
    workdir.write("big.raw", &big);
    workdir.must("create -q -f qcow2 grows.qcow2 8M");
    workdir.must("create -q -f qcow2 -o preallocation=metadata full.qcow2 8M");
    for verb in [
        "convert -f raw -O raw big.raw o.raw",
        "convert -f raw -O qcow2 big.raw o.qcow2",
        "convert -c -f raw -O qcow2 big.raw o.qcow2",
        "convert -t none -f raw -O qcow2 big.raw o.qcow2",
        "bench -w -f qcow2 -c 64 -s 64k grows.qcow2",
        "resize --preallocation full full.qcow2 16M",
        "dd -f raw -O qcow2 if=big.raw of=o.qcow2",
        "create -q -f raw -o preallocation=full o.raw 4M",
        "create -q -f raw -o preallocation=falloc o.raw 4M",
    ] {
        let mut child = Command::new("bash")
            .args(["-c", &format!("ulimit -f 1024; exec \"$0\" {verb}"), env!("CARGO_BIN_EXE_bds")])
            .current_dir(workdir.dir())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("bash starts");
        let words = words(&mut child);
        let status = wait(&mut child);
        assert_eq!(status.signal(), None, "{verb}: {words}");
        // O_DIRECT is refused by some file systems; then that is the message.
        let is_named = words.contains("File too large") || words.contains("O_DIRECT");
        assert!(status.code() == Some(1) && is_named, "{verb}: {words}");
        for left in ["o.raw", "o.qcow2"] {
            assert!(!workdir.dir().join(left).exists(), "{verb} left {left} behind");
        }
    }
}

/// A slow convert that has begun, with what it prints from there on.
fn slow_convert(
    workdir: &Workdir,
    before: &str,
    more: &str,
) -> (Child, BufReader<std::process::ChildStdout>) {
    workdir.write("in.raw", &pattern(1, 0, 32 << 20));
    let line =
        format!("{before} exec \"$0\" convert -p -r 4M -f raw -O qcow2 {more} in.raw out.qcow2");
    let mut child = Command::new("bash")
        .args(["-c", &line, env!("CARGO_BIN_EXE_bds")])
        .current_dir(workdir.dir())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("bash starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let mut first_line = [0; 16];
    stdout.read_exact(&mut first_line).expect("progress is shown");
    (child, stdout)
}

fn send(child: &Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

/// Ends a slow convert with a signal; returns its exit code and messages.
fn stopped(workdir: &Workdir, signal: &str, more: &str) -> (Option<i32>, String) {
    let (mut child, mut stdout) = slow_convert(workdir, "", more);
    send(&child, signal);
    std::io::copy(&mut stdout, &mut std::io::sink()).expect("the pipe ends");
    let words = words(&mut child);
    let status = wait(&mut child);
    assert!(!words.contains("33554432 of 33554432"), "it went on to the end: {words}");
    (status.code(), words)
}

#[test]
fn each_signal_has_its_exit_code_and_leaves_no_partial_image() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let workdir = Workdir::new();
        let (found, words) = stopped(&workdir, signal, "");
        assert_eq!(found, Some(code), "{signal}: {words}");
        assert!(words.contains("interrupted; the output 'out.qcow2' is incomplete: "), "{words}");
        assert!(words.contains(" of 33554432 bytes copied; it was removed"), "{words}");
        assert!(!workdir.dir().join("out.qcow2").exists(), "{signal}: left behind");
    }
}

/// `timeout` signals the process and its group: two signals at once, of which the second must not
/// cut the cleaning short.
#[test]
fn the_same_signal_twice_at_once_still_cleans_up() {
    let workdir = Workdir::new();
    let (mut child, mut stdout) = slow_convert(&workdir, "", "");
    send(&child, "-TERM");
    std::thread::sleep(Duration::from_millis(20));
    send(&child, "-TERM");
    std::io::copy(&mut stdout, &mut std::io::sink()).expect("the pipe ends");
    assert_eq!(wait(&mut child).code(), Some(143));
    assert!(!workdir.dir().join("out.qcow2").exists(), "left behind");
}

#[test]
fn a_partial_output_is_kept_on_demand_and_says_so() {
    let workdir = Workdir::new();
    let (code, words) = stopped(&workdir, "-INT", "--keep-partial");
    assert_eq!(code, Some(130), "{words}");
    assert!(words.contains("it is kept, as --keep-partial asks"), "{words}");
    // Closed in order: nothing but the data is missing.
    workdir.must("check out.qcow2");
}

#[test]
fn an_output_that_was_there_before_is_never_removed() {
    let workdir = Workdir::new();
    workdir.must("create -q -f qcow2 out.qcow2 32M");
    for more in ["-n", ""] {
        let (code, words) = stopped(&workdir, "-TERM", more);
        assert_eq!(code, Some(143), "{words}");
        assert!(words.contains("it was there before and is kept"), "{words}");
        workdir.must("check out.qcow2");
    }
}

#[test]
fn an_ignored_signal_stays_ignored() {
    let workdir = Workdir::new();
    for (before, signal) in [("trap '' INT;", "-INT"), ("trap '' HUP;", "-HUP")] {
        let (mut child, mut stdout) = slow_convert(&workdir, before, "-r 16M");
        send(&child, signal);
        std::io::copy(&mut stdout, &mut std::io::sink()).expect("the pipe ends");
        assert_eq!(wait(&mut child).code(), Some(0), "{before} {}", words(&mut child));
        workdir.must("compare -f raw -F qcow2 in.raw out.qcow2");
    }
}

/// At 1 byte a second the first piece alone waits for days.
#[test]
fn a_low_rate_does_not_delay_an_interrupt() {
    let workdir = Workdir::new();
    let (code, words) = stopped(&workdir, "-TERM", "-r 1");
    assert_eq!(code, Some(143), "{words}");
}

#[test]
fn a_failed_copy_removes_what_it_created() {
    let workdir = Workdir::new();
    workdir.write("in.raw", &pattern(1, 0, 1 << 20));
    let faulty = "driver=blkdebug,inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector=1000,\
                  image.driver=file,image.filename=in.raw";
    for options in ["", "-o data_file=out.data"] {
        let output = workdir.bds(&format!("convert --image-opts -O qcow2 {options} {faulty} out"));
        assert_eq!(output.code, 1, "{output:?}");
        assert!(output.stderr.contains("it was removed"), "{output:?}");
        for left in ["out", "out.data"] {
            assert!(!workdir.dir().join(left).exists(), "{left} is left behind");
        }
    }
    let output = workdir.bds(&format!("dd --image-opts -O qcow2 if={faulty} of=out"));
    assert!(output.code == 1 && output.stderr.contains("it was removed"), "{output:?}");
    assert!(!workdir.dir().join("out").exists());
    assert!(File::open(workdir.dir().join("in.raw")).is_ok());
}

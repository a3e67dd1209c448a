//! Ctrl-C and other ends before the end.

use std::io::{BufReader, Read};
use std::process::{Command, Stdio};

use bds_testkit::pattern;

use crate::tool::Desk;

/// The copy is slow by order, the signal comes once it has begun, and what is left is said.
#[test]
fn an_interrupted_convert_says_what_it_leaves() {
    let desk = Desk::new();
    desk.write("in.raw", &pattern(1, 0, 32 << 20));
    let args =
        ["convert", "-p", "-r", "4M", "-m", "1", "-f", "raw", "-O", "qcow2", "in.raw", "out.qcow2"];
    let mut child = desk
        .command(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("bds starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let mut first_line = [0; 16];
    stdout.read_exact(&mut first_line).expect("progress is shown");
    let signalled =
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(signalled.success());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).expect("the pipe ends");
    let mut words = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut words).expect("the pipe ends");
    let status = child.wait().expect("bds ends");
    assert_eq!(status.code(), Some(130), "{words}");
    assert!(words.contains("output 'out.qcow2' is incomplete: "), "{words}");
    assert!(words.contains(" of 33554432 bytes copied"), "{words}");
    // Closed in order: nothing but the data is missing.
    let check = desk.bds("check out.qcow2");
    assert_eq!(check.code, 0, "{check:?}");
}

#[test]
fn a_failed_convert_names_its_cause_and_its_output() {
    let desk = Desk::new();
    desk.write("in.raw", &pattern(1, 0, 1 << 20));
    let source = "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=in.raw,\
                  file.inject-error.0.event=none,file.inject-error.0.iotype=read";
    let output = desk.bds(&format!("convert --image-opts -O raw {source} out.raw"));
    assert_eq!(output.code, 1);
    let words = "output 'out.raw' is incomplete: 0 of 1048576 bytes copied: cannot read the source";
    assert!(output.stderr.contains(words), "{}", output.stderr);
}

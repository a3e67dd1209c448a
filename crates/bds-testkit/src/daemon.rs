//! Asks `qemu-storage-daemon`, over its monitor on standard input and output.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

fn spawn() -> Child {
    let daemon = Command::new("timeout")
        .args(["60", "qemu-storage-daemon", "--chardev", "stdio,id=c", "--monitor", "c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    daemon.expect("qemu-storage-daemon runs")
}

/// Runs a storage daemon that is given these commands, and ends it when the job `id`, which the
/// last one starts, has concluded. Panics if a command or the job fails.
#[track_caller]
pub fn run_daemon_job(commands: &[Value], id: &str) {
    let mut daemon = spawn();
    let mut input = daemon.stdin.take().expect("it is piped");
    let first = json!({"execute": "qmp_capabilities"});
    for command in std::iter::once(&first).chain(commands) {
        writeln!(input, "{command}").expect("the daemon reads");
    }
    let lines = BufReader::new(daemon.stdout.take().expect("it is piped")).lines();
    let has_concluded = lines.map_while(Result::ok).any(|line| {
        let Ok(message) = serde_json::from_str::<Value>(&line) else { return false };
        let data = &message["data"];
        assert!(message.get("error").is_none() && data.get("error").is_none(), "{message}");
        data["id"] == id && data["status"] == "concluded"
    });
    assert!(has_concluded, "the daemon ended before the job {id}");
    writeln!(input, "{}", json!({"execute": "quit"})).expect("the daemon reads");
    assert!(daemon.wait().expect("it ends by itself").success());
}

/// Runs a storage daemon that is given these commands, and returns its answers.
#[track_caller]
pub fn ask_daemon(commands: &[Value]) -> Vec<Value> {
    let mut daemon = spawn();
    {
        let mut input = daemon.stdin.take().expect("it is piped");
        let first = json!({"execute": "qmp_capabilities"});
        let last = json!({"execute": "quit"});
        for command in std::iter::once(&first).chain(commands).chain([&last]) {
            writeln!(input, "{command}").expect("the daemon reads");
        }
    }
    let output = daemon.wait_with_output().expect("it ends by itself");
    let text = String::from_utf8_lossy(&output.stdout);
    let values = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let is_answer = |v: &Value| v.get("return").is_some() || v.get("error").is_some();
    values.filter(is_answer).skip(1).take(commands.len()).collect()
}

/// The SHA-256 of each bitmap's bits as QEMU loads them: bytes in the order of qcow2, in whole
/// words of 64 bits.
#[track_caller]
pub fn bitmap_sums(image: &Path, names: &[&str]) -> Vec<String> {
    let file = json!({"driver": "file", "filename": image, "read-only": true});
    let open = json!({"driver": "qcow2", "node-name": "n", "read-only": true, "backing": null, "file": file});
    let mut commands = vec![json!({"execute": "blockdev-add", "arguments": open})];
    commands.extend(names.iter().map(|name| {
        let arguments = json!({"node": "n", "name": name});
        json!({"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": arguments})
    }));
    let answers = ask_daemon(&commands);
    assert_eq!(answers.len(), commands.len(), "{answers:?}");
    assert!(answers[0].get("return").is_some(), "{:?}", answers[0]);
    let sum = |answer: &Value| match answer["return"]["sha256"].as_str() {
        Some(sum) => sum.to_owned(),
        None => panic!("{answer}"),
    };
    answers[1..].iter().map(sum).collect()
}

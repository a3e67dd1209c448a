//! Sends commands to qemu-storage-daemon over its QMP socket: those that the graph benches need.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A daemon and the connection to it.
pub(super) struct Daemon {
    child: Child,
    reader: BufReader<UnixStream>,
    line: String,
}

impl Daemon {
    /// Starts one whose socket lies in `dir`.
    pub(super) fn start(dir: &Path) -> Result<Self, String> {
        let socket = dir.join("qmp.sock");
        drop(std::fs::remove_file(&socket));
        let child = Command::new("qemu-storage-daemon")
            .arg("--chardev")
            .arg(format!("socket,id=c,path={},server=on,wait=off", socket.display()))
            .args(["--monitor", "chardev=c"])
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| format!("cannot run qemu-storage-daemon: {e}"))?;
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(e) if begun.elapsed() > Duration::from_secs(10) => {
                    return Err(format!("{}: {e}", socket.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut this = Self { child, reader: BufReader::new(stream), line: String::new() };
        this.read()?; // the greeting
        this.ask("qmp_capabilities", &json!({}))?;
        Ok(this)
    }

    fn read(&mut self) -> Result<(), String> {
        self.line.clear();
        match self.reader.read_line(&mut self.line) {
            Ok(0) => Err("QMP: the daemon has gone".into()),
            Ok(_) => Ok(()),
            Err(e) => Err(format!("QMP: {e}")),
        }
    }

    /// Asks, waits for the answer and returns its length in bytes.
    pub(super) fn ask(&mut self, command: &str, arguments: &Value) -> Result<usize, String> {
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        self.reader.get_mut().write_all(text.as_bytes()).map_err(|e| format!("QMP: {e}"))?;
        loop {
            self.read()?;
            if self.line.starts_with("{\"return\"") {
                return Ok(self.line.len());
            }
            // Events come in between, and now and then the greeting is late.
            let is_aside = self.line.starts_with("{\"timestamp\"")
                || self.line.starts_with("{\"QMP\"")
                || self.line.trim().is_empty();
            if !is_aside {
                return Err(format!("{command}: {}", self.line.trim_end()));
            }
        }
    }

    /// Its resident memory now, in bytes.
    pub(super) fn resident(&self) -> Result<f64, String> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
        kib.map(|kib| kib * 1024.0).ok_or_else(|| format!("{path}: no VmRSS"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

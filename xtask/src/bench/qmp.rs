//! Sends commands to qemu-storage-daemon over its QMP socket, and receives its events.

use std::collections::VecDeque;
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
    /// Events that came before an answer.
    events: VecDeque<Value>,
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
        let mut this = Self {
            child,
            reader: BufReader::new(stream),
            line: String::new(),
            events: VecDeque::new(),
        };
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

    /// The error of a job that is still listed.
    pub(super) fn job_error(&mut self, id: &str) -> Result<Option<String>, String> {
        self.ask("query-jobs", &json!({}))?;
        let answer: Value = serde_json::from_str(&self.line).map_err(|e| format!("QMP: {e}"))?;
        let jobs = answer["return"].as_array().into_iter().flatten();
        let error = jobs.filter(|job| job["id"] == id).find_map(|job| job["error"].as_str());
        Ok(error.map(str::to_owned))
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
            if self.line.starts_with("{\"timestamp\"") {
                self.keep_event()?;
            } else if !self.line.starts_with("{\"QMP\"") && !self.line.trim().is_empty() {
                return Err(format!("{command}: {}", self.line.trim_end()));
            }
        }
    }

    fn keep_event(&mut self) -> Result<(), String> {
        let event = serde_json::from_str(&self.line).map_err(|e| format!("QMP: {e}"))?;
        self.events.push_back(event);
        Ok(())
    }

    /// Waits for a job to have one of these states, at most so long; returns the state. `None`: the
    /// time is over.
    pub(super) fn wait_job(
        &mut self,
        states: &[&str],
        limit: Duration,
    ) -> Result<Option<String>, String> {
        let begun = Instant::now();
        loop {
            while let Some(event) = self.events.pop_front() {
                let state = event["data"]["status"].as_str().unwrap_or_default();
                if event["event"] == "JOB_STATUS_CHANGE" && states.contains(&state) {
                    return Ok(Some(state.to_owned()));
                }
            }
            let Some(rest) = limit.checked_sub(begun.elapsed()).filter(|rest| !rest.is_zero())
            else {
                return Ok(None);
            };
            self.set_timeout(Some(rest))?;
            let found = self.read();
            self.set_timeout(None)?;
            match found {
                Ok(()) if self.line.starts_with("{\"timestamp\"") => self.keep_event()?,
                Ok(()) => {}
                Err(_) if begun.elapsed() >= limit => return Ok(None),
                Err(why) => return Err(why),
            }
        }
    }

    fn set_timeout(&self, limit: Option<Duration>) -> Result<(), String> {
        self.reader.get_ref().set_read_timeout(limit).map_err(|e| format!("QMP: {e}"))
    }

    /// Its user and system time, in seconds.
    pub(super) fn cpu_seconds(&self) -> Result<f64, String> {
        const TICKS_A_SECOND: f64 = 100.0;
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        // Behind the name, which may hold anything, user time is the twelfth field.
        let fields = stat.rsplit(") ").next().unwrap_or_default().split_whitespace();
        let ticks = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok());
        Ok(ticks.sum::<f64>() / TICKS_A_SECOND)
    }

    /// Its largest resident memory, in bytes.
    pub(super) fn peak(&self) -> Result<f64, String> {
        self.memory("VmHWM:")
    }

    /// Its resident memory now, in bytes.
    pub(super) fn resident(&self) -> Result<f64, String> {
        self.memory("VmRSS:")
    }

    fn memory(&self, key: &str) -> Result<f64, String> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let line = status.lines().find(|line| line.starts_with(key));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
        kib.map(|kib| kib * 1024.0).ok_or_else(|| format!("{path}: no {key}"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

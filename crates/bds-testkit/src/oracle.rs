//! Runs QEMU's tools as an oracle: found on PATH, or the test is skipped with a reason.
//!
//! Every call has a time limit (`timeout(1)`), so that a hang of the oracle does not hang the
//! tests.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

use crate::skip;

/// An installed tool.
#[derive(Clone, Debug)]
pub struct Tool {
    path: PathBuf,
    env: Vec<(String, String)>,
}

/// Result of a run of a tool.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit code; 124 if it was stopped for taking too long, -1 if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// True if the exit code is 0.
    pub fn ok(&self) -> bool {
        self.code == 0
    }

    /// Parses standard output as JSON; fails the test if it is not.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        match serde_json::from_str(&self.stdout) {
            Ok(value) => value,
            Err(e) => panic!("not JSON ({e}): {self:?}"),
        }
    }
}

/// Finds `name` on PATH; prints a skip and returns `None` if it is missing.
pub fn tool(name: &str) -> Option<Tool> {
    let found = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.is_file()));
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found.map(Tool::at)
}

/// Finds `qemu-img`; prints a skip if it is missing.
pub fn qemu_img() -> Option<Tool> {
    tool("qemu-img")
}

/// Finds `qemu-io`; prints a skip if it is missing.
pub fn qemu_io() -> Option<Tool> {
    tool("qemu-io")
}

impl Tool {
    /// Names the program at `path`, which must exist (one that the build made).
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), env: Vec::new() }
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn with_env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Runs it with these arguments for at most 60 seconds.
    #[track_caller]
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        let mut command = Command::new("timeout");
        command.arg("60").arg(&self.path).args(args);
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        let output = command.output();
        let output = match output {
            Ok(output) => output,
            Err(e) => panic!("cannot run {}: {e}", self.path.display()),
        };
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs it and fails the test unless the exit code is 0.
    #[track_caller]
    pub fn must<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        let args: Vec<S> = args.into_iter().collect();
        let shown: Vec<String> =
            args.iter().map(|a| a.as_ref().to_string_lossy().into_owned()).collect();
        let output = self.run(args);
        assert!(output.ok(), "{} {}: {output:?}", self.path.display(), shown.join(" "));
        output
    }
}

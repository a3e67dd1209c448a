//! Runs `bds` and qemu-img in a scratch directory.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bds_testkit::{Output, Scratch};

/// A scratch directory in which the tools are run.
pub(crate) struct Workdir {
    scratch: Scratch,
}

impl Workdir {
    pub(crate) fn new() -> Self {
        Self { scratch: Scratch::new() }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.scratch.dir()
    }

    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bds"));
        command.args(args).current_dir(self.dir());
        command
    }

    /// Runs bds with arguments separated by blanks. Again for some seconds where an image is
    /// locked: the system takes down the ring of a killed process, and with it its files, some time
    /// after the process has ended.
    pub(crate) fn bds(&self, words: &str) -> Output {
        let args: Vec<&str> = words.split(' ').filter(|w| !w.is_empty()).collect();
        for _ in 0..100 {
            let output = finish(self.command(&args));
            if !output.stderr.contains("is another process using the image?") {
                return output;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        finish(self.command(&args))
    }

    /// Runs bds, which must succeed.
    #[track_caller]
    pub(crate) fn must(&self, words: &str) -> Output {
        let output = self.bds(words);
        assert!(output.ok(), "bds {words}: {output:?}");
        output
    }

    /// Runs qemu-img in the same directory.
    pub(crate) fn qemu_img(&self, words: &str) -> Output {
        let mut command = Command::new("timeout");
        command.args(["60", "qemu-img"]).args(words.split(' ')).current_dir(self.dir());
        finish(command)
    }

    #[track_caller]
    pub(crate) fn must_qemu(&self, words: &str) -> Output {
        let output = self.qemu_img(words);
        assert!(output.ok(), "qemu-img {words}: {output:?}");
        output
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir().join(name), bytes).expect("scratch is writable");
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir().join(name)).expect("the file was made")
    }
}

/// A loop device for a file, until it is dropped.
pub(crate) struct LoopDevice(String);

impl LoopDevice {
    /// `None` where there are no loop devices, or none that we may make.
    pub(crate) fn new(workdir: &Workdir, file: &str, options: &[&str]) -> Option<Self> {
        let path = workdir.dir().join(file);
        let output =
            Command::new("losetup").args(options).args(["--show", "-f"]).arg(path).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !name.is_empty()).then_some(Self(name))
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    /// Detaches the device, after what was written to it has reached the file. Other programs of
    /// the host may have it open (udev looks at every device that was written): then neither
    /// closing nor detaching writes anything before they are done.
    fn drop(&mut self) {
        let synced = std::fs::File::open(&self.0).and_then(|device| device.sync_all());
        let detached = Command::new("losetup").args(["-d", &self.0]).status();
        if !std::thread::panicking() {
            synced.expect("a device can be synced");
            assert!(detached.is_ok_and(|status| status.success()), "cannot detach {}", self.0);
        }
    }
}

fn finish(mut command: Command) -> Output {
    let output = command.output().expect("runs");
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

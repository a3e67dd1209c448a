//! QEMU's tools and this library at the same file: each refuses where the other would.
//!
//! One side holds the file open, the other tries. What the user is to the file (raw or image, reading or writing) is all
//! that matters, and the answer is the same whoever comes first.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bds_core::driver::{
    BoxFuture, ChildOpener, ChildRequest, Driver, DriverType, OpenContext, OpenFlags, Role,
};
use bds_core::{ErrorKind, Options, Result};
use bds_drivers::protocol::file::FileProtocol;
use bds_io::Fs;
use bds_testkit::{Scratch, qemu_img, qemu_io};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    RawReader,
    RawWriter,
    ImageReader,
    ImageWriter,
}

const USERS: [User; 4] = [User::RawReader, User::RawWriter, User::ImageReader, User::ImageWriter];

impl User {
    fn is_raw(self) -> bool {
        matches!(self, Self::RawReader | Self::RawWriter)
    }

    fn is_writer(self) -> bool {
        matches!(self, Self::RawWriter | Self::ImageWriter)
    }

    /// A writer tolerates only raw readers; everybody tolerates readers.
    fn tolerates(self, other: Self) -> bool {
        let minds = |a: Self, b: Self| a.is_writer() && b != Self::RawReader;
        !minds(self, other) && !minds(other, self)
    }
}

struct NoChildren;

impl ChildOpener for NoChildren {
    fn open_child<'a>(
        &'a mut self,
        _: ChildRequest,
    ) -> BoxFuture<'a, Result<Option<bds_core::driver::Child>>> {
        Box::pin(async { Ok(None) })
    }
}

fn open(path: &Path, user: User) -> Result<Box<dyn Driver>> {
    let role = if user.is_raw() { Role::FILTERED } else { Role::DATA | Role::METADATA };
    let flags = OpenFlags {
        read_only: !user.is_writer(),
        role: role | Role::PRIMARY,
        ..Default::default()
    };
    let options = Options::new().with("filename", path.to_str().expect("plain"));
    let fs = Fs::Host;
    let mut opener = NoChildren;
    let mut context = OpenContext::new("node", options, flags, &fs, &mut opener);
    bds_io::block_on(FileProtocol.open(&mut context))
}

fn qemu_io_command(path: &Path, user: User) -> Command {
    let mut command = Command::new("qemu-io");
    command.args(["-f", if user.is_raw() { "raw" } else { "qcow2" }]);
    if !user.is_writer() {
        command.arg("-r");
    }
    command.arg(path);
    command
}

/// qemu-io with the file open, until dropped.
struct Holder(Child);

impl Holder {
    fn new(path: &Path, user: User) -> Self {
        let mut child = qemu_io_command(path, user)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io was found");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(b"length\n").expect("qemu-io listens");
        child.stdin = Some(stdin);
        let mut answer = String::new();
        let stdout = child.stdout.as_mut().expect("piped");
        BufReader::new(stdout).read_line(&mut answer).expect("qemu-io answers");
        assert!(answer.contains("iB"), "{user:?}: {answer}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn image() -> Option<(Scratch, std::path::PathBuf)> {
    let (img, _io) = (qemu_img()?, qemu_io()?);
    let scratch = Scratch::new();
    let path = scratch.path("a.qcow2");
    let made = img.run(["create", "-q", "-f", "qcow2", path.to_str().expect("plain"), "1M"]);
    assert!(made.ok(), "{made:?}");
    Some((scratch, path))
}

#[test]
fn we_respect_qemu() {
    let Some((_scratch, path)) = image() else { return };
    for first in USERS {
        let _holder = Holder::new(&path, first);
        for second in USERS {
            let outcome = open(&path, second);
            assert_eq!(outcome.is_ok(), first.tolerates(second), "{first:?} then {second:?}");
            if let Err(e) = outcome {
                assert_eq!(e.kind(), ErrorKind::InUse, "{e}");
            }
        }
    }
}

#[test]
fn qemu_respects_us() {
    let Some((_scratch, path)) = image() else { return };
    for first in USERS {
        let node = open(&path, first).expect("nobody else is there");
        for second in USERS {
            let output =
                qemu_io_command(&path, second).args(["-c", "length"]).output().expect("runs");
            let text = String::from_utf8_lossy(&output.stderr);
            let is_refused = text.contains("Is another process using the image");
            assert_eq!(!is_refused, first.tolerates(second), "{first:?} then {second:?}: {text}");
        }
        bds_io::block_on(node.close()).expect("closes");
    }
}

#[test]
fn nobody_creates_over_an_image_in_use() {
    let Some((_scratch, path)) = image() else { return };
    let before = std::fs::read(&path).expect("readable");
    for user in [User::RawWriter, User::ImageReader, User::ImageWriter] {
        let _holder = Holder::new(&path, user);
        let made = bds_io::block_on(FileProtocol.create_file(
            &Fs::Host,
            &path,
            &mut Options::new().with("size", 512),
        ));
        assert_eq!(made.expect_err("in use").kind(), ErrorKind::InUse, "{user:?}");
        assert_eq!(std::fs::read(&path).expect("readable"), before, "{user:?}");
    }
}

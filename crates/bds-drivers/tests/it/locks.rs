//! Tests image locks against QEMU's tools: each side refuses a file that the other uses in a
//! conflicting way.
//!
//! One side holds the file open, the other tries to. Only the kind of use matters (raw or image,
//! reading or writing), and the result is the same whichever comes first.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bds_core::driver::{
    BoxFuture, ChildOpener, ChildRequest, Driver, DriverType, OpenContext, OpenFlags,
    ReopenContext, Role,
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

    /// A writer tolerates only raw readers; every user tolerates readers.
    fn tolerates(self, other: Self) -> bool {
        let conflicts = |a: Self, b: Self| a.is_writer() && b != Self::RawReader;
        !conflicts(self, other) && !conflicts(other, self)
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
    let flags = flags(user);
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
fn locks_of_qemu_refuse_our_open() {
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
fn our_locks_refuse_qemus_open() {
    let Some((_scratch, path)) = image() else { return };
    for first in USERS {
        let node = open(&path, first).expect("the file is not in use");
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
fn create_refuses_an_image_in_use() {
    let Some((_scratch, path)) = image() else { return };
    let before = std::fs::read(&path).expect("readable");
    for user in [User::RawWriter, User::ImageReader, User::ImageWriter] {
        let _holder = Holder::new(&path, user);
        let mut options = Options::new().with("size", 512);
        let made = FileProtocol.claim_file(&Fs::Host, &path, &mut options);
        assert_eq!(made.expect_err("in use").kind(), ErrorKind::InUse, "{user:?}");
        assert_eq!(std::fs::read(&path).expect("readable"), before, "{user:?}");
    }
}

fn flags(user: User) -> OpenFlags {
    let role = if user.is_raw() { Role::FILTERED } else { Role::DATA | Role::METADATA };
    OpenFlags { read_only: !user.is_writer(), role: role | Role::PRIMARY, ..OpenFlags::default() }
}

fn reopen(node: &dyn Driver, from: OpenFlags, to: OpenFlags) -> Result<()> {
    let mut context =
        ReopenContext { current: from, flags: to, options: Options::new(), fs: &Fs::Host };
    let prepared = bds_io::block_on(node.prepare_reopen(&mut context))?;
    prepared.commit();
    Ok(())
}

/// After a reopen QEMU conflicts with the new mode only: the old descriptor and its locks are gone.
#[test]
fn a_reopened_file_has_the_locks_of_its_new_mode() {
    let Some((_scratch, path)) = image() else { return };
    for first in USERS {
        for then in USERS.into_iter().filter(|then| then.is_raw() == first.is_raw()) {
            let node = open(&path, first).expect("the file is not in use");
            reopen(&*node, flags(first), flags(then)).expect("no lock conflicts");
            reopen(&*node, flags(then), flags(first)).expect("no lock conflicts");
            reopen(&*node, flags(first), flags(then)).expect("no lock conflicts");
            for second in USERS {
                let output =
                    qemu_io_command(&path, second).args(["-c", "length"]).output().expect("runs");
                let text = String::from_utf8_lossy(&output.stderr);
                let is_refused = text.contains("Is another process using the image");
                assert_eq!(!is_refused, then.tolerates(second), "{then:?} then {second:?}: {text}");
            }
            let opened = descriptors(&path);
            assert!(
                !opened.is_empty() && opened.iter().all(|writes| *writes == then.is_writer()),
                "{first:?} to {then:?}: {opened:?}"
            );
            bds_io::block_on(node.close()).expect("closes");
        }
    }
}

/// Descriptors of this process for this file: are they writable?
fn descriptors(path: &Path) -> Vec<bool> {
    let numbers = std::fs::read_dir("/proc/self/fd").expect("Linux");
    let numbers = numbers.filter_map(|entry| entry.ok().map(|entry| entry.file_name()));
    numbers
        .filter(|number| {
            let target = std::fs::read_link(Path::new("/proc/self/fd").join(number));
            target.is_ok_and(|target| target == path)
        })
        .filter_map(|number| {
            let info = std::fs::read_to_string(Path::new("/proc/self/fdinfo").join(number)).ok()?;
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim();
            Some(u32::from_str_radix(flags, 8).ok()? & 3 != 0)
        })
        .collect()
}

/// QEMU writes to an inactivated file; it can be activated again only after QEMU has closed it.
#[test]
fn qemu_writes_to_an_inactivated_image() {
    let Some((_scratch, path)) = image() else { return };
    for user in [User::ImageWriter, User::ImageReader, User::RawWriter] {
        let node = open(&path, user).expect("the file is not in use");
        bds_io::block_on(node.inactivate()).expect("nothing fails");
        let holder = Holder::new(&path, User::ImageWriter);
        let error = bds_io::block_on(node.activate()).err();
        assert_eq!(error.map(|e| e.kind()), Some(ErrorKind::InUse), "{user:?}");
        drop(holder);
        bds_io::block_on(node.activate()).expect("the file is not in use any more");
        let output = qemu_io_command(&path, User::ImageWriter)
            .args(["-c", "length"])
            .output()
            .expect("runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("Is another process using the image"), "{user:?}: {text}");
        bds_io::block_on(node.close()).expect("closes");
    }
}

/// The kernel names no owner of such a lock, so the message must not guess another process.
#[test]
fn a_conflict_within_one_process_names_the_node() {
    let scratch = Scratch::new();
    let path = scratch.path("a.raw");
    std::fs::write(&path, [0; 512]).expect("scratch is writable");
    let first = open(&path, User::ImageWriter).expect("nothing has it open");
    let words = open(&path, User::ImageWriter).map(drop).expect_err("it is in use").to_string();
    assert!(words.contains("this process has the file open already, as node 'node'"), "{words}");
    assert!(!words.contains("another process"), "{words}");
    bds_io::block_on(first.close()).expect("nothing fails here");
    open(&path, User::ImageWriter).expect("it is free again");
}

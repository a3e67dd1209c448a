//! QEMU's image locks: who uses a file for what, in bytes that every process on the host can see.
//!
//! ```text
//! permission        I use it   others must not
//! consistent read     100          200
//! write               101          201
//! write unchanged     102          202
//! resize              103          203
//! ```
//!
//! All locks are shared OFD locks of one byte, so taking one never fails because of another; conflicts are found
//! by *testing* the opposite byte of each. Taking all of ours before the first test means that of two who come
//! at the same moment at least one sees the other.
//!
//! Two descriptions of one node (a reopen) would find each other's locks and refuse. So the *old* description takes what either
//! needs and tests; from then on nobody can come in who does not get along with the new one, which takes its own
//! bytes beside it without a test. After that the old one may go.
//!
//! Invariant: the bytes recorded as held are locked by this file description. Order: take new, test, then drop old.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bds_core::{Error, ErrorKind, Result};
use bds_io::{ByteLock, File};

use super::users::{User, other_user};

const USED_BASE: u64 = 100;
const UNSHARED_BASE: u64 = 200;
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

/// What a missing lock means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockMode {
    /// Locks must work.
    On,
    /// None are taken.
    Off,
    /// Used where the file system has them.
    Auto,
}

/// What one user of a file does, and does not want others to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Permissions {
    /// What we do, one bit a permission.
    pub(super) used: u8,
    /// What others must not do.
    pub(super) unshared: u8,
    /// Do not mind that others object to readers.
    pub(super) force_share: bool,
}

impl Permissions {
    pub(super) const NONE: u8 = 0;
    pub(super) const READ: u8 = 1;
    pub(super) const WRITE: u8 = 2;
    pub(super) const RESIZE: u8 = 8;

    /// What is left while another process is in charge: reading, and whatever others do is borne.
    pub(super) fn idle(self) -> Self {
        Self { used: self.used & Self::READ, unshared: Self::NONE, ..self }
    }
}

/// What was held before [`Locks::widen`].
#[derive(Debug)]
#[must_use]
pub(super) struct Widened(Option<Permissions>);

/// The locks one open description holds.
#[derive(Debug)]
pub(super) struct Locks {
    /// What is held; `None` if locks are off or do not work here.
    held: Mutex<Option<Permissions>>,
    /// What is held while the node is in charge of the file.
    wanted: Permissions,
    /// Shows this process that the file is in use.
    user: Mutex<Option<User>>,
}

impl Locks {
    /// Holds nothing and never will.
    pub(super) fn none() -> Self {
        Self { held: Mutex::new(None), wanted: Permissions::default(), user: Mutex::new(None) }
    }

    /// Locks `file` for `wanted`, or says who is in the way.
    pub(super) fn take(file: &File, wanted: Permissions, mode: LockMode) -> Result<Self> {
        if mode == LockMode::Off {
            return Ok(Self { wanted, ..Self::none() });
        }
        match change(file, Permissions::default(), wanted) {
            Ok(()) => Ok(Self { held: Mutex::new(Some(wanted)), wanted, ..Self::none() }),
            Err(Failure::NoLocks(_)) if mode == LockMode::Auto => {
                Ok(Self { wanted, ..Self::none() })
            }
            Err(failure) => Err(failure.into_error(file, None)),
        }
    }

    /// Names the node that holds them, for the words of a conflict in this process.
    pub(super) fn held_by(mut self, file: &File, node_name: &str) -> Self {
        if self.lock().is_some() {
            self.user = Mutex::new(User::enter(file, node_name));
        }
        self
    }

    /// What is held while the node is in charge of the file.
    pub(super) fn wanted(&self) -> Permissions {
        self.wanted
    }

    /// Holds what `other` shall hold too, if nobody objects. The answer is what [`Locks::narrow`] goes back to; `None` if locks
    /// do not work here and need not.
    pub(super) fn widen(
        &self,
        file: &File,
        other: Permissions,
        mode: LockMode,
    ) -> Result<Option<Widened>> {
        if mode == LockMode::Off {
            return Ok(None);
        }
        let mut held = self.lock();
        let old = held.unwrap_or_default();
        let both = Permissions {
            used: old.used | other.used,
            unshared: old.unshared | other.unshared,
            force_share: old.force_share,
        };
        match take_bytes(file, old, both).and_then(|()| test(file, other)) {
            Ok(()) => {
                let before = Widened(held.replace(both));
                Ok(Some(before))
            }
            Err(failure) => {
                drop_bytes(file, both, old);
                match failure {
                    Failure::NoLocks(_) if mode == LockMode::Auto => Ok(None),
                    failure => Err(self.error(file, failure)),
                }
            }
        }
    }

    /// Undoes [`Locks::widen`].
    pub(super) fn narrow(&self, file: &File, before: Widened) {
        let mut held = self.lock();
        let both = std::mem::replace(&mut *held, before.0).unwrap_or_default();
        drop_bytes(file, both, before.0.unwrap_or_default());
    }

    /// Locks another description of a file whose locks were widened for it.
    pub(super) fn beside(file: &File, now: Permissions, wanted: Permissions) -> Result<Self> {
        take_bytes(file, Permissions::default(), now).map_err(|f| f.into_error(file, None))?;
        Ok(Self { held: Mutex::new(Some(now)), wanted, ..Self::none() })
    }

    /// Somebody else takes charge of the file: keeps only what a reader keeps that nobody minds.
    pub(super) fn relax(&self, file: &File) {
        let mut held = self.lock();
        if let Some(old) = *held {
            let new = old.idle();
            drop_bytes(file, old, new);
            *held = Some(new);
        }
    }

    /// Takes charge again, or says who is in the way (then nothing has changed).
    pub(super) fn restore(&self, file: &File) -> Result<()> {
        let mut held = self.lock();
        let Some(old) = *held else { return Ok(()) };
        change(file, old, self.wanted).map_err(|f| self.error(file, f))?;
        *held = Some(self.wanted);
        Ok(())
    }

    fn error(&self, file: &File, failure: Failure) -> Error {
        let user = self.user.lock().unwrap_or_else(PoisonError::into_inner);
        failure.into_error(file, user.as_ref())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Permissions>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds the resize permission while `guard` lives, if it is not held anyway.
    pub(super) fn resizing<'a>(&'a self, file: &'a File) -> Result<ResizeGuard<'a>> {
        let mut held = self.lock();
        let Some(old) = *held else { return Ok(ResizeGuard { locks: self, file, added: false }) };
        if old.used & Permissions::RESIZE != 0 {
            return Ok(ResizeGuard { locks: self, file, added: false });
        }
        let new = Permissions { used: old.used | Permissions::RESIZE, ..old };
        change(file, old, new).map_err(|f| self.error(file, f))?;
        *held = Some(new);
        Ok(ResizeGuard { locks: self, file, added: true })
    }

    /// Drops everything. Failure to unlock is no error: closing the file unlocks as well.
    pub(super) fn release(&self, file: &File) {
        let mut held = self.lock();
        if let Some(old) = held.take() {
            drop_bytes(file, old, Permissions::default());
        }
        self.user.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Gives the resize permission back when dropped.
#[derive(Debug)]
pub(super) struct ResizeGuard<'a> {
    locks: &'a Locks,
    file: &'a File,
    added: bool,
}

impl Drop for ResizeGuard<'_> {
    fn drop(&mut self) {
        if !self.added {
            return;
        }
        let mut held = self.locks.lock();
        if let Some(old) = *held {
            let new = Permissions { used: old.used & !Permissions::RESIZE, ..old };
            drop_bytes(self.file, old, new);
            *held = Some(new);
        }
    }
}

enum Failure {
    /// The file system has no such locks.
    NoLocks(io::Error),
    /// Somebody is in the way.
    InUse(String),
    /// The system said something else.
    System(io::Error),
}

impl Failure {
    fn into_error(self, file: &File, own: Option<&User>) -> Error {
        match self {
            Self::NoLocks(e) => {
                Error::io(e, "file locks do not work here; use locking=off to go without")
                    .with_kind(ErrorKind::NotSupported)
            }
            Self::InUse(lock) => {
                let who = match other_user(file, own) {
                    None => "is another process using the image?".to_owned(),
                    // Generated names mean nothing to a person.
                    Some(name) if name.starts_with('#') => {
                        "this process has the file open already".to_owned()
                    }
                    Some(name) => {
                        format!("this process has the file open already, as node '{name}'")
                    }
                };
                Error::new(ErrorKind::InUse, format!("Failed to get {lock} lock: {who}"))
            }
            Self::System(e) => Error::io(e, "cannot lock the file"),
        }
    }
}

fn byte(base: u64, bit: usize) -> ByteLock {
    ByteLock { offset: base + bit as u64, len: 1 }
}

fn bits(mask: u8) -> impl Iterator<Item = usize> {
    (0..NAMES.len()).filter(move |bit| mask & (1 << bit) != 0)
}

/// Goes from `old` to `new`: takes what is new, tests, drops what is old. On failure `old` is what is held.
fn change(file: &File, old: Permissions, new: Permissions) -> Result<(), Failure> {
    let both = Permissions {
        used: old.used | new.used,
        unshared: old.unshared | new.unshared,
        force_share: new.force_share,
    };
    let outcome = take_bytes(file, old, new).and_then(|()| test(file, new));
    match outcome {
        Ok(()) => {
            drop_bytes(file, both, new);
            Ok(())
        }
        Err(failure) => {
            drop_bytes(file, both, old);
            Err(failure)
        }
    }
}

fn take_bytes(file: &File, old: Permissions, new: Permissions) -> Result<(), Failure> {
    let used = bits(new.used & !old.used).map(|bit| byte(USED_BASE, bit));
    let unshared = bits(new.unshared & !old.unshared).map(|bit| byte(UNSHARED_BASE, bit));
    for lock in used.chain(unshared) {
        file.lock_shared(lock).map_err(classify)?;
    }
    Ok(())
}

fn classify(error: io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::ENOTSUP | libc::ENOSYS | libc::ENOLCK | libc::EINVAL) => Failure::NoLocks(error),
        // Only an exclusive lock can refuse a shared one: not QEMU's way, but somebody's claim all the same.
        Some(libc::EAGAIN | libc::EACCES) => Failure::InUse("shared".to_owned()),
        _ => Failure::System(error),
    }
}

fn test(file: &File, new: Permissions) -> Result<(), Failure> {
    let minded = if new.force_share { new.used & !Permissions::READ } else { new.used };
    for bit in bits(minded) {
        if file.is_locked_by_others(byte(UNSHARED_BASE, bit)).map_err(classify)? {
            return Err(Failure::InUse(format!("\"{}\"", NAMES[bit])));
        }
    }
    for bit in bits(new.unshared) {
        if file.is_locked_by_others(byte(USED_BASE, bit)).map_err(classify)? {
            return Err(Failure::InUse(format!("shared \"{}\"", NAMES[bit])));
        }
    }
    Ok(())
}

/// Drops what is in `have` and not in `keep`.
fn drop_bytes(file: &File, have: Permissions, keep: Permissions) {
    let used = bits(have.used & !keep.used).map(|bit| byte(USED_BASE, bit));
    let unshared = bits(have.unshared & !keep.unshared).map(|bit| byte(UNSHARED_BASE, bit));
    for lock in used.chain(unshared) {
        if let Err(error) = file.unlock(lock) {
            tracing::warn!(offset = lock.offset, %error, "cannot unlock a byte of an image");
        }
    }
}

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
//! Invariant: the bytes recorded as held are locked by this file description. Order: take new, test, then drop old.

use std::io;
use std::sync::{Mutex, PoisonError};

use bds_core::{Error, ErrorKind, Result};
use bds_io::{ByteLock, File};

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
}

/// The locks one node holds.
#[derive(Debug)]
pub(super) struct Locks {
    /// What is held; `None` if locks are off or do not work here.
    held: Mutex<Option<Permissions>>,
}

impl Locks {
    /// Holds nothing and never will.
    pub(super) fn none() -> Self {
        Self { held: Mutex::new(None) }
    }

    /// Locks `file` for `wanted`, or says who is in the way.
    pub(super) fn take(file: &File, wanted: Permissions, mode: LockMode) -> Result<Self> {
        if mode == LockMode::Off {
            return Ok(Self::none());
        }
        match change(file, Permissions::default(), wanted) {
            Ok(()) => Ok(Self { held: Mutex::new(Some(wanted)) }),
            Err(Failure::NoLocks(_)) if mode == LockMode::Auto => Ok(Self::none()),
            Err(failure) => Err(failure.into_error()),
        }
    }

    /// Holds the resize permission while `guard` lives, if it is not held anyway.
    pub(super) fn resizing<'a>(&'a self, file: &'a File) -> Result<ResizeGuard<'a>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(old) = *held else { return Ok(ResizeGuard { locks: self, file, added: false }) };
        if old.used & Permissions::RESIZE != 0 {
            return Ok(ResizeGuard { locks: self, file, added: false });
        }
        let new = Permissions { used: old.used | Permissions::RESIZE, ..old };
        change(file, old, new).map_err(Failure::into_error)?;
        *held = Some(new);
        Ok(ResizeGuard { locks: self, file, added: true })
    }

    /// Drops everything. Failure to unlock is no error: closing the file unlocks as well.
    pub(super) fn release(&self, file: &File) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = held.take() {
            drop_bytes(file, old, Permissions::default());
        }
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
        let mut held = self.locks.held.lock().unwrap_or_else(PoisonError::into_inner);
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
    fn into_error(self) -> Error {
        match self {
            Self::NoLocks(e) => {
                Error::io(e, "file locks do not work here; use locking=off to go without")
                    .with_kind(ErrorKind::NotSupported)
            }
            Self::InUse(lock) => Error::new(
                ErrorKind::InUse,
                format!("Failed to get {lock} lock: is another process using the image?"),
            ),
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

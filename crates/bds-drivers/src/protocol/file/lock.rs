//! QEMU's image locks: byte locks that tell every process of the host how a file is used.
//!
//! ```text
//! permission          in use     unshared
//! consistent read     100          200
//! write               101          201
//! write unchanged     102          202
//! resize              103          203
//! ```
//!
//! All locks are shared OFD locks of one byte, so taking one never fails because of another;
//! conflicts are found by *testing* the opposite byte of each. A node takes all of its locks before
//! the first test, so that of two simultaneous opens at least one sees the other.
//!
//! Two descriptions of one node (a reopen) would conflict with each other. So the *old* description
//! takes what either needs and tests; from then on no user that conflicts with the new one can open
//! the file. The new one takes its bytes without a test. Then the old one may be closed.
//!
//! Invariant: the bytes recorded as held are locked by this file description. Order: take new,
//! test, then drop old.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bds_core::{Error, ErrorKind, Result};
use bds_io::{ByteLock, File};

use super::users::{User, other_user};

const USED_BASE: u64 = 100;
const UNSHARED_BASE: u64 = 200;
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

/// How missing lock support is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockMode {
    /// Locks must work.
    On,
    /// None are taken.
    Off,
    /// Used if the file system supports them.
    Auto,
}

/// What one user of a file does, and what it does not share with others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Permissions {
    /// Permissions in use, one bit each.
    pub(super) used: u8,
    /// Permissions that others must not use.
    pub(super) unshared: u8,
    /// Ignore that others do not share reading.
    pub(super) force_share: bool,
}

impl Permissions {
    pub(super) const NONE: u8 = 0;
    pub(super) const READ: u8 = 1;
    pub(super) const WRITE: u8 = 2;
    pub(super) const RESIZE: u8 = 8;

    /// What remains while another process uses the file: reading, with everything shared.
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
    /// What is held while the node is active.
    wanted: Permissions,
    /// Entry in this process's list of lock holders.
    user: Mutex<Option<User>>,
}

impl Locks {
    /// Makes an object that holds nothing and never will.
    pub(super) fn none() -> Self {
        Self { held: Mutex::new(None), wanted: Permissions::default(), user: Mutex::new(None) }
    }

    /// Locks `file` for `wanted`. The error names the conflicting lock.
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

    /// Records the node's name, for messages about a conflict within this process.
    pub(super) fn held_by(mut self, file: &File, node_name: &str) -> Self {
        if self.lock().is_some() {
            self.user = Mutex::new(User::enter(file, node_name));
        }
        self
    }

    /// What is held while the node is active.
    pub(super) fn wanted(&self) -> Permissions {
        self.wanted
    }

    /// Takes what `other` needs in addition, if no other user conflicts. Returns what
    /// [`Locks::narrow`] restores; `None` if locks are unsupported and not required.
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
    pub(super) fn take_untested(
        file: &File,
        now: Permissions,
        wanted: Permissions,
    ) -> Result<Self> {
        take_bytes(file, Permissions::default(), now).map_err(|f| f.into_error(file, None))?;
        Ok(Self { held: Mutex::new(Some(now)), wanted, ..Self::none() })
    }

    /// Inactivates: keeps only what a reader holds that shares everything.
    pub(super) fn relax(&self, file: &File) {
        let mut held = self.lock();
        if let Some(old) = *held {
            let new = old.idle();
            drop_bytes(file, old, new);
            *held = Some(new);
        }
    }

    /// Activates: takes the locks again. On a conflict nothing has changed.
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

    /// Holds the resize permission while `guard` lives, unless it is held anyway.
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

    /// Drops all locks. A failure to unlock is ignored: closing the file unlocks as well.
    pub(super) fn release(&self, file: &File) {
        let mut held = self.lock();
        if let Some(old) = held.take() {
            drop_bytes(file, old, Permissions::default());
        }
        self.user.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Drops the resize permission when dropped.
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
    /// The file system supports no such locks.
    NoLocks(io::Error),
    /// Another user conflicts.
    InUse(String),
    /// Any other error of the system.
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
                let holder = match other_user(file, own) {
                    None => "is another process using the image?".to_owned(),
                    // A generated node name means nothing to the user.
                    Some(name) if name.starts_with('#') => {
                        "this process has the file open already".to_owned()
                    }
                    Some(name) => {
                        format!("this process has the file open already, as node '{name}'")
                    }
                };
                Error::new(ErrorKind::InUse, format!("Failed to get {lock} lock: {holder}"))
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

/// Changes what is held from `old` to `new`: takes new locks, tests, drops old ones. On failure
/// `old` is held.
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
        // Only an exclusive lock can refuse a shared one: not QEMU's way, but a claim of another
        // user all the same.
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

/// Drops the locks of `have` that `keep` does not contain.
fn drop_bytes(file: &File, have: Permissions, keep: Permissions) {
    let used = bits(have.used & !keep.used).map(|bit| byte(USED_BASE, bit));
    let unshared = bits(have.unshared & !keep.unshared).map(|bit| byte(UNSHARED_BASE, bit));
    for lock in used.chain(unshared) {
        if let Err(error) = file.unlock(lock) {
            tracing::warn!(offset = lock.offset, %error, "cannot unlock a byte of an image");
        }
    }
}

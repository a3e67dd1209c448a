//! Opens a file or device: options, kinds, read-only rules, limits and locks.
//!
//! Nothing here truncates or writes. On any failure the descriptor is closed, which drops its
//! locks.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64};
use std::sync::{Mutex, OnceLock};

use bds_core::Options;
use bds_core::driver::{Driver, Limits, OpenContext, OpenFlags, Role};
use bds_core::{Error, ErrorKind, Result};
use bds_io::{File, FileKind, Fs, OpenOptions};

use super::lock::{LockMode, Locks, Permissions};
use super::status::DataRun;
use super::{Features, FileNode, Flavour, Mode, Opened};

/// Longest single data request, as everywhere in the block layer: a 31-bit length rounded down to a
/// sector.
const MAX_TRANSFER_BYTES: u64 = 0x7fff_fe00;

/// Devices take discards and zero writes in units of their logical block, which is never larger.
const DEVICE_UNIT_BYTES: u32 = 4096;

pub(super) fn open(flavour: Flavour, context: &mut OpenContext<'_>) -> Result<Box<dyn Driver>> {
    let options = &mut context.options;
    let path = options.take_path("filename")?.ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, "option 'filename' is missing: name the file")
    })?;
    let mode = take_mode(options, Mode { locking: LockMode::Auto, share_writers: false })?;
    let path = strip_scheme(path);
    let node_name = context.node_name.to_owned();
    open_node(flavour, context.fs, path, mode, node_name.clone(), context.flags)
        .map(|node| Box::new(node) as Box<dyn Driver>)
        .map_err(|e| e.node(node_name))
}

/// Takes the options that may change while the file is open; one that is missing stays as in
/// `mode`.
pub(super) fn take_mode(options: &mut Options, mode: Mode) -> Result<Mode> {
    let locking = match options.take_str("locking")?.as_deref() {
        None => mode.locking,
        Some("auto") => LockMode::Auto,
        Some("on") => LockMode::On,
        Some("off") => LockMode::Off,
        Some(other) => return Err(bad_choice("locking", other, "on, off or auto")),
    };
    match options.take_str("aio")?.as_deref() {
        None | Some("threads" | "native" | "io_uring") => {}
        Some(other) => return Err(bad_choice("aio", other, "threads, native or io_uring")),
    }
    options.take_bool("drop-cache")?;
    let share_writers = options.take_bool("x-share-rw")?.unwrap_or(mode.share_writers);
    Ok(Mode { locking, share_writers })
}

/// `file:name` is how users of QEMU spell a name that contains a colon.
pub(super) fn strip_scheme(name: PathBuf) -> PathBuf {
    match name.as_os_str().as_bytes().strip_prefix(b"file:") {
        Some(rest) => PathBuf::from(OsStr::from_bytes(rest)),
        None => name,
    }
}

fn bad_choice(name: &'static str, found: &str, allowed: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("option '{name}' must be {allowed}"))
        .field(name, found)
}

fn open_node(
    flavour: Flavour,
    fs: &Fs,
    path: PathBuf,
    mode: Mode,
    node_name: String,
    flags: OpenFlags,
) -> Result<FileNode> {
    let mut opened = Opened::new(flavour, fs, &path, mode, flags)?;
    opened.locks = Locks::take(&opened.file, opened.permissions(&flags), opened.locking(&flags))
        .map_err(|e| e.file(&path))?
        .held_by(&opened.file, &node_name);
    let len = opened.file.len().map_err(|e| Error::io(e, "cannot query the length").file(&path))?;
    Ok(FileNode {
        flavour,
        node_name,
        path,
        first: opened,
        reopened: OnceLock::new(),
        is_active: AtomicBool::new(true),
        known_len: AtomicU64::new(len),
        broken_flush: AtomicI32::new(0),
        features: Features::default(),
        data_run: Mutex::new(DataRun::default()),
    })
}

impl Opened {
    /// Opens the file in a mode. No lock is taken.
    pub(super) fn new(
        flavour: Flavour,
        fs: &Fs,
        path: &Path,
        mode: Mode,
        flags: OpenFlags,
    ) -> Result<Self> {
        if flags.force_share && !flags.read_only {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "force-share=on can only be used with read-only images",
            ));
        }
        let direct = flags.cache.direct;
        let (file, is_read_only) =
            open_file(fs, path, wants_write(&flags), direct, flags.auto_read_only)
                .map_err(|e| open_failed(e, path, direct))?;
        check_kind(flavour, &file, path)?;
        let limits = limits(flavour, &file, direct).map_err(|e| e.file(path))?;
        Ok(Self { file, locks: Locks::none(), mode, is_read_only, is_direct: direct, limits })
    }

    /// What this node does to the file if opened with `flags`, and what it lets others do
    /// meanwhile.
    pub(super) fn permissions(&self, flags: &OpenFlags) -> Permissions {
        permissions(flags, self.is_read_only, self.mode.share_writers)
    }

    /// An open for inspection takes no locks.
    pub(super) fn locking(&self, flags: &OpenFlags) -> LockMode {
        if flags.info_only { LockMode::Off } else { self.mode.locking }
    }
}

pub(super) fn wants_write(flags: &OpenFlags) -> bool {
    !(flags.read_only || flags.info_only)
}

/// Opens for writing, or for reading if only that is allowed and the caller accepts it.
fn open_file(
    fs: &Fs,
    path: &Path,
    want_write: bool,
    direct: bool,
    auto_read_only: bool,
) -> io::Result<(File, bool)> {
    let options = OpenOptions { write: want_write, direct, ..OpenOptions::default() };
    let opened = fs.open(path, &options).and_then(|file| match want_write {
        // A block device opens for writing even if it is write-protected.
        true if file.is_write_protected()? => Err(io::Error::from_raw_os_error(libc::EROFS)),
        _ => Ok(file),
    });
    match opened {
        Ok(file) => Ok((file, !want_write)),
        Err(e) if want_write && auto_read_only && is_refusal(&e) => {
            let file = fs.open(path, &OpenOptions { write: false, ..options })?;
            Ok((file, true))
        }
        Err(e) => Err(e),
    }
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
}

fn open_failed(error: io::Error, path: &Path, direct: bool) -> Error {
    let is_read_only_fs = error.raw_os_error() == Some(libc::EROFS);
    let is_bad_direct = direct && error.raw_os_error() == Some(libc::EINVAL);
    let words = if is_bad_direct {
        "cannot open: the file system does not support O_DIRECT, use another cache mode"
    } else {
        "cannot open"
    };
    let error = Error::io(error, words).file(path);
    // Callers test for "not allowed"; a read-only file system is only the reason.
    if is_read_only_fs { error.with_kind(ErrorKind::PermissionDenied) } else { error }
}

fn check_kind(flavour: Flavour, file: &File, path: &Path) -> Result<()> {
    let kind = file.kind();
    let remedy = match (flavour, kind) {
        (Flavour::File, FileKind::Regular) => return Ok(()),
        (Flavour::Device, FileKind::Block | FileKind::Char) => return Ok(()),
        (Flavour::File, FileKind::Block | FileKind::Char) => ": use the driver 'host_device'",
        (Flavour::Device, FileKind::Regular) => ": use the driver 'file'",
        _ => ", which holds no image: name a regular file or a block device",
    };
    let words = format!("{}{remedy}", kind.describe());
    Err(Error::new(ErrorKind::InvalidInput, words).file(path))
}

/// What this user does to the file, and what it lets others do meanwhile.
fn permissions(flags: &OpenFlags, is_read_only: bool, share_writers: bool) -> Permissions {
    let keeps_metadata = flags.role.contains(Role::METADATA);
    let mut used = Permissions::READ;
    if !is_read_only {
        used |= Permissions::WRITE;
        if keeps_metadata {
            used |= Permissions::RESIZE;
        }
    }
    let unshared = if flags.force_share {
        Permissions::NONE
    } else if keeps_metadata || flags.refuse_writers {
        Permissions::WRITE | Permissions::RESIZE
    } else if is_read_only || share_writers {
        // A raw reader sees what a writer writes, as with any file.
        Permissions::NONE
    } else {
        Permissions::WRITE | Permissions::RESIZE
    };
    Permissions { used, unshared, force_share: flags.force_share }
}

fn limits(flavour: Flavour, file: &File, direct: bool) -> Result<Limits> {
    let (memory, offset) = file.alignment().map_err(|e| {
        Error::io(e, "cannot find out the alignment for direct access; use another cache mode")
    })?;
    let memory = u32::try_from(memory).map_err(|_| {
        Error::new(ErrorKind::NotSupported, "the memory alignment is too large")
            .field("memory_alignment", memory)
    })?;
    let unit = match flavour {
        Flavour::File => 1,
        Flavour::Device => DEVICE_UNIT_BYTES.max(offset),
    };
    Ok(Limits {
        request_alignment: if direct { offset.max(1) } else { 1 },
        memory_alignment: memory.max(1),
        max_transfer: MAX_TRANSFER_BYTES,
        zero_alignment: unit,
        discard_alignment: unit,
        ..Limits::default()
    })
}

//! Claims a file for a new image, and empties it once everything else was checked.
//!
//! An existing file is opened without truncation and locked; its bytes stay until the claim's
//! `empty` runs. A missing file is created, also at the target of a symbolic link, as open(O_CREAT)
//! does. A failed claim removes a file that it created; later that is the duty of the claim's
//! owner.

use std::io;
use std::path::{Path, PathBuf};

use bds_core::driver::{ClaimedFile, Prealloc};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};
use bds_io::{File, FileKind, Fs, OpenOptions};

use super::lock::{LockMode, Locks, Permissions};
use super::status::set_len;

/// Extent size hint: limits the fragmentation of a growing image, where the file system takes
/// hints.
const DEFAULT_EXTENT_SIZE_HINT: u32 = 1 << 20;

pub(super) const CREATE_OPTIONS: &[OptionSpec] = &[
    OptionSpec { name: "size", kind: OptionKind::Size, help: "Virtual disk size", default: None },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::Choice(&["off", "falloc", "full"]),
        help: "Preallocation mode (allowed values: off, falloc, full)",
        default: Some("off"),
    },
    OptionSpec {
        name: "nocow",
        kind: OptionKind::Bool,
        help: "Turn off copy-on-write (valid only on btrfs)",
        default: Some("off"),
    },
    OptionSpec {
        name: "extent_size_hint",
        kind: OptionKind::Size,
        help: "Extent size hint for the image file, 0 to disable",
        default: Some("1M"),
    },
];

pub(super) const DEVICE_OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "size",
    kind: OptionKind::Size,
    help: "Virtual disk size",
    default: None,
}];

struct CreateSettings {
    size: u64,
    prealloc: Prealloc,
    nocow: bool,
    extent_size_hint: u32,
}

fn parse(options: &mut Options) -> Result<CreateSettings> {
    let size = options.take_size("size")?.unwrap_or(0);
    let prealloc = match options.take_str("preallocation")? {
        None => Prealloc::Off,
        Some(word) => match Prealloc::parse(&word) {
            Some(mode @ (Prealloc::Off | Prealloc::Falloc | Prealloc::Full)) => mode,
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "option 'preallocation' must be off, falloc or full for a file",
                )
                .field("preallocation", word));
            }
        },
    };
    let nocow = options.take_bool("nocow")?.unwrap_or(false);
    let extent_size_hint = match options.take_size("extent_size_hint")? {
        None => DEFAULT_EXTENT_SIZE_HINT,
        Some(bytes) => u32::try_from(bytes).map_err(|_| {
            Error::new(ErrorKind::InvalidInput, "option 'extent_size_hint' is below 4G")
                .field("extent_size_hint", bytes)
        })?,
    };
    Ok(CreateSettings { size, prealloc, nocow, extent_size_hint })
}

pub(super) fn claim(fs: &Fs, path: &Path, options: &mut Options) -> Result<ClaimedFile> {
    let wanted = parse(options)?;
    let (file, made_path) =
        open_or_make(fs, path).map_err(|e| Error::io(e, "could not create the file").file(path))?;
    let claimed = claim_open(file, path, wanted, made_path.clone());
    if let (Err(error), Some(made)) = (&claimed, &made_path)
        && let Err(e) = fs.remove(made)
    {
        tracing::warn!(path = %made.display(), %e, %error, "cannot remove a half-made file");
    }
    claimed.map_err(|e| e.file(path))
}

fn claim_open(
    file: File,
    path: &Path,
    wanted: CreateSettings,
    made_path: Option<PathBuf>,
) -> Result<ClaimedFile> {
    if file.kind() != FileKind::Regular {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "exists and is not a regular file; a device takes the driver 'host_device'",
        ));
    }
    let identity = file.identity().map_err(|e| Error::io(e, "cannot identify the file"))?;
    let locks = lock(&file)?;
    let path = path.to_owned();
    let empty = Box::pin(async move {
        let outcome = make_empty(&file, &wanted).await;
        locks.release(&file);
        outcome.map_err(|e| e.file(path))
    });
    Ok(ClaimedFile { made_path, identity, max_len: None, empty })
}

/// Opens the file or creates it; returns the path if it was created.
fn open_or_make(fs: &Fs, path: &Path) -> io::Result<(File, Option<PathBuf>)> {
    let existing = OpenOptions { write: true, ..OpenOptions::default() };
    let fresh = OpenOptions { create: true, exclusive: true, ..existing.clone() };
    match fs.open(path, &fresh) {
        Ok(file) => return Ok((file, Some(path.to_owned()))),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e),
    }
    match fs.open(path, &existing) {
        // The name exists and the file does not: a dangling symbolic link. The kernel follows it,
        // under its own rules.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let file = fs.open(path, &OpenOptions { create: true, ..existing })?;
            Ok((file, fs.canonicalize(path).ok()))
        }
        opened => Ok((opened?, None)),
    }
}

/// Locks as a writer of the whole file that tolerates no other writer.
fn lock(file: &File) -> Result<Locks> {
    let permissions = Permissions {
        used: Permissions::WRITE | Permissions::RESIZE,
        unshared: Permissions::WRITE | Permissions::RESIZE,
        force_share: false,
    };
    Locks::take(file, permissions, LockMode::Auto)
}

async fn make_empty(file: &File, wanted: &CreateSettings) -> Result<()> {
    file.set_len(0).await.map_err(|e| Error::io(e, "could not empty the file"))?;
    hint(file, wanted);
    set_len(file, 0, wanted.size, wanted.prealloc).await
}

/// Hints only: many file systems support neither.
fn hint(file: &File, wanted: &CreateSettings) {
    if wanted.nocow
        && let Err(error) = file.set_no_cow()
    {
        tracing::debug!(%error, "copy-on-write stays on");
    }
    if wanted.extent_size_hint > 0
        && let Err(error) = file.set_extent_size_hint(wanted.extent_size_hint)
    {
        tracing::debug!(%error, "no extent size hint");
    }
}

/// A device is not created; it must exist, be a device, and be large enough.
pub(super) fn claim_device(fs: &Fs, path: &Path, options: &mut Options) -> Result<ClaimedFile> {
    let size = options.take_size("size")?.unwrap_or(0);
    let writable = OpenOptions { write: true, ..OpenOptions::default() };
    let file =
        fs.open(path, &writable).map_err(|e| Error::io(e, "cannot open the device").file(path))?;
    if !matches!(file.kind(), FileKind::Block | FileKind::Char) {
        return Err(Error::new(ErrorKind::NotSupported, "is not a device").file(path));
    }
    let len = file.len().map_err(|e| Error::io(e, "cannot query the length").file(path))?;
    if len < size {
        return Err(Error::new(ErrorKind::NoSpace, "the device is too small")
            .file(path)
            .field("size", format!("{len}, needed {size}")));
    }
    let identity =
        file.identity().map_err(|e| Error::io(e, "cannot identify the device").file(path))?;
    let locks = lock(&file).map_err(|e| e.file(path))?;
    let empty = Box::pin(async move {
        locks.release(&file);
        Ok(())
    });
    Ok(ClaimedFile { made_path: None, identity, max_len: Some(len), empty })
}

//! Making a file for an image.
//!
//! An existing file is emptied only after its locks are held, and never at open: whoever uses it keeps its bytes.
//! After a failure the file is removed again, but only if it was made here.

use std::io;
use std::path::Path;

use bds_core::driver::Prealloc;
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};
use bds_io::{File, FileKind, Fs, OpenOptions};

use super::lock::{LockMode, Locks, Permissions};
use super::status::set_len;

/// Fragmentation of a growing image is kept down by allocating in pieces of this size, where the file system can be told.
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

struct Wanted {
    size: u64,
    prealloc: Prealloc,
    nocow: bool,
    extent_size_hint: u32,
}

fn parse(options: &mut Options) -> Result<Wanted> {
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
    Ok(Wanted { size, prealloc, nocow, extent_size_hint })
}

pub(super) async fn create(fs: &Fs, path: &Path, options: &mut Options) -> Result<()> {
    let wanted = parse(options)?;
    let (file, is_ours) =
        open_or_make(fs, path).map_err(|e| Error::io(e, "could not create the file").file(path))?;
    if file.kind() != FileKind::Regular {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "exists and is not a regular file; a device takes the driver 'host_device'",
        )
        .file(path));
    }
    let outcome = fill_in(&file, &wanted).await;
    if let (Err(error), true) = (&outcome, is_ours)
        && let Err(e) = fs.remove(path)
    {
        tracing::warn!(path = %path.display(), %e, %error, "cannot remove a half-made file");
    }
    outcome.map_err(|e| e.file(path))
}

/// True if the file was not there before.
fn open_or_make(fs: &Fs, path: &Path) -> io::Result<(File, bool)> {
    let fresh =
        OpenOptions { write: true, create: true, exclusive: true, ..OpenOptions::default() };
    match fs.open(path, &fresh) {
        Ok(file) => Ok((file, true)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let existing = OpenOptions { write: true, ..OpenOptions::default() };
            Ok((fs.open(path, &existing)?, false))
        }
        Err(e) => Err(e),
    }
}

async fn fill_in(file: &File, wanted: &Wanted) -> Result<()> {
    let permissions = Permissions {
        used: Permissions::WRITE | Permissions::RESIZE,
        unshared: Permissions::WRITE | Permissions::RESIZE,
        force_share: false,
    };
    let locks = Locks::take(file, permissions, LockMode::Auto)?;
    let outcome = make_empty(file, wanted).await;
    locks.release(file);
    outcome
}

async fn make_empty(file: &File, wanted: &Wanted) -> Result<()> {
    file.set_len(0).await.map_err(|e| Error::io(e, "could not empty the file"))?;
    hint(file, wanted);
    set_len(file, 0, wanted.size, wanted.prealloc).await
}

/// Both are wishes: many file systems know neither.
fn hint(file: &File, wanted: &Wanted) {
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

/// A device is not made; it must be there, be one, and be large enough.
pub(super) async fn use_device(fs: &Fs, path: &Path, options: &mut Options) -> Result<()> {
    let size = options.take_size("size")?.unwrap_or(0);
    let writable = OpenOptions { write: true, ..OpenOptions::default() };
    let file =
        fs.open(path, &writable).map_err(|e| Error::io(e, "cannot open the device").file(path))?;
    if !matches!(file.kind(), FileKind::Block | FileKind::Char) {
        return Err(Error::new(ErrorKind::NotSupported, "is not a device").file(path));
    }
    let len = file.len().map_err(|e| Error::io(e, "cannot ask for the length").file(path))?;
    if len < size {
        return Err(Error::new(ErrorKind::NoSpace, "the device is too small")
            .file(path)
            .field("size", format!("{len}, needed {size}")));
    }
    Ok(())
}

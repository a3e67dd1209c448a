//! Detects whether two files share bytes, from what sysfs knows about block devices.
//!
//! A file is identified as (device, inode), a block or character device as (its number, 0), as
//! [`crate::File::identity`] does. Links, `/dev/fd/N` and `/proc` names need nothing more. A device
//! may show bytes of others: the file of a loop device, the disk of a partition, the devices below
//! a mapped one. sysfs lists them; what it does not list counts as not shared.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Layers of devices that are followed: a mapped device on a partition of a loop device, and some
/// more.
const MAX_LAYERS: usize = 16;

/// Identity of a file: (device, inode), or (device number, 0).
type Identity = (u64, u64);

/// True if writing to one of two files changes what is read from the other.
///
/// Two partitions of a disk do not share bytes, a partition and its disk do. Two loop devices share
/// bytes if they show overlapping parts of one file.
pub fn shares_bytes(a: Identity, b: Identity) -> bool {
    if a == b || is_above(a, b, MAX_LAYERS) || is_above(b, a, MAX_LAYERS) {
        return true;
    }
    match (loop_window(a), loop_window(b)) {
        (Some((file_a, a)), Some((file_b, b))) => {
            file_a == file_b && a.start < b.end && b.start < a.end
        }
        _ => false,
    }
}

/// True if `bottom` is below the device `top`.
fn is_above(top: Identity, bottom: Identity, layers: usize) -> bool {
    layers > 0
        && below(top).into_iter().any(|next| next == bottom || is_above(next, bottom, layers - 1))
}

/// Files and devices whose bytes a device shows.
fn below(device: Identity) -> Vec<Identity> {
    let Some(dir) = sysfs_dir(device) else { return Vec::new() };
    let mut found: Vec<Identity> = loop_file(&dir).into_iter().collect();
    if dir.join("partition").exists() {
        // The directory of a partition lies in that of its disk.
        found.extend(std::fs::canonicalize(&dir).ok().and_then(|dir| number_in(dir.parent()?)));
    }
    let slaves = std::fs::read_dir(dir.join("slaves")).into_iter().flatten().flatten();
    found.extend(slaves.filter_map(|slave| number_in(&slave.path())));
    found
}

fn sysfs_dir((number, inode): Identity) -> Option<PathBuf> {
    if inode != 0 {
        return None;
    }
    let name = format!("{}:{}", libc::major(number), libc::minor(number));
    Some(Path::new("/sys/dev/block").join(name)).filter(|dir| dir.exists())
}

/// The number of the device that a sysfs directory describes.
fn number_in(dir: &Path) -> Option<Identity> {
    let text = std::fs::read_to_string(dir.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((libc::makedev(major.parse().ok()?, minor.parse().ok()?), 0))
}

/// The file or device behind a loop device.
fn loop_file(dir: &Path) -> Option<Identity> {
    let name = std::fs::read(dir.join("loop/backing_file")).ok()?;
    let name = name.strip_suffix(b"\n").unwrap_or(&name);
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    let meta = std::fs::metadata(path).ok()?;
    let kind = meta.file_type();
    let is_device = kind.is_block_device() || kind.is_char_device();
    Some(if is_device { (meta.rdev(), 0) } else { (meta.dev(), meta.ino()) })
}

/// The file of a loop device and the range of it that the device shows.
fn loop_window(device: Identity) -> Option<(Identity, Range<u64>)> {
    let dir = sysfs_dir(device)?;
    let file = loop_file(&dir)?;
    let number = |name: &str| -> Option<u64> {
        std::fs::read_to_string(dir.join("loop").join(name)).ok()?.trim().parse().ok()
    };
    let start = number("offset")?;
    let end = match number("sizelimit")? {
        0 => u64::MAX,
        limit => start.saturating_add(limit),
    };
    Some((file, start..end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_identities_share_and_others_do_not() {
        assert!(shares_bytes((7, 1), (7, 1)));
        assert!(!shares_bytes((7, 1), (7, 2)));
        // A device number that no device has.
        assert!(!shares_bytes((libc::makedev(4000, 1), 0), (7, 2)));
    }

    #[test]
    fn a_partition_shares_bytes_with_its_disk() {
        let partitions = std::fs::read_dir("/sys/dev/block").into_iter().flatten().flatten();
        let partitions: Vec<PathBuf> =
            partitions.map(|e| e.path()).filter(|dir| dir.join("partition").exists()).collect();
        if partitions.is_empty() {
            eprintln!("skipped: this host has no partitions");
            return;
        }
        for dir in partitions {
            let part = number_in(&dir).expect("a partition has a number");
            let disk = std::fs::canonicalize(&dir).expect("it is there");
            let disk =
                number_in(disk.parent().expect("it is in its disk's directory")).expect("a number");
            assert!(shares_bytes(part, disk) && shares_bytes(disk, part), "{}", dir.display());
        }
    }
}

//! Scratch directories, and byte patterns that identify their position.

use std::path::{Path, PathBuf};

/// A scratch directory, removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// Makes a directory.
    #[track_caller]
    pub fn new() -> Self {
        let base =
            option_env!("CARGO_TARGET_TMPDIR").map_or_else(std::env::temp_dir, PathBuf::from);
        match tempfile::Builder::new().prefix("bds-").tempdir_in(base) {
            Ok(dir) => Self { dir },
            Err(e) => panic!("no scratch directory: {e}"),
        }
    }

    /// Makes a directory in memory where the machine has one (`/dev/shm`), else as
    /// [`Scratch::new`]. Not for O_DIRECT.
    #[track_caller]
    pub fn in_memory() -> Self {
        match tempfile::Builder::new().prefix("bds-").tempdir_in("/dev/shm") {
            Ok(dir) => Self { dir },
            Err(_) => Self::new(),
        }
    }

    /// The path of `name` in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The path of the directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// Returns `len` bytes that identify their position: every 512-byte sector starts with its seed and
/// number, the rest is a mix of both, so that a misplaced sector is recognised. Never all zeros.
pub fn pattern(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len);
    let mut at = offset;
    while out.len() < len {
        let (sector, within) = (at / 512, at % 512);
        let word = if within < 8 {
            sector
        } else {
            (sector ^ seed.rotate_left(17))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(within / 8)
                | 1
        };
        let byte = word.to_le_bytes()[usize::try_from(at % 8).unwrap_or(0)];
        out.push(if within == 0 { seed.to_le_bytes()[0] | 1 } else { byte });
        at += 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_depends_on_seed_and_place_only() {
        let whole = pattern(7, 0, 4096);
        assert_eq!(pattern(7, 1000, 96), whole[1000..1096]);
        assert_ne!(pattern(8, 0, 512), whole[..512]);
        assert_ne!(whole[..512], whole[512..1024]);
    }
}

//! Access to simulated files for tests: create, inspect, import, export, lock.
//!
//! None of this is I/O of the simulated world: no time passes, nothing is counted, nothing fails.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::Sim;
use super::clock::Event;
use super::crash::{CutMode, survivors};
use super::image::Image;
use super::lock::LockKind;
use super::rng::Rng;
use super::world::{Inode, World, normal};
use crate::file::{ByteLock, FileKind};

/// A byte lock held by another process than the one under test. Dropping it releases.
#[derive(Debug)]
pub struct ForeignLock {
    sim: Sim,
    file: usize,
    owner: u64,
}

impl Drop for ForeignLock {
    fn drop(&mut self) {
        self.sim.world().files[self.file].locks.release(self.owner);
    }
}

impl World {
    /// The file of this name. Panics if there is none: the caller is a test.
    fn named(&self, path: &Path) -> usize {
        match self.names.get(&normal(path)) {
            Some(file) => *file,
            None => panic!("no simulated file {}", path.display()),
        }
    }
}

impl Sim {
    /// Creates or replaces a file, durable at once. Zeros become holes.
    pub fn put_file(&self, path: impl AsRef<Path>, bytes: &[u8]) {
        let path = normal(path.as_ref());
        self.world().add(Inode::new(path, FileKind::Regular, Image::from_bytes(bytes)));
    }

    /// Creates or replaces a block device with this content; its length never changes.
    pub fn put_device(&self, path: impl AsRef<Path>, bytes: &[u8]) {
        let path = normal(path.as_ref());
        self.world().add(Inode::new(path, FileKind::Block, Image::from_bytes(bytes)));
    }

    /// Copies a file of the host into the world, as [`Sim::put_file`] does.
    pub fn import(&self, host_path: impl AsRef<Path>, path: impl AsRef<Path>) -> io::Result<()> {
        self.put_file(path, &fs::read(host_path)?);
        Ok(())
    }

    /// Writes the visible content to a file of the host, sparse where it has holes.
    pub fn export(&self, path: impl AsRef<Path>, host_path: impl AsRef<Path>) -> io::Result<()> {
        let image = {
            let world = self.world();
            world.files[world.named(path.as_ref())].visible.clone()
        };
        let host = fs::File::create(host_path)?;
        host.set_len(image.len())?;
        for (offset, data) in image.data() {
            host.write_all_at(data, offset)?;
        }
        Ok(())
    }

    /// Adds another name for a file.
    pub fn link(&self, path: impl AsRef<Path>, new_path: impl AsRef<Path>) {
        let mut world = self.world();
        let file = world.named(path.as_ref());
        world.link(new_path.as_ref(), file);
    }

    /// The visible content. Panics if there is no such file.
    pub fn snapshot_file(&self, path: impl AsRef<Path>) -> Vec<u8> {
        let world = self.world();
        world.files[world.named(path.as_ref())].visible.to_vec()
    }

    /// The content that survives every power cut now. Panics if there is no such file.
    pub fn durable_file(&self, path: impl AsRef<Path>) -> Vec<u8> {
        let world = self.world();
        let inode = &world.files[world.named(path.as_ref())];
        let sector_len = u64::from(world.config.sector_len);
        survivors(&inode.journal, CutMode::LoseAll, sector_len, &mut Rng::new(0)).to_vec()
    }

    /// True if there is a file of this name.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.world().names.contains_key(&normal(path.as_ref()))
    }

    /// All names, sorted.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.world().names.keys().cloned().collect()
    }

    /// Takes a byte lock as another process would. EAGAIN if it conflicts.
    pub fn lock_elsewhere(
        &self,
        path: impl AsRef<Path>,
        lock: ByteLock,
        kind: LockKind,
    ) -> io::Result<ForeignLock> {
        let mut world = self.world();
        let file = world.named(path.as_ref());
        let owner = world.next_owner;
        world.next_owner += 1;
        if !world.files[file].locks.lock(owner, lock, kind) {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        drop(world);
        Ok(ForeignLock { sim: self.clone(), file, owner })
    }

    /// Cuts the power at a virtual moment.
    pub fn cut_at(&self, moment: std::time::Duration) {
        let at_ns = u64::try_from(moment.as_nanos()).unwrap_or(u64::MAX);
        self.world().clock.push(at_ns, 0, Event::Cut);
    }
}

//! `World`: state of a simulated world: files, names, operations in flight, clock and generator.
//!
//! One lock around all of it; nothing here calls foreign code (wakers and buffers are returned in a
//! [`super::op::Deferred`]).

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path, PathBuf};

use slab::Slab;

use super::SimConfig;
use super::clock::Clock;
use super::fault::{FaultPlan, OpMask};
use super::image::Image;
use super::journal::{Effect, Journal};
use super::lock::LockTable;
use super::op::{NewLen, PendingOp};
use super::rng::Rng;
use super::trace::Trace;
use crate::IoVec;
use crate::file::FileKind;

/// Kinds that are counted one by one: as many as [`OpMask`] has bits.
const KINDS: usize = 10;

/// State of a simulated world, except its tasks.
pub(super) struct World {
    pub config: SimConfig,
    pub rng: Rng,
    pub clock: Clock,
    pub files: Vec<Inode>,
    pub names: BTreeMap<PathBuf, usize>,
    pub ops: Slab<PendingOp>,
    pub faults: FaultPlan,
    pub trace: Trace,
    pub next_op: u64,
    /// Identifies open descriptions as lock owners.
    pub next_owner: u64,
    /// The last number that a file got.
    last_serial: u64,
    pub is_cut: bool,
    pub cut_after_writes: Option<u64>,
    counts: [u64; KINDS],
    allocated_len: u64,
}

/// A file, with or without a name.
pub(super) struct Inode {
    pub path: PathBuf,
    pub kind: FileKind,
    pub visible: Image,
    pub journal: Journal,
    pub locks: LockTable,
    pub links: u32,
    pub descriptions: u32,
    /// Its number, which it keeps over power cuts; 0 before it is added to a world.
    pub serial: u64,
    /// Changes of bytes and length.
    pub changes: u64,
    /// Its name survives a power cut.
    pub is_name_durable: bool,
}

impl Inode {
    /// A file all of which is durable.
    pub(super) fn new(path: PathBuf, kind: FileKind, image: Image) -> Inode {
        Inode {
            path,
            kind,
            journal: Journal::new(image.clone()),
            visible: image,
            locks: LockTable::default(),
            links: 1,
            descriptions: 0,
            serial: 0,
            changes: 0,
            is_name_durable: true,
        }
    }

    /// Fills bytes `from..upto` of `iov` with what is visible now; returns the end of what was
    /// read.
    pub(super) fn read(&self, offset: u64, iov: &IoVec, from: u64, upto: u64) -> u64 {
        let left = self.visible.len().saturating_sub(offset);
        let upto = upto.min(left);
        if from >= upto {
            return from;
        }
        let start = to_index(from);
        self.visible.scan(offset + from..offset + upto, |at, data, len| match data {
            Some(data) => iov.copy_from(start + at, data),
            None => iov.fill(start + at..start + at + len, 0),
        });
        upto
    }

    /// A sync that covers the first `acks` completed operations succeeded.
    pub(super) fn sync_succeeded(&mut self, acks: u64) {
        self.journal.synced(acks);
        self.is_name_durable = true;
    }

    fn perform(&mut self, op: u64, effect: Effect, len: NewLen) {
        self.changes += 1;
        let len_before = self.visible.len();
        let len_after = len.after(len_before);
        effect.apply(&mut self.visible);
        self.visible.set_len(len_after);
        self.journal.record(op, effect, len_before, len_after);
    }
}

/// A byte position as an index into memory.
pub(super) fn to_index(position: u64) -> usize {
    usize::try_from(position).expect("inside a buffer")
}

impl World {
    /// An empty world.
    pub(super) fn new(seed: u64, config: SimConfig) -> World {
        World {
            rng: Rng::new(seed),
            clock: Clock::default(),
            files: Vec::new(),
            names: BTreeMap::new(),
            ops: Slab::new(),
            faults: FaultPlan::new(config.fault_rate, config.fault_ops, config.fault_errno),
            trace: Trace::new(config.trace_len),
            next_op: 0,
            next_owner: 0,
            last_serial: 0,
            is_cut: false,
            cut_after_writes: config.cut_after_writes,
            counts: [0; KINDS],
            allocated_len: 0,
            config,
        }
    }

    /// Counts an operation; true if the power is cut with it.
    pub(super) fn count(&mut self, kind: OpMask) -> bool {
        let is_last = OpMask::CHANGE.contains(kind)
            && self.cut_after_writes == Some(self.counted(OpMask::CHANGE));
        self.counts[bit(kind)] += 1;
        is_last
    }

    /// BlockOps of these kinds so far.
    pub(super) fn counted(&self, kinds: OpMask) -> u64 {
        kinds.iter().map(|kind| self.counts[bit(kind)]).sum()
    }

    /// Adds a file under a name, replacing what had that name.
    pub(super) fn add(&mut self, mut inode: Inode) -> usize {
        if inode.serial == 0 {
            inode.serial = self.last_serial + 1;
        }
        self.last_serial = self.last_serial.max(inode.serial);
        self.allocated_len += inode.visible.allocated_len();
        let path = inode.path.clone();
        self.files.push(inode);
        let file = self.files.len() - 1;
        if let Some(old) = self.names.insert(path, file) {
            self.unlink(old);
        }
        file
    }

    /// Another name for a file.
    pub(super) fn link(&mut self, path: &Path, file: usize) {
        self.files[file].links += 1;
        if let Some(old) = self.names.insert(normal(path), file) {
            self.unlink(old);
        }
    }

    /// Counts an open, remove or lock call, and fails it if a fault matches.
    pub(super) fn admit(&mut self, kind: OpMask, path: &Path) -> io::Result<()> {
        if self.is_cut {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.count(kind);
        match self.faults.decide(kind, path, &mut self.rng) {
            Some(failure) => Err(io::Error::from_raw_os_error(failure.errno)),
            None => Ok(()),
        }
    }

    /// Removes a name of this file.
    pub(super) fn unlink(&mut self, file: usize) {
        self.files[file].links -= 1;
        self.free_if_unused(file);
    }

    /// Frees the space of a file without names and descriptions.
    pub(super) fn free_if_unused(&mut self, file: usize) {
        let inode = &mut self.files[file];
        if inode.links == 0 && inode.descriptions == 0 {
            self.allocated_len -= inode.visible.allocated_len();
            inode.visible = Image::default();
            inode.journal = Journal::new(Image::default());
        }
    }

    /// Writes bytes `from..upto` of `iov`; returns the end of what was written.
    pub(super) fn write(
        &mut self,
        op: u64,
        file: usize,
        offset: u64,
        iov: &IoVec,
        from: u64,
        upto: u64,
    ) -> Result<u64, i32> {
        let mut data = vec![0; to_index(upto - from)];
        iov.copy_to(to_index(from), &mut data);
        let fit = self.put(op, file, offset + from, data)?;
        Ok(from + fit)
    }

    /// Replaces bytes as far as the device and the disk's capacity go.
    fn put(&mut self, op: u64, file: usize, offset: u64, mut data: Vec<u8>) -> Result<u64, i32> {
        if data.is_empty() {
            return Ok(0);
        }
        let free = self.free_bytes();
        let inode = &mut self.files[file];
        let mut range = offset..offset + data.len() as u64;
        if inode.kind == FileKind::Block {
            range.end = range.end.min(inode.visible.len());
        }
        let fit = if range.is_empty() { 0 } else { inode.visible.fits(range, free) };
        if fit == 0 {
            return Err(libc::ENOSPC);
        }
        data.truncate(to_index(fit));
        self.perform(op, file, Effect::Write { offset, data }, NewLen::AtLeast(offset + fit));
        Ok(fit)
    }

    /// Applies a change as a whole, or returns an errno and does nothing.
    pub(super) fn change(
        &mut self,
        op: u64,
        file: usize,
        effect: &Effect,
        len: NewLen,
    ) -> Result<(), i32> {
        if let Effect::Zero { range, allocate: true } | Effect::Allocate { range } = effect {
            let fit = self.files[file].visible.fits(range.clone(), self.free_bytes());
            if fit < range.end - range.start {
                return Err(libc::ENOSPC);
            }
        }
        // Whether the file grows or shrinks is known only now.
        let effect = match (effect, len) {
            (Effect::Grow, NewLen::Exactly(len)) if len < self.files[file].visible.len() => {
                Effect::Cut { len }
            }
            _ => effect.clone(),
        };
        self.perform(op, file, effect, len);
        Ok(())
    }

    /// Copies up to `len` bytes from one place to another; both are (file, offset).
    pub(super) fn copy(
        &mut self,
        op: u64,
        source: (usize, u64),
        target: (usize, u64),
        len: u64,
    ) -> Result<u64, i32> {
        let from = &self.files[source.0].visible;
        let len = len.min(from.len().saturating_sub(source.1));
        let mut data = vec![0; to_index(len)];
        from.read(source.1, &mut data);
        self.put(op, target.0, target.1, data)
    }

    fn perform(&mut self, op: u64, file: usize, effect: Effect, len: NewLen) {
        let inode = &mut self.files[file];
        let before = inode.visible.allocated_len();
        inode.perform(op, effect, len);
        self.allocated_len = self.allocated_len - before + inode.visible.allocated_len();
    }

    fn free_bytes(&self) -> u64 {
        self.config.capacity_bytes.saturating_sub(self.allocated_len)
    }
}

fn bit(kind: OpMask) -> usize {
    kind.bits().trailing_zeros() as usize
}

/// A path with `.` and `..` taken out, so that two spellings of one name agree.
pub(super) fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir
                if matches!(out.components().next_back(), Some(Component::Normal(_))) =>
            {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

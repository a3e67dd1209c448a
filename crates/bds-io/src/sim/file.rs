//! `SimFile`: an open file of a simulated disk, behind [`crate::File`].
//!
//! Checks arguments as Linux does and submits operations to the simulated engine. A description
//! holds its locks until its last clone is dropped.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Sim;
use super::fault::OpMask;
use super::image::Image;
use super::journal::Effect;
use super::lock::LockKind;
use super::op::{NewLen, Request};
use super::world::{Inode, normal};
use crate::IoVec;
use crate::file::{ByteLock, Extent, FileKind, OpenOptions, ZeroMode};

/// Device number that every simulated file reports.
const DEVICE: u64 = 0x51d;
/// No file goes beyond what a signed 64-bit offset can name.
const MAX_LEN: u64 = i64::MAX as u64;

fn errno<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// An open file of a simulated disk.
#[derive(Clone)]
pub(crate) struct SimFile(Arc<Description>);

struct Description {
    sim: Sim,
    file: usize,
    /// Owner of its byte locks.
    owner: u64,
    is_writable: bool,
    is_direct: bool,
}

impl Drop for Description {
    fn drop(&mut self) {
        let mut world = self.sim.world();
        let inode = &mut world.files[self.file];
        inode.locks.release(self.owner);
        inode.descriptions -= 1;
        world.free_if_unused(self.file);
    }
}

impl std::fmt::Debug for SimFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.0.sim.world().files[self.0.file].path.clone();
        f.debug_struct("SimFile").field("path", &path).field("owner", &self.0.owner).finish()
    }
}

impl Sim {
    pub(crate) fn open(&self, path: &Path, options: &OpenOptions) -> io::Result<SimFile> {
        let path = normal(path);
        let mut world = self.world();
        world.admit(OpMask::OPEN, &path)?;
        let may_create = options.create && options.write;
        let file = match world.names.get(&path) {
            Some(_) if may_create && options.exclusive => return errno(libc::EEXIST),
            Some(file) => *file,
            None if !may_create => return errno(libc::ENOENT),
            None => {
                let mut inode = Inode::new(path, FileKind::Regular, Image::default());
                inode.is_name_durable = !world.config.volatile_names;
                world.add(inode)
            }
        };
        let owner = world.next_owner;
        world.next_owner += 1;
        world.files[file].descriptions += 1;
        drop(world);
        Ok(SimFile(Arc::new(Description {
            sim: self.clone(),
            file,
            owner,
            is_writable: options.write,
            is_direct: options.direct,
        })))
    }

    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        let path = normal(path);
        let mut world = self.world();
        world.admit(OpMask::OPEN, &path)?;
        match world.names.remove(&path) {
            Some(file) => world.unlink(file),
            None => return errno(libc::ENOENT),
        }
        Ok(())
    }

    /// Gives a file another name, in one step that is durable at once.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (normal(from), normal(to));
        let mut world = self.world();
        world.admit(OpMask::OPEN, &to)?;
        let Some(file) = world.names.remove(&from) else { return errno(libc::ENOENT) };
        world.files[file].path.clone_from(&to);
        world.files[file].is_name_durable = true;
        match world.names.insert(to, file) {
            Some(old) if old != file => world.unlink(old),
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        let path = normal(path);
        if self.world().names.contains_key(&path) { Ok(path) } else { errno(libc::ENOENT) }
    }
}

impl SimFile {
    fn sim(&self) -> &Sim {
        &self.0.sim
    }

    pub(crate) fn kind(&self) -> FileKind {
        self.sim().world().files[self.0.file].kind
    }

    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        Ok((DEVICE, self.sim().world().files[self.0.file].serial))
    }

    /// Number of changes of bytes and length so far.
    pub(crate) fn changes(&self) -> u64 {
        self.sim().world().files[self.0.file].changes
    }

    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(self.sim().world().files[self.0.file].visible.len())
    }

    pub(crate) fn allocated_len(&self) -> io::Result<u64> {
        Ok(self.sim().world().files[self.0.file].visible.allocated_len())
    }

    pub(crate) fn alignment(&self) -> io::Result<(usize, u32)> {
        Ok(if self.0.is_direct { self.sim().world().config.direct_align } else { (1, 1) })
    }

    pub(crate) fn try_read(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        self.try_inline(offset, iov, |iov| Request::Read { offset, iov, unit: 1 })
    }

    pub(crate) fn try_write(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        if !self.0.is_writable {
            return None;
        }
        self.try_inline(offset, iov, |iov| Request::Write { offset, iov, unit: 1, is_dsync: false })
    }

    /// Succeeds at the configured rate, so that tests cover the inline and the waiting path.
    fn try_inline(
        &self,
        offset: u64,
        iov: &IoVec,
        request: impl FnOnce(IoVec) -> Request,
    ) -> Option<io::Result<usize>> {
        if self.0.is_direct || offset.checked_add(iov.len() as u64).is_none_or(|end| end > MAX_LEN)
        {
            return None;
        }
        let mut world = self.sim().world();
        let rate = world.config.inline_rate;
        if world.is_cut || !world.rng.hit(rate) {
            return None;
        }
        let (result, deferred) = world.run_inline(self.0.file, request(iov.clone()));
        drop(world);
        deferred.finish();
        result.map(|result| to_len(result.map_err(io::Error::from_raw_os_error)))
    }

    pub(crate) async fn read(&self, offset: u64, iov: IoVec) -> io::Result<usize> {
        let refused = self.refusal(offset, &iov);
        let unit = self.unit();
        to_len(self.submit(Request::Read { offset, iov, unit }, refused).await)
    }

    pub(crate) async fn write(&self, offset: u64, iov: IoVec, dsync: bool) -> io::Result<usize> {
        let refused = self.unwritable().or_else(|| self.refusal(offset, &iov));
        let unit = self.unit();
        let request = Request::Write { offset, iov, unit, is_dsync: dsync };
        to_len(self.submit(request, refused).await)
    }

    pub(crate) async fn sync_data(&self) -> io::Result<()> {
        self.submit(Request::Sync, None).await.map(drop)
    }

    pub(crate) async fn zero_range(&self, range: Range<u64>, mode: ZeroMode) -> io::Result<()> {
        let is_device = self.kind() == FileKind::Block;
        let refused = self.unwritable().or_else(|| refuse_range(&range)).or_else(|| {
            let is_outside = is_device && range.end > self.len().unwrap_or(0);
            (is_outside || is_device && mode == ZeroMode::Extend).then_some(libc::EOPNOTSUPP)
        });
        let at_least = NewLen::AtLeast(range.end);
        let (effect, len) = match mode {
            ZeroMode::Allocate => (Effect::Zero { range, allocate: true }, at_least),
            ZeroMode::PunchHole => (Effect::Zero { range, allocate: false }, NewLen::Same),
            ZeroMode::Extend => (Effect::Allocate { range }, at_least),
        };
        self.change(OpMask::ZERO, effect, len, refused).await
    }

    pub(crate) async fn discard_device(&self, range: Range<u64>) -> io::Result<()> {
        self.zero_on_device(range, false).await
    }

    pub(crate) async fn zero_device(&self, range: Range<u64>) -> io::Result<()> {
        self.zero_on_device(range, true).await
    }

    async fn zero_on_device(&self, range: Range<u64>, allocate: bool) -> io::Result<()> {
        let is_device = self.kind() == FileKind::Block;
        let refused = self.unwritable().or((!is_device).then_some(libc::ENOTTY)).or_else(|| {
            let is_bad = range.end > self.len().unwrap_or(0)
                || !range.start.is_multiple_of(512)
                || !range.end.is_multiple_of(512)
                || range.is_empty();
            is_bad.then_some(libc::EINVAL)
        });
        self.change(OpMask::DEVICE, Effect::Zero { range, allocate }, NewLen::Same, refused).await
    }

    pub(crate) async fn set_len(&self, len: u64) -> io::Result<()> {
        let is_bad = self.kind() == FileKind::Block || !self.0.is_writable;
        let refused = is_bad.then_some(libc::EINVAL).or((len > MAX_LEN).then_some(libc::EFBIG));
        self.change(OpMask::SET_LEN, Effect::Grow, NewLen::Exactly(len), refused).await
    }

    async fn change(
        &self,
        kind: OpMask,
        effect: Effect,
        len: NewLen,
        refused: Option<i32>,
    ) -> io::Result<()> {
        self.submit(Request::Change { kind, effect, len }, refused).await.map(drop)
    }

    pub(crate) async fn copy_range_to(
        &self,
        offset: u64,
        target: &SimFile,
        target_offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        let is_one_world = Arc::ptr_eq(&self.sim().0, &target.sim().0);
        if !is_one_world || self.sim().world().config.unsupported.contains(OpMask::COPY) {
            return Ok(0);
        }
        // The kernel caps a call; what it does not do is the caller's next call.
        let len = len.min(64 << 20);
        let is_same = self.0.file == target.0.file;
        let is_overlapping = is_same && offset.abs_diff(target_offset) < len;
        let refused = target
            .unwritable()
            .or_else(|| end_refusal(offset, len))
            .or_else(|| end_refusal(target_offset, len))
            .or(is_overlapping.then_some(libc::EINVAL));
        let request = Request::Copy { source: self.0.file, offset, target_offset, len };
        target.submit(request, refused).await
    }

    pub(crate) fn extent(&self, offset: u64) -> io::Result<Option<Extent>> {
        let mut world = self.sim().world();
        let path = world.files[self.0.file].path.clone();
        world.admit(OpMask::EXTENT, &path)?;
        let image = &world.files[self.0.file].visible;
        if world.config.unsupported.contains(OpMask::EXTENT) {
            let left = image.len().checked_sub(offset).filter(|left| *left > 0);
            return Ok(left.map(|len| Extent { is_data: true, len }));
        }
        Ok(image.extent(offset))
    }

    pub(crate) fn lock_shared(&self, lock: ByteLock) -> io::Result<()> {
        let mut world = self.sim().world();
        let path = world.files[self.0.file].path.clone();
        world.admit(OpMask::LOCK, &path)?;
        let locks = &mut world.files[self.0.file].locks;
        if locks.lock(self.0.owner, lock, LockKind::Shared) { Ok(()) } else { errno(libc::EAGAIN) }
    }

    pub(crate) fn unlock(&self, lock: ByteLock) -> io::Result<()> {
        self.sim().world().files[self.0.file].locks.unlock(self.0.owner, lock);
        Ok(())
    }

    pub(crate) fn is_locked_by_others(&self, lock: ByteLock) -> io::Result<bool> {
        let world = self.sim().world();
        let locks = &world.files[self.0.file].locks;
        Ok(locks.conflicts(self.0.owner, lock, LockKind::Exclusive))
    }

    fn submit(
        &self,
        request: Request,
        refused: Option<i32>,
    ) -> impl Future<Output = io::Result<u64>> + Send + 'static {
        self.sim().submit(self.0.file, request, refused)
    }

    fn unwritable(&self) -> Option<i32> {
        (!self.0.is_writable).then_some(libc::EBADF)
    }

    fn unit(&self) -> u64 {
        if self.0.is_direct { u64::from(self.sim().world().config.direct_align.1) } else { 1 }
    }

    /// The errno Linux would refuse this transfer with.
    fn refusal(&self, offset: u64, iov: &IoVec) -> Option<i32> {
        let len = iov.len() as u64;
        if self.0.is_direct {
            let (memory, unit) = self.sim().world().config.direct_align;
            let unit = u64::from(unit);
            let is_skew = |segment: &crate::buf::Segment| {
                !segment.as_ptr().addr().is_multiple_of(memory)
                    || !(segment.len() as u64).is_multiple_of(unit)
            };
            if !offset.is_multiple_of(unit) || iov.segments().iter().any(is_skew) {
                return Some(libc::EINVAL);
            }
        }
        end_refusal(offset, len)
    }
}

fn end_refusal(offset: u64, len: u64) -> Option<i32> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_LEN => None,
        _ => Some(libc::EINVAL),
    }
}

fn refuse_range(range: &Range<u64>) -> Option<i32> {
    if range.is_empty() { Some(libc::EINVAL) } else { (range.end > MAX_LEN).then_some(libc::EFBIG) }
}

fn to_len(result: io::Result<u64>) -> io::Result<usize> {
    result.map(|len| usize::try_from(len).expect("no longer than the buffer"))
}

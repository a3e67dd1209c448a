//! Blocking requests: all or nothing, on the calling thread.

use std::sync::Arc;

use bds_core::driver::{Prealloc, Truncate};
use bds_io::IoVec;

use crate::abi::bds_status::{BDS_ERR_OPTION, BDS_OK};
use crate::abi::{BDS_RESIZE_SHRINK, bds_backend, bds_extent, bds_node};
use crate::backend::{self, BackendShared};
use crate::context::{check_flags, check_same};
use crate::entry::entry;
use crate::extents::{Question, describe};
use crate::failure::Failure;
use crate::lease::Lease;
use crate::ptr::{Array, Out, Segments, Sink, Source, Text};
use crate::request::{self, Operation};

/// Runs an operation on memory of C's, and returns when neither it nor what it began uses the
/// memory any more.
fn run(
    backend: bds_backend,
    operation: Operation,
    iov: impl FnOnce(Arc<Lease>) -> Result<IoVec, Failure>,
) -> Result<i32, Failure> {
    let object = backend::find(backend, "backend")?;
    let (lease, end) = Lease::new();
    let iov = iov(lease)?;
    if let Some(result) = operation.try_now(&object.shared, &iov) {
        result?;
        return Ok(BDS_OK as i32);
    }
    bds_io::block_on(async {
        let result = operation.run(&object.shared, iov).await;
        end.wait().await;
        result
    })?;
    Ok(BDS_OK as i32)
}

/// As `run`, without memory.
fn run_bare(backend: bds_backend, operation: Operation) -> Result<i32, Failure> {
    let object = backend::find(backend, "backend")?;
    bds_io::block_on(operation.run(&object.shared, IoVec::new()))?;
    Ok(BDS_OK as i32)
}

fn gather(segments: Segments, count: usize, lease: &Arc<Lease>) -> Result<IoVec, Failure> {
    let count = u64::try_from(count).unwrap_or(u64::MAX);
    segments
        .read(count)?
        .into_iter()
        .map(|(sink, len)| sink.iov(len, Arc::clone(lease) as bds_io::buf::Anchor))
        .collect()
}

/// Reads `bytes` bytes at `offset` into `buf`. [io]
///
/// `flags` must be 0.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_VERSION, BDS_ERR_POISONED;
/// -ENOMEDIUM, BDS_ERR_RANGE, BDS_ERR_PERMISSION, BDS_ERR_CANCELLED (the context was shut down),
/// BDS_ERR_CORRUPT, -EIO and other errnos of the system. The buffer may be partly filled.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_pread(
    backend: bds_backend,
    buf: Sink,
    bytes: usize,
    offset: u64,
    flags: u32,
) -> i32 {
    entry("bds_pread", || {
        check_flags(flags, 0)?;
        run(backend, Operation::Read { offset }, |lease| buf.iov(bytes, lease))
    })
}

/// Writes `bytes` bytes of `buf` at `offset`. [io]
///
/// `flags`: BDS_REQ_FUA, BDS_REQ_NO_WAIT, BDS_REQ_SERIALISING, or BDS_REQ_COMPRESSED alone. Without
/// BDS_REQ_FUA, bds_flush makes it durable.
///
/// Errors: as bds_pread; BDS_ERR_READ_ONLY, BDS_ERR_INACTIVE; -ENOSPC; -EAGAIN with
/// BDS_REQ_NO_WAIT. After an error the range has old or new bytes.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_pwrite(
    backend: bds_backend,
    buf: Source,
    bytes: usize,
    offset: u64,
    flags: u32,
) -> i32 {
    entry("bds_pwrite", || {
        run(backend, request::write(offset, flags)?, |lease| buf.iov(bytes, lease))
    })
}

/// As bds_pread, into at most 1024 segments. [io]
///
/// Errors: as bds_pread.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_preadv(
    backend: bds_backend,
    iov: Segments,
    iovcnt: usize,
    offset: u64,
    flags: u32,
) -> i32 {
    entry("bds_preadv", || {
        check_flags(flags, 0)?;
        run(backend, Operation::Read { offset }, |lease| gather(iov, iovcnt, &lease))
    })
}

/// As bds_pwrite, of at most 1024 segments. [io]
///
/// Errors: as bds_pwrite.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_pwritev(
    backend: bds_backend,
    iov: Segments,
    iovcnt: usize,
    offset: u64,
    flags: u32,
) -> i32 {
    entry("bds_pwritev", || {
        let operation = request::write(offset, flags)?;
        run(backend, operation, |lease| gather(iov, iovcnt, &lease))
    })
}

/// Makes every write durable that completed before. [io]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_POISONED, -ENOMEDIUM, BDS_ERR_CANCELLED; -EIO,
/// -ENOSPC: data written earlier may be lost.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_flush(backend: bds_backend) -> i32 {
    entry("bds_flush", || run_bare(backend, Operation::Flush))
}

/// Discards a range that is no longer needed; advisory. [io]
///
/// Ignored unless the node was opened with `discard=unmap` (BDS_OPEN_UNMAP). `flags` must be 0.
///
/// Errors: as bds_pwrite.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_discard(backend: bds_backend, offset: u64, bytes: u64, flags: u32) -> i32 {
    entry("bds_discard", || {
        check_flags(flags, 0)?;
        run_bare(backend, Operation::Discard { offset, len: bytes })
    })
}

/// Makes a range read as zeros. [io]
///
/// `flags`: BDS_REQ_FUA, BDS_REQ_MAY_UNMAP, BDS_REQ_NO_FALLBACK, BDS_REQ_NO_WAIT.
///
/// Errors: as bds_pwrite; BDS_ERR_UNSUPPORTED with BDS_REQ_NO_FALLBACK: bytes would have to be
/// written.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_write_zeroes(
    backend: bds_backend,
    offset: u64,
    bytes: u64,
    flags: u32,
) -> i32 {
    entry("bds_write_zeroes", || run_bare(backend, request::write_zeroes(offset, bytes, flags)?))
}

/// Copies a range from one backend to another on the host (reflink, copy offload). [io]
///
/// `flags` must be 0.
///
/// Errors: as bds_pwrite; BDS_ERR_ARGUMENT: different contexts; BDS_ERR_UNSUPPORTED: read and
/// write it instead; part of the bytes may have been copied.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_copy_range(
    source: bds_backend,
    source_offset: u64,
    target: bds_backend,
    target_offset: u64,
    bytes: u64,
    flags: u32,
) -> i32 {
    entry("bds_copy_range", || {
        check_flags(flags, 0)?;
        let target = target_of(source, target)?;
        let operation =
            Operation::CopyRange { offset: source_offset, len: bytes, target, target_offset };
        run_bare(source, operation)
    })
}

/// The target of a copy, in the same context as the source.
pub(crate) fn target_of(
    source: bds_backend,
    target: bds_backend,
) -> Result<Arc<BackendShared>, Failure> {
    let source = backend::find(source, "source")?;
    let target = backend::find(target, "target")?;
    check_same(&source.shared.context, &target.shared.context)?;
    Ok(Arc::clone(&target.shared))
}

/// Changes the length of the medium. New bytes read as zeros. [io]
///
/// `preallocation`: "off", "metadata", "falloc", "full"; NULL: "off". A shorter length takes
/// BDS_RESIZE_SHRINK in `flags`, because it destroys data.
///
/// Errors: as bds_pwrite; BDS_ERR_OPTION: shorter without the flag, or an unknown preallocation;
/// BDS_ERR_IN_USE: resizing is blocked; BDS_ERR_UNSUPPORTED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_resize(
    backend: bds_backend,
    bytes: u64,
    preallocation: Text,
    flags: u32,
) -> i32 {
    entry("bds_resize", || {
        check_flags(flags, BDS_RESIZE_SHRINK)?;
        let word = preallocation.optional("preallocation")?.unwrap_or("off");
        let unknown = || Failure::new(BDS_ERR_OPTION, format!("unknown preallocation '{word}'"));
        let prealloc = Prealloc::parse(word).ok_or_else(unknown)?;
        let object = backend::find(backend, "backend")?;
        if bytes < object.backend().len() && flags & BDS_RESIZE_SHRINK == 0 {
            let words = "the image would lose data at its end; pass BDS_RESIZE_SHRINK if it may";
            return Err(Failure::new(BDS_ERR_OPTION, words));
        }
        let change = Truncate { prealloc, zero_new: true, ..Truncate::to(bytes) };
        bds_io::block_on(object.backend().truncate(change))?;
        Ok(0)
    })
}

/// Describes a range as runs of bytes of one kind: data, zeros, which layer decides. [io]
///
/// Fills at most `capacity` extents; `count_out` gets how many. They are contiguous, from `offset`
/// on; if they end before `offset` + `bytes`, call again from there. `base`: only the layers above
/// this node are asked, and a run without BDS_EXTENT_ALLOCATED is decided by none of them; 0: all.
///
/// Errors: as bds_pread.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_block_status(
    backend: bds_backend,
    base: bds_node,
    offset: u64,
    bytes: u64,
    extents: Array<bds_extent>,
    capacity: usize,
    count_out: Out<usize>,
) -> i32 {
    entry("bds_block_status", || {
        let out = count_out.check("count_out")?;
        let extents = extents.check(capacity, "extents")?;
        let object = backend::find(backend, "backend")?;
        let base = request::base(&object.shared.context, base)?;
        let question = Question { offset, len: bytes, base, capacity: extents.len() };
        let give = |index, extent| extents.write(index, extent);
        let count = bds_io::block_on(describe(object.backend(), question, give))?;
        out.set(count);
        Ok(0)
    })
}

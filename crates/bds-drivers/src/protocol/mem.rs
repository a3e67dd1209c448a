//! The `mem` protocol: a sparse disk in memory, lost when its node is closed.
//!
//! For tests and scratch images. Pages are allocated as they are written; zero writes and discards
//! free whole pages. The node's memory is bounded by its length (`size`, bytes).

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use bds_core::driver::{
    Attempt, BoxFuture, Category, Driver, DriverType, HostMap, OpenContext, Precision, ReadFlags,
    Reopen, ReopenContext, StatusFlags, StatusRun, Truncate, WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

/// The `mem` protocol.
#[derive(Clone, Copy, Debug)]
pub struct Mem;

const OPEN_OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "size",
    kind: OptionKind::Size,
    help: "length of the disk in bytes",
    default: Some("0"),
}];

const PAGE_BYTES: usize = 4096;
/// The largest length that any node can have.
const MAX_SIZE_BYTES: u64 = (1 << 63) - (1 << 30);

type Page = Box<[u8; PAGE_BYTES]>;

#[derive(Default)]
struct MemNode {
    /// Pages by number; a missing page reads as zeros. Held only while one request copies its
    /// bytes.
    pages: RwLock<BTreeMap<u64, Page>>,
    len: AtomicU64,
}

/// A prepared reopen: the new length holds from the commit on.
struct PreparedGrowth<'a>(&'a MemNode, u64);

impl Reopen for PreparedGrowth<'_> {
    fn commit(self: Box<Self>) {
        self.0.len.fetch_max(self.1, Ordering::Relaxed);
    }
}

/// The part of one request that lies in one page.
struct Piece {
    page: u64,
    within: Range<usize>,
    iov_offset: usize,
}

#[expect(clippy::cast_possible_truncation, reason = "the remainder of a page fits into usize")]
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < len).then(|| {
            let at = offset + done as u64;
            let begin = (at % PAGE_BYTES as u64) as usize;
            let take = (PAGE_BYTES - begin).min(len - done);
            let piece = Piece {
                page: at / PAGE_BYTES as u64,
                within: begin..begin + take,
                iov_offset: done,
            };
            done += take;
            piece
        })
    })
}

impl MemNode {
    fn load(&self, offset: u64, iov: &IoVec) {
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        for piece in pieces(offset, iov.len()) {
            match pages.get(&piece.page) {
                Some(page) => iov.copy_from(piece.iov_offset, &page[piece.within]),
                None => iov.fill(piece.iov_offset..piece.iov_offset + piece.within.len(), 0),
            }
        }
    }

    fn store(&self, offset: u64, iov: &IoVec) -> Result<()> {
        let end = self.end(offset, iov.len() as u64)?;
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        for piece in pieces(offset, iov.len()) {
            let page = pages.entry(piece.page).or_insert_with(|| Box::new([0; PAGE_BYTES]));
            iov.copy_to(piece.iov_offset, &mut page[piece.within]);
        }
        self.len.fetch_max(end, Ordering::Relaxed);
        Ok(())
    }

    fn end(&self, offset: u64, len: u64) -> Result<u64> {
        offset.checked_add(len).filter(|end| *end <= MAX_SIZE_BYTES).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, "the request is out of reach").at(offset)
        })
    }

    /// Clears `range`: frees whole pages, zeroes partial ones.
    fn clear(&self, range: Range<u64>) {
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        let size = PAGE_BYTES as u64;
        let touched = range.start / size..range.end.div_ceil(size);
        let present: Vec<u64> = pages.range(touched).map(|(number, _)| *number).collect();
        for number in present {
            let begin = number * size;
            let from = range.start.max(begin) - begin;
            let to = range.end.min(begin + size) - begin;
            if to - from == size {
                pages.remove(&number);
            } else if let Some(page) = pages.get_mut(&number) {
                for byte in page.iter_mut().take(within_page(to)).skip(within_page(from)) {
                    *byte = 0;
                }
            }
        }
    }

    fn status(&self, offset: u64, len: u64) -> StatusRun {
        let end = self.len.load(Ordering::Relaxed);
        if offset >= end {
            return StatusRun { len: 0, flags: StatusFlags::EOF, map: None };
        }
        let asked_end = offset.saturating_add(len).min(end);
        let size = PAGE_BYTES as u64;
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        let first = offset / size;
        let is_data = pages.contains_key(&first);
        let run_end = if is_data {
            let mut next = first + 1;
            while next * size < asked_end && pages.contains_key(&next) {
                next += 1;
            }
            next * size
        } else {
            pages.range(first..).next().map_or(asked_end, |(number, _)| number * size)
        };
        let run_end = run_end.min(asked_end);
        let content = if is_data { StatusFlags::DATA } else { StatusFlags::ZERO };
        let mut flags = content | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
        if run_end == end {
            flags |= StatusFlags::EOF;
        }
        StatusRun { len: run_end - offset, flags, map: Some(HostMap { child: "", offset }) }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "callers pass at most a page")]
fn within_page(offset: u64) -> usize {
    offset.min(PAGE_BYTES as u64) as usize
}

impl Driver for MemNode {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::FUA
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::FUA | ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK)
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.load(offset, iov);
        Some(Ok(()))
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        Some(self.store(offset, iov))
    }

    fn read(&self, offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        self.load(offset, &iov);
        Box::pin(async { Ok(()) })
    }

    fn write(&self, offset: u64, iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        let outcome = self.store(offset, &iov);
        Box::pin(async move { outcome })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        let outcome = self.end(offset, len).map(|end| {
            self.clear(offset..end);
            self.len.fetch_max(end, Ordering::Relaxed);
            Attempt::Done
        });
        Box::pin(async move { outcome })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        let outcome = self.end(offset, len).map(|end| {
            self.clear(offset..end);
            Attempt::Done
        });
        Box::pin(async move { outcome })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let run = self.status(offset, len);
        Box::pin(async move { Ok(run) })
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        let outcome = self.end(change.len, 0).map(|len| {
            let old_len = self.len.swap(len, Ordering::Relaxed);
            if len < old_len {
                self.clear(len..old_len);
            }
        });
        Box::pin(async move { outcome })
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        let count = self.pages.read().unwrap_or_else(PoisonError::into_inner).len();
        Box::pin(async move { Ok(Some(count as u64 * PAGE_BYTES as u64)) })
    }

    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(async move {
            let len = self.len();
            let size = take_size(&mut context.options)?.unwrap_or(len);
            if size < len {
                return Err(Error::new(
                    ErrorKind::NotSupported,
                    "a smaller 'size' would lose what lies behind it; resize the disk instead",
                )
                .field("size", size));
            }
            Ok(Box::new(PreparedGrowth(self, size)) as Box<dyn Reopen>)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DriverType for Mem {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn category(&self) -> Category {
        Category::Protocol
    }

    fn help(&self) -> &'static str {
        "a disk in memory, gone when it is closed"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let size = take_size(&mut context.options)?.unwrap_or(0);
            let node = MemNode { len: AtomicU64::new(size), ..MemNode::default() };
            Ok(Box::new(node) as Box<dyn Driver>)
        })
    }
}

fn take_size(options: &mut Options) -> Result<Option<u64>> {
    match options.take_size("size")? {
        Some(size) if size > MAX_SIZE_BYTES => {
            Err(Error::new(ErrorKind::InvalidInput, "option 'size' is too large")
                .field("size", size))
        }
        size => Ok(size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_cut_at_pages() {
        let cut: Vec<_> = pieces(4090, 4110)
            .map(|p| (p.page, p.within.start, p.within.end, p.iov_offset))
            .collect();
        assert_eq!(cut, [(0, 4090, 4096, 0), (1, 0, 4096, 6), (2, 0, 8, 4102)]);
    }
}

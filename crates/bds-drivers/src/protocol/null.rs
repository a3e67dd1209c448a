//! `null-co` and `null-aio`: a disk that swallows writes and reads as anything, or as zeros.
//!
//! For measuring everything above it. Both names are the same driver here; QEMU's differ only in the kind of
//! completion. Reads leave the buffer as it is unless `read-zeroes` is on.

use std::any::Any;
use std::time::Duration;

use bds_core::driver::{
    Attempt, BoxFuture, Category, Driver, DriverType, HostMap, OpenContext, ReadFlags, StatusFlags,
    StatusRun, WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

/// `null-co` or `null-aio`.
#[derive(Clone, Copy, Debug)]
pub struct Null {
    name: &'static str,
}

impl Null {
    /// The driver `null-co`.
    pub const CO: Self = Self { name: "null-co" };
    /// The driver `null-aio`.
    pub const AIO: Self = Self { name: "null-aio" };
}

const DEFAULT_SIZE_BYTES: u64 = 1 << 30;
/// Same ceiling as any node's length.
const MAX_SIZE_BYTES: u64 = (1 << 63) - (1 << 30);

const OPEN_OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        help: "size of the null block device",
        default: Some("1G"),
    },
    OptionSpec {
        name: "latency-ns",
        kind: OptionKind::Number,
        help: "emulated latency of a request in nanoseconds",
        default: Some("0"),
    },
    OptionSpec {
        name: "read-zeroes",
        kind: OptionKind::Bool,
        help: "return zeros when read",
        default: Some("off"),
    },
];

struct NullNode {
    name: &'static str,
    size: u64,
    latency: Duration,
    read_zeroes: bool,
}

impl NullNode {
    async fn wait(&self) {
        if !self.latency.is_zero() {
            bds_io::sleep(self.latency).await;
        }
    }

    fn answer(&self, iov: &IoVec) {
        if self.read_zeroes {
            iov.fill(0..iov.len(), 0);
        }
    }
}

impl Driver for NullNode {
    fn name(&self) -> &'static str {
        self.name
    }

    fn len(&self) -> u64 {
        self.size
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::FUA
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::FUA | ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK)
    }

    fn try_read(&self, _offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.latency.is_zero().then(|| {
            self.answer(iov);
            Ok(())
        })
    }

    fn try_write(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        self.latency.is_zero().then_some(Ok(()))
    }

    fn read(&self, _offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.wait().await;
            self.answer(&iov);
            Ok(())
        })
    }

    fn write(&self, _offset: u64, _iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.wait().await;
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            self.wait().await;
            Ok(Attempt::Done)
        })
    }

    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Done) })
    }

    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.wait().await;
            Ok(())
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _precise: bool,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let len = len.min(self.size.saturating_sub(offset));
        let mut flags = StatusFlags::OFFSET_VALID | StatusFlags::ALLOCATED;
        flags |= if self.read_zeroes { StatusFlags::ZERO } else { StatusFlags::DATA };
        if offset.saturating_add(len) >= self.size {
            flags |= StatusFlags::EOF;
        }
        let run = StatusRun { len, flags, map: Some(HostMap { child: "", offset }) };
        Box::pin(async move { Ok(run) })
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async { Ok(Some(0)) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DriverType for Null {
    fn name(&self) -> &'static str {
        self.name
    }

    fn category(&self) -> Category {
        Category::Protocol
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let options = &mut context.options;
            let size = options.take_size("size")?.unwrap_or(DEFAULT_SIZE_BYTES);
            if size > MAX_SIZE_BYTES {
                return Err(Error::new(ErrorKind::InvalidInput, "option 'size' is too large")
                    .field("size", size));
            }
            let latency = Duration::from_nanos(options.take_u64("latency-ns")?.unwrap_or(0));
            let read_zeroes = options.take_bool("read-zeroes")?.unwrap_or(false);
            let node = NullNode { name: self.name, size, latency, read_zeroes };
            Ok(Box::new(node) as Box<dyn Driver>)
        })
    }
}

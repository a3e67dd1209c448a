//! The `null-co` and `null-aio` protocols: discard writes, and read zeros or leave the buffer as it
//! is.
//!
//! For measuring the layers above. Both names are the same driver here; QEMU's differ only in the
//! kind of completion. Reads leave the buffer unchanged unless `read-zeroes` is on. Options: `size`
//! in bytes, `latency-ns` in nanoseconds.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bds_core::driver::{
    Attempt, BoxFuture, Category, Driver, DriverType, HostMap, OpenContext, Precision, ReadFlags,
    Reopen, ReopenContext, StatusFlags, StatusRun, WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

/// The `null-co` or `null-aio` protocol.
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
/// The largest length that any node can have.
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

/// Values of the options.
#[derive(Clone, Copy)]
struct Settings {
    size: u64,
    latency_ns: u64,
    read_zeroes: bool,
}

impl Settings {
    const DEFAULT: Self = Self { size: DEFAULT_SIZE_BYTES, latency_ns: 0, read_zeroes: false };

    /// Takes options; an option that is missing keeps its value.
    fn take(self, options: &mut Options) -> Result<Self> {
        let size = options.take_size("size")?.unwrap_or(self.size);
        if size > MAX_SIZE_BYTES {
            return Err(Error::new(ErrorKind::InvalidInput, "option 'size' is too large")
                .field("size", size));
        }
        let latency_ns = options.take_u64("latency-ns")?.unwrap_or(self.latency_ns);
        let read_zeroes = options.take_bool("read-zeroes")?.unwrap_or(self.read_zeroes);
        Ok(Self { size, latency_ns, read_zeroes })
    }
}

/// An open null disk. A reopen changes the settings while no request is in flight.
struct NullNode {
    name: &'static str,
    size: AtomicU64,
    latency_ns: AtomicU64,
    read_zeroes: AtomicBool,
}

struct Prepared<'a>(&'a NullNode, Settings);

impl Reopen for Prepared<'_> {
    fn commit(self: Box<Self>) {
        let Self(node, Settings { size, latency_ns, read_zeroes }) = *self;
        node.size.store(size, Ordering::Release);
        node.latency_ns.store(latency_ns, Ordering::Release);
        node.read_zeroes.store(read_zeroes, Ordering::Release);
    }
}

impl NullNode {
    fn settings(&self) -> Settings {
        Settings {
            size: self.size.load(Ordering::Acquire),
            latency_ns: self.latency_ns.load(Ordering::Acquire),
            read_zeroes: self.read_zeroes.load(Ordering::Acquire),
        }
    }

    fn is_instant(&self) -> bool {
        self.latency_ns.load(Ordering::Relaxed) == 0
    }

    async fn wait(&self) {
        if !self.is_instant() {
            bds_io::sleep(Duration::from_nanos(self.settings().latency_ns)).await;
        }
    }

    fn answer(&self, iov: &IoVec) {
        if self.read_zeroes.load(Ordering::Relaxed) {
            iov.fill(0..iov.len(), 0);
        }
    }
}

impl Driver for NullNode {
    fn name(&self) -> &'static str {
        self.name
    }

    fn len(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::FUA
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::FUA | ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK)
    }

    fn try_read(&self, _offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.is_instant().then(|| {
            self.answer(iov);
            Ok(())
        })
    }

    fn try_write(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        self.is_instant().then_some(Ok(()))
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
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let Settings { size, read_zeroes, .. } = self.settings();
        let len = len.min(size.saturating_sub(offset));
        let mut flags = StatusFlags::OFFSET_VALID | StatusFlags::ALLOCATED;
        flags |= if read_zeroes { StatusFlags::ZERO } else { StatusFlags::DATA };
        if offset.saturating_add(len) >= size {
            flags |= StatusFlags::EOF;
        }
        let run = StatusRun { len, flags, map: Some(HostMap { child: "", offset }) };
        Box::pin(async move { Ok(run) })
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async { Ok(Some(0)) })
    }

    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(async move {
            let settings = self.settings().take(&mut context.options)?;
            Ok(Box::new(Prepared(self, settings)) as Box<dyn Reopen>)
        })
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

    fn help(&self) -> &'static str {
        "discards what is written and reads as zeros or not at all, for measurements"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let settings = Settings::DEFAULT.take(&mut context.options)?;
            let node = NullNode {
                name: self.name,
                size: AtomicU64::new(settings.size),
                latency_ns: AtomicU64::new(settings.latency_ns),
                read_zeroes: AtomicBool::new(settings.read_zeroes),
            };
            Ok(Box::new(node) as Box<dyn Driver>)
        })
    }
}

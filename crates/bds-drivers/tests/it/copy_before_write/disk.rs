//! A disk in memory whose writes a test delays, holds or fails.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_core::driver::{
    Attempt, BoxFuture, Category, Driver, DriverType, OpenContext, Precision, ReadFlags,
    StatusFlags, StatusRun, WriteFlags, ZeroFlags,
};
use bds_core::options::OptionSpec;
use bds_core::{Error, Result};
use bds_io::IoVec;
use bds_io::sync::Notify;

/// What the test controls.
#[derive(Default)]
pub(super) struct Control {
    pub(super) bytes: Mutex<Vec<u8>>,
    /// Writes wait.
    is_held: AtomicBool,
    released: Notify,
    /// Writes fail with this errno; 0: they do not.
    pub(super) errno: AtomicU64,
    /// Reads fail with this errno; 0: they do not.
    pub(super) read_errno: AtomicU64,
    /// Virtual time of a write in microseconds.
    pub(super) delay_us: AtomicU64,
    pub(super) writes: AtomicU64,
}

impl Control {
    pub(super) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), ..Self::default() })
    }

    pub(super) fn hold(&self) {
        self.is_held.store(true, Ordering::SeqCst);
    }

    pub(super) fn release(&self) {
        self.is_held.store(false, Ordering::SeqCst);
        self.released.notify_waiters();
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    async fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        let delay = self.delay_us.load(Ordering::SeqCst);
        if delay != 0 {
            bds_io::sleep(Duration::from_micros(delay)).await;
        }
        self.released.wait_until(|| !self.is_held.load(Ordering::SeqCst)).await;
        let errno = self.errno.load(Ordering::SeqCst);
        if errno != 0 {
            let errno = std::io::Error::from_raw_os_error(errno as i32);
            return Err(Error::io(errno, "injected"));
        }
        self.bytes.lock().unwrap()[offset as usize..offset as usize + data.len()]
            .copy_from_slice(data);
        Ok(())
    }
}

/// Opens a node on a control.
pub(super) struct ControlledType(pub(super) Arc<Control>);

struct ControlledDisk(Arc<Control>);

impl Driver for ControlledDisk {
    fn name(&self) -> &'static str {
        "controlled"
    }

    fn len(&self) -> u64 {
        self.0.bytes.lock().unwrap().len() as u64
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::MAY_UNMAP)
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let is_plain = self.0.delay_us.load(Ordering::SeqCst) == 0
            && self.0.errno.load(Ordering::SeqCst) == 0
            && !self.0.is_held.load(Ordering::SeqCst);
        if !is_plain {
            return None;
        }
        let data = iov.to_vec(0..iov.len());
        let at = offset as usize;
        self.0.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(&data);
        Some(Ok(()))
    }

    fn read(&self, offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            bds_io::yield_now().await;
            let errno = self.0.read_errno.load(Ordering::SeqCst);
            if errno != 0 {
                let errno = std::io::Error::from_raw_os_error(errno as i32);
                return Err(Error::io(errno, "injected"));
            }
            let at = offset as usize;
            iov.copy_from(0, &self.0.bytes.lock().unwrap()[at..at + iov.len()]);
            bds_io::yield_now().await;
            Ok(())
        })
    }

    fn write(&self, offset: u64, iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.0.write(offset, &iov.to_vec(0..iov.len())).await })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            self.0.write(offset, &vec![0; len as usize]).await?;
            Ok(Attempt::Done)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        // What was discarded reads as anything.
        Box::pin(async move {
            self.0.write(offset, &vec![0xDD; len as usize]).await?;
            Ok(Attempt::Done)
        })
    }

    fn block_status(
        &self,
        _offset: u64,
        len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::DATA, map: None }) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DriverType for ControlledType {
    fn name(&self) -> &'static str {
        "controlled"
    }

    fn category(&self) -> Category {
        Category::Protocol
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        &[]
    }

    fn open<'a>(
        &'a self,
        _context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        let node: Box<dyn Driver> = Box::new(ControlledDisk(self.0.clone()));
        Box::pin(async move { Ok(node) })
    }
}

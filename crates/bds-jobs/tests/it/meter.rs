//! A target on a file of the simulated disk that counts what is written, and can fail.
#![allow(clippy::unwrap_used, reason = "tests: a panic is their way to fail")]

use std::any::Any;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_core::driver::{
    Attempt, BoxFuture, Category, Driver, DriverType, OpenContext, Precision, ReadFlags,
    StatusFlags, StatusRun, WriteFlags, ZeroFlags,
};
use bds_core::options::OptionSpec;
use bds_core::{Error, Result};
use bds_io::{File, IoVec, OpenOptions, Sim};

/// Virtual time of a write: about that of a flush, as on a real disk a flush takes as long as the
/// writes of some megabytes.
const WRITE_TIME: Duration = Duration::from_millis(2);

/// What the test reads and sets.
#[derive(Debug)]
pub(crate) struct Meter {
    file: File,
    path: PathBuf,
    pub(crate) written: AtomicU64,
    pub(crate) read: AtomicU64,
    /// Writes and flushes fail.
    pub(crate) fails: AtomicBool,
    /// What the disk does with a write that begins at this byte.
    lies: Mutex<Option<(u64, Lie)>>,
}

/// A fault of a disk that reports success.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lie {
    /// Writes nothing.
    Lost,
    /// Writes to this place instead.
    Misdirected(u64),
    /// Flips a bit of the byte at this distance.
    Flipped(usize),
}

impl Meter {
    pub(crate) fn new(sim: &Sim, path: &str) -> Arc<Self> {
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        Arc::new(Self {
            file: sim.fs().open(path.as_ref(), &options).unwrap(),
            path: path.into(),
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
            fails: AtomicBool::new(false),
            lies: Mutex::new(None),
        })
    }

    /// The next write that begins at this byte goes wrong.
    pub(crate) fn lie_at(&self, offset: u64, lie: Lie) {
        *self.lies.lock().unwrap() = Some((offset, lie));
    }

    /// The lie about this write, once.
    fn take_lie(&self, offset: u64) -> Option<Lie> {
        let mut lies = self.lies.lock().unwrap();
        lies.take_if(|(at, _)| *at == offset).map(|(_, lie)| lie)
    }

    /// Writes as a disk that may lie.
    async fn write(&self, offset: u64, iov: IoVec) -> Result<()> {
        match self.take_lie(offset) {
            None => self.transfer(offset, iov, true).await,
            Some(Lie::Lost) => Ok(()),
            Some(Lie::Misdirected(to)) => self.transfer(to, iov, true).await,
            Some(Lie::Flipped(at)) => {
                let mut bytes = iov.to_vec(0..iov.len());
                bytes[at] ^= 4;
                self.transfer(offset, bytes.into(), true).await
            }
        }
    }

    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    pub(crate) fn read(&self) -> u64 {
        self.read.load(Ordering::SeqCst)
    }

    async fn transfer(&self, offset: u64, iov: IoVec, is_write: bool) -> Result<()> {
        let mut done = 0;
        while done < iov.len() {
            if is_write && self.fails.load(Ordering::SeqCst) {
                return Err(failure());
            }
            let rest = iov.slice(done..iov.len());
            let count = match is_write {
                true => self.file.write(offset + done as u64, rest, false).await,
                false => self.file.read(offset + done as u64, rest).await,
            };
            let count = count.map_err(|error| Error::io(error, "transfer"))?;
            assert_ne!(count, 0);
            done += count;
        }
        if is_write {
            bds_io::sleep(WRITE_TIME).await;
        }
        let total = if is_write { &self.written } else { &self.read };
        total.fetch_add(iov.len() as u64, Ordering::SeqCst);
        Ok(())
    }
}

fn failure() -> Error {
    Error::io(std::io::Error::from_raw_os_error(libc::EIO), "injected")
}

/// Opens a node on a meter.
pub(crate) struct MeteredType(pub(super) Arc<Meter>);

struct Metered(Arc<Meter>);

impl Driver for Metered {
    fn name(&self) -> &'static str {
        "metered"
    }

    fn len(&self) -> u64 {
        self.0.file.len().unwrap()
    }

    fn filename(&self) -> Option<PathBuf> {
        Some(self.0.path.clone())
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.0.file.identity().ok()
    }

    fn read(&self, offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.0.transfer(offset, iov, false))
    }

    fn write(&self, offset: u64, iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.0.write(offset, iov))
    }

    fn write_zeroes(
        &self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Unsupported) })
    }

    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if self.0.fails.load(Ordering::SeqCst) {
                return Err(failure());
            }
            self.0.file.sync_data().await.map_err(|error| Error::io(error, "flush"))
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

impl DriverType for MeteredType {
    fn name(&self) -> &'static str {
        "metered"
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
        let node: Box<dyn Driver> = Box::new(Metered(self.0.clone()));
        Box::pin(async move { Ok(node) })
    }
}

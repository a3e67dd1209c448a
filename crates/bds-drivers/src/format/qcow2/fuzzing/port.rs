//! A file in memory as a child node: every request completes at once, so a test needs no executor,
//! except where it holds flushes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::driver::{
    Attempt, BoxFuture, Child, ChildPort, HostMap, Limits, Precision, ReadFlags, StatusFlags,
    StatusRun, Truncate, WriteFlags, ZeroFlags,
};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::IoVec;
use bds_io::sync::Notify;

/// A file in memory that stands below a driver: every request is done at once. Clones share the
/// bytes.
#[derive(Clone, Debug, Default)]
pub struct MemPort {
    bytes: Arc<Mutex<Vec<u8>>>,
    writes: Arc<Mutex<u64>>,
    flushes: Arc<Flushes>,
    journal: Arc<Mutex<Journal>>,
}

/// A request that changed a [`MemPort`], or made changes durable.
#[derive(Clone, Debug)]
pub enum PortEvent {
    /// These bytes were written at this offset.
    Write(u64, Vec<u8>),
    /// All that was written before is durable.
    Flush,
}

#[derive(Debug, Default)]
struct Journal {
    /// What happened, if that is recorded.
    events: Option<Vec<PortEvent>>,
    /// So many more requests succeed; the one after that fails.
    fails_after: Option<u64>,
}

/// How flushes of a [`MemPort`] behave.
#[derive(Debug, Default)]
struct Flushes {
    is_held: AtomicBool,
    fails: AtomicBool,
    changed: Notify,
}

/// No test needs a longer file; a request past it is an error, not an allocation.
const MAX_LEN: u64 = 128 << 20;

impl MemPort {
    /// A file that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(Mutex::new(bytes)), ..Self::default() }
    }

    /// A copy of what it holds now.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    /// How many requests changed it.
    pub fn writes(&self) -> u64 {
        *self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on flushes wait until they are no longer held.
    pub fn hold_flushes(&self, is_held: bool) {
        self.flushes.is_held.store(is_held, Ordering::SeqCst);
        self.flushes.changed.notify_waiters();
    }

    /// From now on flushes fail, or succeed again.
    pub fn fail_flushes(&self, fails: bool) {
        self.flushes.fails.store(fails, Ordering::SeqCst);
    }

    /// Returns what was recorded since the last call, and records what happens from now on.
    pub fn take_journal(&self) -> Vec<PortEvent> {
        self.journal().events.replace(Vec::new()).unwrap_or_default()
    }

    /// After so many more writes and flushes one fails, or none (`None`).
    pub fn fail_one_after(&self, requests: Option<u64>) {
        self.journal().fails_after = requests;
    }

    /// Did the failure that was asked for happen?
    pub fn has_failed(&self) -> bool {
        self.journal().fails_after.is_none()
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if it is time to; else records what `event` returns.
    fn note(&self, event: impl FnOnce() -> PortEvent) -> Result<()> {
        let mut journal = self.journal();
        match journal.fails_after {
            Some(0) => {
                journal.fails_after = None;
                return Err(Error::new(ErrorKind::Io, "a test's request fails"));
            }
            Some(more) => journal.fails_after = Some(more - 1),
            None => {}
        }
        if let Some(events) = &mut journal.events {
            events.push(event());
        }
        Ok(())
    }

    /// The edge a driver would be given.
    pub fn child(&self, name: &'static str) -> Child {
        Child::new(name, Box::new(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, offset: u64, iov: &IoVec) {
        let bytes = self.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let end = start.saturating_add(iov.len()).min(bytes.len());
        iov.copy_from(0, &bytes[start..end]);
        iov.fill(end - start..iov.len(), 0);
    }

    fn change(&self, offset: u64, len: u64, with: impl FnOnce(&mut [u8])) -> Result<()> {
        *self.writes.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let end = offset.checked_add(len).filter(|e| *e <= MAX_LEN).ok_or_else(too_long)?;
        let mut bytes = self.lock();
        let (start, end) = (index(offset), index(end));
        let mut changed = vec![0; end - start];
        with(&mut changed);
        self.note(|| PortEvent::Write(offset, changed.clone()))?;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(&changed);
        Ok(())
    }
}

fn too_long() -> Error {
    Error::new(ErrorKind::NoSpace, "a test's file may not be longer than 128 MiB")
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("at most MAX_LEN")
}

fn ready<'a, T: Send + 'a>(value: T) -> BoxFuture<'a, T> {
    Box::pin(std::future::ready(value))
}

impl ChildPort for MemPort {
    fn len(&self) -> u64 {
        self.lock().len() as u64
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn node_name(&self) -> String {
        "memory".to_owned()
    }

    fn filename(&self) -> Option<PathBuf> {
        None
    }

    fn driver_name(&self) -> &'static str {
        "mem"
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn can_zero(&self) -> bool {
        true
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.load(offset, iov);
        Some(Ok(()))
    }

    fn try_write(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }

    fn read(&self, offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        self.load(offset, &iov);
        ready(Ok(()))
    }

    fn write(&self, offset: u64, iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        ready(self.change(offset, iov.len() as u64, |to| iov.copy_to(0, to)))
    }

    fn write_compressed(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        ready(Err(Error::new(ErrorKind::NotSupported, "a file has no compressed clusters")))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        ready(self.change(offset, len, |to| to.fill(0)).map(|()| Attempt::Done))
    }

    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        ready(Ok(()))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.flushes.changed.wait_until(|| !self.flushes.is_held.load(Ordering::SeqCst)).await;
            match self.flushes.fails.load(Ordering::SeqCst) {
                true => Err(Error::new(ErrorKind::Io, "a test's flush fails")),
                false => self.note(|| PortEvent::Flush),
            }
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let end = self.lock().len() as u64;
        let flags = StatusFlags::DATA | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
        let map = Some(HostMap { child: "file", offset });
        ready(Ok(StatusRun { len: len.min(end.saturating_sub(offset)), flags, map }))
    }

    fn is_zero(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<bool>> {
        let bytes = self.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let end = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX)).min(bytes.len());
        ready(Ok(bytes[start..end].iter().all(|b| *b == 0)))
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        *self.writes.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        if change.len > MAX_LEN {
            return ready(Err(too_long()));
        }
        self.lock().resize(index(change.len), 0);
        ready(Ok(()))
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        ready(Ok(None))
    }

    fn identity(&self) -> Option<(u64, u64)> {
        None
    }
}

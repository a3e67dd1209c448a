//! An open image under test: sends a workload's requests to it and compares it with the model.

use std::cell::RefCell;
use std::path::PathBuf;

use bds_core::driver::{Attempt, CacheMode, OpenFlags, Prealloc, Truncate, WriteFlags, ZeroFlags};
use bds_core::graph::Graph;
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_io::Buf;
use bds_testkit::{Cache, DiskModel, Ended, Op, Step, Workload};
use futures_util::future::join_all;
use serde_json::json;

use super::{ImageKind, TestEnv};

/// An exact resize to `len` bytes, without preallocation.
pub(crate) fn resize_to(len: u64) -> Truncate {
    Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: false }
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) backend: Backend,
}

impl Disk {
    /// Opens the image for writing.
    pub(crate) async fn open(env: &TestEnv, kind: &ImageKind, graph: &Graph) -> Result<Disk> {
        Self::open_as(env, kind, graph, OpenFlags { discard: true, ..OpenFlags::default() }).await
    }

    /// Opens it in a cache mode.
    pub(crate) async fn open_cached(
        env: &TestEnv,
        kind: &ImageKind,
        graph: &Graph,
        cache: Cache,
    ) -> Result<Disk> {
        let word = match cache {
            Cache::Writeback => "writeback",
            Cache::None => "none",
            Cache::Writethrough => "writethrough",
            Cache::Unsafe => "unsafe",
        };
        let cache = CacheMode::parse(word).expect("a known word");
        Self::open_as(env, kind, graph, OpenFlags { discard: true, cache, ..OpenFlags::default() })
            .await
    }

    /// Opens it for reading and checking.
    pub(crate) async fn open_read_only(
        env: &TestEnv,
        kind: &ImageKind,
        graph: &Graph,
    ) -> Result<Disk> {
        Self::open_as(env, kind, graph, OpenFlags { read_only: true, ..OpenFlags::default() }).await
    }

    async fn open_as(
        env: &TestEnv,
        kind: &ImageKind,
        graph: &Graph,
        flags: OpenFlags,
    ) -> Result<Disk> {
        let mut options = kind.open.clone();
        options["driver"] = json!(kind.format);
        options["file"] = json!({"driver": "file", "filename": env.path("disk")});
        let writable = !flags.read_only;
        if let Some(filter) = kind.beneath.as_ref().filter(|_| writable) {
            let file = std::mem::replace(&mut options["file"], filter.clone());
            options["file"]["file"] = file;
        }
        if let Some(filter) = kind.above.as_ref().filter(|_| writable) {
            let file = std::mem::replace(&mut options, filter.clone());
            options["file"] = file;
        }
        let node = graph.open_with(Options::from_json(options)?, flags).await?;
        Ok(Disk {
            backend: Backend::new(
                &node,
                BackendOptions { name: "test".into(), writable, ..Default::default() },
            )?,
        })
    }

    pub(super) async fn open_file(graph: &Graph, format: &str, path: PathBuf) -> Disk {
        let options = json!({"driver": format, "file": {"driver": "file", "filename": path}});
        let options = Options::from_json(options).expect("an object");
        let node = graph.open(options).await.expect("it was just made");
        let options = BackendOptions { name: "test".into(), writable: true, ..Default::default() };
        Disk { backend: Backend::new(&node, options).expect("it is writable") }
    }

    pub(crate) async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.backend.write(at, Buf::from_slice(bytes).iov(), WriteFlags::empty()).await
    }

    /// Writes the bytes that precede the workload: in one go, or every other cluster first.
    pub(super) async fn fill(&self, start: u64, bytes: &[u8], kind: &ImageKind) -> Result<()> {
        if !kind.is_in_pieces {
            return self.write(start, bytes).await;
        }
        let cluster = usize::try_from(kind.cluster).expect("small");
        for first in [0, 1] {
            for (number, bytes) in bytes.chunks(cluster).enumerate().skip(first).step_by(2) {
                self.write(start + number as u64 * kind.cluster, bytes).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let len = usize::try_from(len).expect("small");
        let iov = Buf::zeroed(len, 4096).iov();
        iov.fill(0..len, 0xee);
        self.backend.read(at, iov.clone()).await?;
        Ok(iov.to_vec(0..len))
    }

    /// Sends one request; returns the bytes of a read.
    pub(crate) async fn request(&self, op: &Op) -> Result<Option<Vec<u8>>> {
        let backend = &self.backend;
        match op {
            Op::Write { at, bytes, fua } => {
                let flags = if *fua { WriteFlags::FUA } else { WriteFlags::empty() };
                backend.write(*at, Buf::from_slice(bytes).iov(), flags).await?;
            }
            Op::Compressed { at, bytes } => {
                backend.write_compressed(*at, Buf::from_slice(bytes).iov()).await?;
            }
            Op::Zero { at, len, may_unmap, fua } => {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::MAY_UNMAP, *may_unmap);
                flags.set(ZeroFlags::FUA, *fua);
                let done = backend.write_zeroes(*at, *len, flags).await?;
                assert_eq!(done, Attempt::Done, "only NO_FALLBACK may be declined");
            }
            Op::Discard { at, len } => backend.discard(*at, *len).await?,
            Op::Read { at, len } => return self.read(*at, *len).await.map(Some),
            Op::Flush => backend.flush().await?,
            Op::Grow { len } => {
                backend.truncate(resize_to(*len)).await?;
            }
        }
        Ok(None)
    }

    /// Sends requests concurrently, updates the model, and returns those that failed.
    pub(crate) async fn requests(
        &self,
        ops: &[Op],
        model: &RefCell<DiskModel>,
    ) -> Result<Vec<Error>, String> {
        // A flush among them covers what completed before they all began.
        let mut before =
            ops.iter().any(|op| matches!(op, Op::Flush)).then(|| model.borrow().clone());
        model.borrow_mut().begin(ops);
        let results = join_all(ops.iter().map(|op| self.request(op))).await;
        let mut model = model.borrow_mut();
        let is_flushed =
            |(op, result): (&Op, &Result<_>)| matches!(op, Op::Flush) && result.is_ok();
        if ops.iter().zip(&results).any(is_flushed)
            && let Some(mut before) = before.take()
        {
            before.flushed();
            before.begin(ops);
            *model = before;
        }
        let ended: Vec<Ended> =
            results.iter().map(|r| if r.is_ok() { Ended::Done } else { Ended::Partly }).collect();
        model.end(ops, &ended);
        if ops.iter().any(|op| matches!(op, Op::Grow { .. })) {
            model.set_len(self.backend.len());
        }
        let mut errors = Vec::new();
        for (op, result) in ops.iter().zip(results) {
            match (op, result) {
                (Op::Read { at, .. }, Ok(Some(bytes))) => {
                    model.check_read(*at, &bytes).map_err(|e| format!("{op:?}: {e}"))?;
                }
                (_, Ok(_)) => {}
                (_, Err(error)) => errors.push(error.context(format!("{op:?}"))),
            }
        }
        Ok(errors)
    }

    /// Reads the whole disk and compares.
    pub(crate) async fn compare(&self, model: &RefCell<DiskModel>) -> Result<(), String> {
        let len = self.backend.len();
        let expected = model.borrow().len();
        if len != expected {
            return Err(format!("the disk is {len} bytes long instead of {expected}"));
        }
        let bytes = self.read(0, len).await.map_err(|e| format!("reading all of it: {e}"))?;
        model.borrow_mut().check_read(0, &bytes)
    }

    /// Content by sectors; `None` for sectors that cannot be read.
    pub(crate) async fn survivors(&self, cluster: u64) -> Vec<Option<[u8; 512]>> {
        let len = self.backend.len();
        let sectors = |bytes: &[u8]| -> Vec<Option<[u8; 512]>> {
            bytes.chunks(512).map(|chunk| chunk.try_into().ok()).collect()
        };
        if let Ok(bytes) = self.read(0, len).await {
            return sectors(&bytes);
        }
        let mut all = Vec::new();
        let mut at = 0;
        while at < len {
            let part = cluster.min(len - at);
            match self.read(at, part).await {
                Ok(bytes) => all.extend(sectors(&bytes)),
                Err(_) => all.extend((0..part / 512).map(|_| None)),
            }
            at += part;
        }
        all
    }

    /// Checks the image: (corruptions, leaks), or a description of the errors.
    pub(crate) async fn check(&self) -> Result<(u64, u64), String> {
        let report = match self.backend.check(&|_, _| {}).await {
            Ok(report) => report,
            // Formats without metadata have nothing to check.
            Err(error) if error.kind() == ErrorKind::NotSupported => return Ok((0, 0)),
            Err(error) => return Err(format!("check failed: {error}")),
        };
        if report.corruptions + report.check_errors > 0 {
            return Err(format!("check: {report:#?}"));
        }
        Ok((report.corruptions, report.leaks))
    }

    /// Flushes and closes; an error if something could not be made durable.
    pub(crate) async fn close(self) -> Result<(), Error> {
        let node = self.backend.node().expect("it has a medium");
        drop(self.backend);
        match node.close().await {
            Ok(report) => {
                let mut reports = vec![report];
                while let Some(report) = reports.pop() {
                    if let Some(error) = report.flush_error.or(report.close_error) {
                        return Err(error);
                    }
                    reports.extend(report.below);
                }
                Ok(())
            }
            Err(error) => Err(Error::new(ErrorKind::InUse, error.to_string())),
        }
    }
}

/// Runs a whole workload: every request must succeed and every read must be right.
pub(crate) async fn play(
    env: &TestEnv,
    kind: &ImageKind,
    cache: Cache,
    workload: &Workload,
    model: &RefCell<DiskModel>,
) -> Result<(), String> {
    let graph = env.graph();
    let open = || async {
        Disk::open_cached(env, kind, &graph, cache).await.map_err(|e| format!("open: {e}"))
    };
    let mut disk = open().await?;
    for (number, step) in workload.steps.iter().enumerate() {
        let at = |e: String| format!("step {number}: {e}");
        match step {
            Step::Requests(ops) => {
                let errors = disk.requests(ops, model).await.map_err(at)?;
                if let Some(error) = errors.first() {
                    return Err(at(error.to_string()));
                }
            }
            Step::Reopen => {
                disk.close().await.map_err(|e| at(format!("close: {e}")))?;
                disk = open().await.map_err(at)?;
                model.borrow_mut().flushed();
            }
        }
    }
    disk.compare(model).await?;
    disk.close().await.map_err(|e| format!("close: {e}"))?;
    let disk =
        Disk::open_read_only(env, kind, &graph).await.map_err(|e| format!("open to look: {e}"))?;
    let (_, leaks) = disk.check().await?;
    if leaks > 0 {
        return Err(format!("check: {leaks} leaks after a clean close"));
    }
    disk.compare(model).await?;
    disk.close().await.map_err(|e| format!("close: {e}"))
}

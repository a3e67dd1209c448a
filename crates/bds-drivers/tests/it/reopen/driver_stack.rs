//! Stacks drivers on each other through minimal ports, without a graph.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bds_core::driver::{
    Attempt, BoxFuture, Child, ChildOpener, ChildPort, ChildRequest, Driver, DriverType, Limits,
    OpenContext, OpenFlags, Precision, ReadFlags, Reopen, ReopenContext, Role, StatusRun, Truncate,
    WriteFlags, ZeroFlags,
};
use bds_core::{Options, Result};
use bds_drivers::format::qcow2::Qcow2Format;
use bds_drivers::protocol::file::FileProtocol;
use bds_io::{Buf, Fs, IoVec, Sim, SimConfig};

use crate::kit::{ImageKind, TestEnv, sim_with_image};

/// A replaceable node: ports that lead to it follow when it is replaced.
pub(crate) type NodeCell = Arc<Mutex<Arc<dyn Driver>>>;

pub(crate) fn node_cell(node: Arc<dyn Driver>) -> NodeCell {
    Arc::new(Mutex::new(node))
}

/// A port to the current node of a cell.
pub(crate) struct CellPort(pub(crate) NodeCell);

impl CellPort {
    fn node(&self) -> Arc<dyn Driver> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn child(node_cell: &NodeCell, name: &'static str) -> Child {
        Child::new(name, Box::new(Self(Arc::clone(node_cell))))
    }
}

impl ChildPort for CellPort {
    fn len(&self) -> u64 {
        self.node().len()
    }

    fn limits(&self) -> Limits {
        self.node().limits()
    }

    fn node_name(&self) -> String {
        format!("{:p}", Arc::as_ptr(&self.node()))
    }

    fn filename(&self) -> Option<PathBuf> {
        self.node().filename()
    }

    fn driver_name(&self) -> &'static str {
        self.node().name()
    }

    fn is_writable(&self) -> bool {
        !self.node().is_read_only()
    }

    fn can_zero(&self) -> bool {
        self.node().zero_flags().is_some()
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let node = self.node();
        // As the request path does: bytes past the end must be filled with zeros.
        let is_inside = offset + iov.len() as u64 <= node.len();
        is_inside.then(|| node.try_read(offset, iov)).flatten()
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.node().try_write(offset, iov)
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.node().read(offset, iov, flags).await })
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.node().write(offset, iov, flags).await })
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.node().write_compressed(offset, iov).await })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move { self.node().write_zeroes(offset, len, flags).await })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.node().discard(offset, len).await.map(drop) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let node = self.node();
            if node.is_read_only() {
                return Ok(());
            }
            node.flush_to_os().await?;
            node.flush_to_disk().await
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { self.node().block_status(offset, len, precision).await })
    }

    fn is_zero(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async { Ok(false) })
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.node().truncate(change).await })
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async move { self.node().allocated_len().await })
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.node().identity()
    }
}

/// Opens children that were made before, by name.
#[derive(Default)]
pub(crate) struct ReadyChildren(pub(crate) Vec<(&'static str, NodeCell)>);

impl ChildOpener for ReadyChildren {
    fn open_child<'a>(&'a mut self, request: ChildRequest) -> BoxFuture<'a, Result<Option<Child>>> {
        let found = self.0.iter().find(|(name, _)| *name == request.name);
        let child = found.map(|(_, node_cell)| CellPort::child(node_cell, request.name));
        Box::pin(async move { Ok(child) })
    }
}

pub(crate) fn read_only(flags: OpenFlags) -> OpenFlags {
    OpenFlags { read_only: true, ..flags }
}

/// Flags of a writer.
pub(crate) fn writer() -> OpenFlags {
    OpenFlags { discard: true, ..OpenFlags::default() }
}

pub(crate) fn file_flags(flags: OpenFlags) -> OpenFlags {
    OpenFlags { role: Role::DATA | Role::METADATA | Role::PRIMARY, ..flags }
}

pub(crate) async fn open_file(fs: &Fs, path: PathBuf, flags: OpenFlags) -> Result<Arc<dyn Driver>> {
    let options = Options::new().with("filename", path.to_str().expect("plain"));
    let mut none = ReadyChildren::default();
    let mut context = OpenContext::new("file", options, flags, fs, &mut none);
    Ok(Arc::from(FileProtocol.open(&mut context).await?))
}

pub(crate) async fn prepare<'a>(
    node: &'a dyn Driver,
    fs: &Fs,
    current: OpenFlags,
    flags: OpenFlags,
    options: Options,
) -> Result<Box<dyn Reopen + 'a>> {
    let mut context = ReopenContext { current, flags, options, fs };
    let prepared = node.prepare_reopen(&mut context).await?;
    context.options.finish("the driver")?;
    Ok(prepared)
}

/// A qcow2 image with its file (and data file).
pub(crate) struct Image {
    pub(crate) fs: Fs,
    pub(crate) files: Vec<Arc<dyn Driver>>,
    pub(crate) node: Box<dyn Driver>,
    pub(crate) flags: OpenFlags,
}

impl Image {
    pub(crate) async fn open(env: &TestEnv, kind: &ImageKind, flags: OpenFlags) -> Result<Self> {
        let fs = env.fs();
        let mut children = ReadyChildren::default();
        let file = open_file(&fs, env.path("disk"), file_flags(flags)).await?;
        children.0.push(("file", node_cell(Arc::clone(&file))));
        let mut files = vec![file];
        if kind.has_data_file {
            let data = open_file(&fs, env.path("data"), flags).await?;
            children.0.push(("data-file", node_cell(Arc::clone(&data))));
            files.push(data);
        }
        if kind.backing_len.is_some() {
            let base = open_file(&fs, env.path("base"), read_only(flags)).await?;
            children.0.push(("backing", node_cell(base)));
        }
        let options = Options::from_json(kind.open.clone())?;
        let mut context = OpenContext::new("image", options, flags, &fs, &mut children);
        let node = Qcow2Format.open(&mut context).await?;
        Ok(Self { fs, files, node, flags })
    }

    pub(crate) async fn read(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let iov = Buf::zeroed(len, 4096).iov();
        iov.fill(0..len, 0xee);
        match self.node.try_read(at, &iov) {
            Some(result) => result?,
            None => self.node.read(at, iov.clone(), ReadFlags::empty()).await?,
        }
        Ok(iov.to_vec(0..len))
    }

    pub(crate) async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let iov = Buf::from_slice(bytes).iov();
        match self.node.try_write(at, &iov) {
            Some(result) => result,
            None => self.node.write(at, iov, WriteFlags::empty()).await,
        }
    }

    pub(crate) async fn flush(&self) -> Result<()> {
        self.node.flush_to_os().await?;
        self.node.flush_to_disk().await?;
        for file in &self.files {
            if !file.is_read_only() {
                file.flush_to_disk().await?;
            }
        }
        Ok(())
    }

    /// Fails on corruption; returns the leaks.
    pub(crate) async fn check(&self) -> u64 {
        let report = self.node.check(&|_, _| {}).await.expect("it can be checked");
        assert_eq!(report.corruptions + report.check_errors, 0, "{report:#?}");
        report.leaks
    }

    /// Reopens all nodes in a graph's order: prepares all, then commits all, children first.
    pub(crate) async fn reopen(&mut self, flags: OpenFlags, options: Options) -> Result<()> {
        // Children before parents if both become writable, else after them.
        let files_first = self.flags.read_only;
        self.reopen_in_order(flags, options, files_first).await
    }

    pub(crate) async fn reopen_in_order(
        &mut self,
        flags: OpenFlags,
        options: Options,
        files_first: bool,
    ) -> Result<()> {
        self.try_reopen(flags, options, files_first).await?;
        self.flags = flags;
        Ok(())
    }

    async fn try_reopen(
        &self,
        flags: OpenFlags,
        options: Options,
        files_first: bool,
    ) -> Result<()> {
        let (fs, from) = (&self.fs, self.flags);
        let mut prepared = Vec::new();
        if files_first {
            self.prepare_files(flags, &mut prepared).await?;
        }
        let image = prepare(&*self.node, fs, from, flags, options).await?;
        if !files_first {
            self.prepare_files(flags, &mut prepared).await?;
        }
        prepared.into_iter().for_each(Reopen::commit);
        image.commit();
        Ok(())
    }

    async fn prepare_files<'a>(
        &'a self,
        flags: OpenFlags,
        prepared: &mut Vec<Box<dyn Reopen + 'a>>,
    ) -> Result<()> {
        for (i, file) in self.files.iter().enumerate() {
            let of = |flags| if i == 0 { file_flags(flags) } else { flags };
            let options = Options::new();
            prepared.push(prepare(&**file, &self.fs, of(self.flags), of(flags), options).await?);
        }
        Ok(())
    }

    /// Inactivates the image, then its files.
    pub(crate) async fn inactivate(&self) -> Result<()> {
        self.node.inactivate().await?;
        for file in &self.files {
            file.inactivate().await?;
        }
        Ok(())
    }

    /// Activates the files, then the image. On a failure the files are inactivated again.
    pub(crate) async fn activate(&self) -> Result<()> {
        let result = self.activate_in_order().await;
        if result.is_err() {
            for file in &self.files {
                file.inactivate().await?;
            }
        }
        result
    }

    async fn activate_in_order(&self) -> Result<()> {
        for file in &self.files {
            file.activate().await?;
        }
        self.node.activate().await
    }

    pub(crate) async fn close(self) -> Result<()> {
        self.node.close().await?;
        for file in &self.files {
            if !file.is_read_only() {
                file.flush_to_disk().await?;
            }
            file.close().await?;
        }
        Ok(())
    }
}

/// Makes a simulated disk with an image of this kind.
pub(crate) fn made(seed: u64, kind: &ImageKind) -> (Sim, TestEnv) {
    let sim = sim_with_image(seed, SimConfig::calm(), kind);
    (sim.clone(), TestEnv::Sim(sim))
}

//! Makes qcow2 images of a given shape on a simulated disk, and opens them in a graph.

use bds_core::driver::{CreateContext, DriverType};
use bds_core::graph::{Graph, NodeRef};
use bds_core::options::Options;
use bds_core::request::{Backend, BackendOptions};
use bds_drivers::format::qcow2::Qcow2Format;
use bds_drivers::format::qcow2::fuzzing::MemPort;
use bds_io::{Buf, Sim};
use bds_testkit::Scratch;
use bds_testkit::qemu_img;

use crate::kit::trusting_graph;

/// Path of the image.
pub(crate) const IMAGE: &str = "/disk.qcow2";
pub(crate) const BASE: &str = "/base.raw";
pub(crate) const DATA: &str = "/disk.data";

/// Options of create.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub size: u64,
    pub compat: &'static str,
    pub cluster: u64,
    pub refcount_bits: u64,
    pub extended_l2: bool,
    pub backing: bool,
    pub data_file: bool,
    /// The data file reads like the disk.
    pub data_file_raw: bool,
    pub lazy: bool,
    pub zstd: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            size: 1 << 20,
            compat: "v3",
            cluster: 4096,
            refcount_bits: 16,
            extended_l2: false,
            backing: false,
            data_file: false,
            data_file_raw: false,
            lazy: false,
            zstd: false,
        }
    }
}

/// Bytes of the backing file.
pub(crate) fn base_bytes(len: u64) -> Vec<u8> {
    (0..len).map(|i| ((i / 512) as u8).wrapping_mul(7) | 1).collect()
}

/// Makes an image of this shape in memory and puts it on the disk.
pub(crate) fn make(sim: &Sim, shape: &Shape) {
    let mut options = Options::new()
        .with("size", shape.size)
        .with("compat", shape.compat)
        .with("cluster_size", shape.cluster);
    if shape.compat == "v3" {
        options.set("refcount_bits", shape.refcount_bits);
        options.set("extended_l2", shape.extended_l2);
        options.set("lazy_refcounts", shape.lazy);
        if shape.zstd {
            options.set("compression_type", "zstd");
        }
    }
    if shape.backing {
        // Shorter than the disk, and not a whole number of clusters.
        let len = shape.size / 4 * 3 + 512;
        sim.put_file(BASE, &base_bytes(len));
        options.set("backing_file", BASE);
        options.set("backing_fmt", "raw");
    }
    let file = MemPort::new(Vec::new());
    let data = MemPort::new(Vec::new());
    if shape.data_file {
        options.set("data_file", DATA);
        options.set("data_file_raw", shape.data_file_raw);
    }
    let context = CreateContext {
        file: file.child("file"),
        data_file: shape.data_file.then(|| data.child("data-file")),
        backing_len: None,
        options: &mut options,
    };
    let maker = Sim::new(0, bds_io::SimConfig::calm());
    maker.block_on(Qcow2Format.create(context)).unwrap();
    sim.put_file(IMAGE, &file.bytes());
    if shape.data_file {
        sim.put_file(DATA, &data.bytes());
    }
}

/// A graph on this disk that may open the files that images name.
pub(crate) fn graph(sim: &Sim) -> Graph {
    trusting_graph(sim.fs())
}

/// Options of open.
pub(crate) fn options() -> Options {
    Options::new()
        .with("driver", "qcow2")
        .with("discard", "unmap")
        .with("file", serde_json::json!({"driver": "file", "filename": IMAGE, "discard": "unmap"}))
}

/// Opens the image for writing.
pub(crate) async fn open(graph: &Graph, options: Options) -> (NodeRef, Backend) {
    let is_read_only = options.peek("read-only") == Some(&true.into());
    let node = graph.open(options).await.unwrap();
    let backend = backend(&node, !is_read_only);
    (node, backend)
}

/// A backend that writes to the node.
pub(crate) fn writer(node: &NodeRef) -> Backend {
    backend(node, true)
}

fn backend(node: &NodeRef, writable: bool) -> Backend {
    let options = BackendOptions { name: "test".into(), writable, ..Default::default() };
    Backend::new(node, options).unwrap()
}

/// Closes it; an error fails the test.
pub(crate) async fn close(graph: &Graph, node: NodeRef, backend: Backend) {
    drop(backend);
    drop(node);
    for report in graph.reap().await {
        report.into_result().unwrap();
    }
}

pub(crate) async fn read(backend: &Backend, offset: u64, len: usize) -> bds_core::Result<Vec<u8>> {
    let buf = Buf::from_slice(&vec![0xEE; len]);
    if let Some(result) = backend.try_read(offset, &buf.iov()) {
        result?;
        return Ok(buf.iov().to_vec(0..len));
    }
    backend.read(offset, buf.iov()).await?;
    Ok(buf.iov().to_vec(0..len))
}

pub(crate) async fn write(backend: &Backend, offset: u64, bytes: &[u8]) -> bds_core::Result<()> {
    let iov = Buf::from_slice(bytes).iov();
    if let Some(result) = backend.try_write(offset, &iov) {
        return result;
    }
    backend.write(offset, iov, bds_core::driver::WriteFlags::empty()).await
}

/// Runs `qemu-img check` on the image as it is on the disk: exit code (0: clean, 3: leaks) and
/// output.
pub(crate) fn qemu_check(sim: &Sim) -> Option<(i32, String)> {
    let tool = qemu_img()?;
    let scratch = Scratch::new();
    let path = scratch.path("x.qcow2");
    sim.export(IMAGE, &path).unwrap();
    if sim.exists(DATA) {
        sim.export(DATA, scratch.path("d")).unwrap();
    }
    let spec = if sim.exists(DATA) {
        format!(
            "driver=qcow2,file.driver=file,file.filename={},data-file.driver=file,data-file.filename={}",
            path.display(),
            scratch.path("d").display()
        )
    } else {
        format!("driver=qcow2,backing=,file.driver=file,file.filename={}", path.display())
    };
    let out = tool.run(["check", "--image-opts", &spec]);
    Some((out.code, format!("{}{}", out.stdout, out.stderr)))
}

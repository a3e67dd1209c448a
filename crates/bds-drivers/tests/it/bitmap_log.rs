//! Persistent bitmaps survive crashes: write-intent log and sidecar, of raw and qcow2 images
//! (scenarios 36 and 37 of the plan, finding F9).

mod crash;
mod qemu;
mod threads;
mod tie;

use std::ops::Range;
use std::path::Path;

use bds_core::driver::WriteFlags;
use bds_core::graph::{BitmapInfo, BitmapOptions, Graph, GraphConfig, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::Fs;

const LEN: u64 = 64 << 20;
const BLOCK: u64 = 64 << 10;
/// A region of the log of a disk of this length.
const REGION: u64 = 4 << 20;

/// Blocks that are written to: one or two in each region.
fn places() -> impl Iterator<Item = u64> {
    (0..24).map(|number| number * 40 * BLOCK)
}

fn graph(fs: Fs) -> Graph {
    let mut config = GraphConfig::new(bds_drivers::registry().into());
    config.fs = fs;
    Graph::new(config)
}

fn options(format: &str, file: impl AsRef<Path>) -> Options {
    let path = file.as_ref().to_str().unwrap();
    let text = format!("driver={format},node-name=disk,file.driver=file,file.filename={path}");
    Options::parse(&text).unwrap()
}

/// An open disk with its graph.
struct Disk {
    graph: Graph,
    node: NodeRef,
    guest: Backend,
}

impl Disk {
    async fn open(fs: Fs, options: Options) -> Result<Self> {
        let graph = graph(fs);
        let node = graph.open(options).await?;
        let guest = Backend::new(&node, BackendOptions { writable: true, ..Default::default() })?;
        Ok(Self { graph, node, guest })
    }

    async fn close(self) -> Result<()> {
        let Self { graph, node, guest } = self;
        drop(guest);
        let closed = node.close().await?.into_result();
        graph.shutdown().await.check_leaks().unwrap();
        closed
    }

    async fn write(&self, at: u64, byte: u8) -> Result<()> {
        self.guest.write(at, vec![byte; 4096].into(), WriteFlags::empty()).await
    }

    async fn read(&self, at: u64) -> Vec<u8> {
        let buf = bds_io::Buf::zeroed(4096, 4096).iov();
        self.guest.read(at, buf.clone()).await.unwrap();
        buf.to_vec(0..4096)
    }

    fn bitmap(&self, name: &str) -> BitmapInfo {
        let all = self.node.bitmaps();
        let names: Vec<_> = all.iter().filter_map(|info| info.name.clone()).collect();
        let found = all.into_iter().find(|info| info.name.as_deref() == Some(name));
        found.unwrap_or_else(|| panic!("no bitmap '{name}' among {names:?}"))
    }

    fn dirty(&self, name: &str) -> Vec<Range<u64>> {
        self.node.copy_bitmap(name).unwrap().areas(0..LEN).collect()
    }
}

fn persistent(name: &str) -> BitmapOptions {
    BitmapOptions { persistent: true, granularity: Some(65536), ..BitmapOptions::named(name) }
}

/// The sidecar of a small raw disk with two bitmaps, closed or not.
pub(crate) fn log_file(is_closed: bool) -> Vec<u8> {
    let sim = bds_io::Sim::new(1, bds_io::SimConfig::calm());
    sim.block_on(async {
        let new = bds_io::OpenOptions { write: true, create: true, ..Default::default() };
        sim.fs().open("disk".as_ref(), &new).unwrap().set_len(9 << 20).await.unwrap();
        let disk = Disk::open(sim.fs(), options("raw", "disk")).await.unwrap();
        for name in ["daily", "off"] {
            disk.node.add_bitmap(persistent(name)).await.unwrap();
            disk.write(5 << 20, 1).await.unwrap();
        }
        disk.node.disable_bitmap("off").await.unwrap();
        disk.write(0, 1).await.unwrap();
        let crashed = sim.snapshot_file("disk.bds-cbt");
        disk.close().await.unwrap();
        if is_closed { sim.snapshot_file("disk.bds-cbt") } else { crashed }
    })
}

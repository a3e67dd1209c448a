//! Implements a driver, registers it and reads through a graph: a read-only disk in which every eight
//! bytes are their own offset.
//!
//! `cargo run -p bds-core --example custom_driver`
#![expect(clippy::print_stdout, reason = "an example shows what happens")]

use std::any::Any;
use std::sync::Arc;

use bds_core::driver::{
    BoxFuture, Category, Driver, DriverType, OpenContext, ReadFlags, Registry, StatusFlags,
    StatusRun, WriteFlags,
};
use bds_core::graph::{Graph, GraphConfig};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_io::{Buf, IoVec};

/// The driver as the registry knows it: its name, its options, and how a node is opened.
struct OffsetsType;

/// One open node.
struct Offsets {
    len: u64,
}

const OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "size",
    kind: OptionKind::Size,
    help: "length in bytes",
    default: Some("1M"),
}];

impl DriverType for OffsetsType {
    fn name(&self) -> &'static str {
        "offsets"
    }

    fn category(&self) -> Category {
        Category::Protocol
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            // Options that are not taken are refused by name.
            let len = context.options.take_size("size")?.unwrap_or(1 << 20);
            Ok(Box::new(Offsets { len }) as Box<dyn Driver>)
        })
    }
}

impl Driver for Offsets {
    fn name(&self) -> &'static str {
        "offsets"
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        true
    }

    // The range was checked, and cut at the node's length, before a driver sees a request.
    fn read(&self, offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let bytes = (offset..).map(|at| (at & !7).to_le_bytes()[(at & 7) as usize]);
            iov.copy_from(0, &bytes.take(iov.len()).collect::<Vec<u8>>());
            Ok(())
        })
    }

    fn write(&self, _offset: u64, _iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::new(ErrorKind::ReadOnly, "offsets cannot be written")) })
    }

    fn block_status(&self, _: u64, len: u64, _: bool) -> BoxFuture<'_, Result<StatusRun>> {
        let flags = StatusFlags::DATA | StatusFlags::ALLOCATED;
        Box::pin(async move { Ok(StatusRun { len, flags, map: None }) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn main() -> Result<()> {
    let mut registry = Registry::new();
    registry.register(Arc::new(OffsetsType))?;
    let graph = Graph::new(GraphConfig::new(Arc::new(registry)));
    bds_io::block_on(async {
        let options = Options::parse("driver=offsets,node-name=disk,size=64k,read-only=on")?;
        let disk = graph.open(options).await?;
        let backend = Backend::new(&disk, BackendOptions::default())?;
        let buf = Buf::zeroed(16, 512);
        backend.read(0x1000, buf.iov()).await?;
        assert_eq!(buf.iov().to_vec(0..8), 0x1000_u64.to_le_bytes());
        println!("bytes at 0x1000: {:x?}", buf.iov().to_vec(0..16));
        print!("{}", graph.dump());
        drop(backend);
        disk.close().await?.into_result()?;
        graph.shutdown().await.check_leaks()
    })
}

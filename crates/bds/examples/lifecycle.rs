//! Writes to an image, then acquires and releases a node and shows what a stale handle returns. A
//! part of `cargo xtask demo`.
//!
//! `lifecycle write IMAGE` writes the demo's changes; `lifecycle stale IMAGE` shows the life of a
//! node.
#![expect(clippy::print_stdout, reason = "an example shows what happens")]

use std::error::Error;
use std::sync::Arc;

use bds::core::graph::gate::TrustAll;
use bds::core::graph::{Graph, GraphConfig};
use bds::core::request::{Backend, BackendOptions};
use bds::core::{Options, driver::Registry};

/// The demo's changes of the overlay: offset, length, byte.
const CHANGES: [(u64, usize, u8); 3] =
    [(1 << 20, 300_000, 0xa5), (20 << 20, 65_536, 0x5a), (40 << 20, 4096, 0x77)];

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let registry: Registry = bds::drivers::registry();
    let config =
        GraphConfig { gate: Arc::new(TrustAll::default()), ..GraphConfig::new(Arc::new(registry)) };
    let graph = Graph::new(config);
    match args.get(1..) {
        Some([verb, image]) if verb == "write" => bds::io::block_on(write(&graph, image)),
        Some([verb, image]) if verb == "stale" => bds::io::block_on(stale(&graph, image)),
        _ => Err("usage: lifecycle write|stale IMAGE".into()),
    }
}

/// Returns the options of the image as a node named "disk", with its file.
fn options(image: &str, read_only: bool) -> Result<Options, bds::core::Error> {
    Options::parse(&format!(
        "driver=qcow2,node-name=disk,read-only={read_only},file.driver=file,file.filename={}",
        image.replace(',', ",,")
    ))
}

async fn write(graph: &Graph, image: &str) -> Result<(), Box<dyn Error>> {
    let disk = graph.open(options(image, false)?).await?;
    let backend = Backend::new(
        &disk,
        BackendOptions { name: "demo".into(), writable: true, ..Default::default() },
    )?;
    for (offset, len, byte) in CHANGES {
        backend.write(offset, vec![byte; len].into(), Default::default()).await?;
        println!("wrote {len} bytes of {byte:#04x} at {offset:#x}");
    }
    backend.flush().await?;
    drop(backend);
    disk.close().await?.into_result()?;
    Ok(())
}

async fn stale(graph: &Graph, image: &str) -> Result<(), Box<dyn Error>> {
    let disk = graph.open(options(image, true)?).await?;
    let id = disk.id();
    println!("opened:   node 'disk', count {}", disk.count());

    let second = graph.acquire(id)?;
    println!("acquired: a second reference by its handle, count {}", second.count());
    println!("released: {:?} (the other one still holds it)", second.release());

    println!("released: {:?} (this call gave up the last reference)", disk.release());
    let stale = match graph.acquire(id) {
        Ok(_) => return Err("a released node was acquired".into()),
        Err(stale) => stale,
    };
    println!("stale:    acquiring the old handle says \"{stale}\"");

    for report in graph.reap().await {
        report.into_result()?;
    }
    let again = graph.open(options(image, true)?).await?;
    match graph.acquire(id) {
        Ok(_) => return Err("an old handle opened a new node".into()),
        Err(stale) => println!(
            "stale:    'disk' lives again as another node; the old handle still says \"{stale}\""
        ),
    }
    again.close().await?.into_result()?;
    let report = graph.shutdown().await;
    report.check_leaks()?;
    for closed in report.closed {
        closed.into_result()?;
    }
    println!("shutdown: nothing is left over");
    Ok(())
}

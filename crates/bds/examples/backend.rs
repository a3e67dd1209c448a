//! Uses the operations of a backend: names, media, devices, error policies, drained sections,
//! statistics, revoking access and shutting the graph down.
//!
//! `cargo run -p bds --example backend`; `tests/examples.rs` runs it too.
#![expect(clippy::print_stdout, reason = "an example shows what happens")]

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bds::core::ErrorKind;
use bds::core::Options;
use bds::core::event::{ErrorAction, Event, Events};
use bds::core::graph::{Graph, GraphConfig, NodeRef, Operations, Perm};
use bds::core::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy, IoStatus};
use bds::core::stats::Operation;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Runs all steps.
pub(crate) fn main() -> Result<()> {
    let graph = Graph::new(GraphConfig::new(Arc::new(bds::drivers::registry())));
    bds::io::block_on(async {
        let drive = names(&graph)?;
        media(&graph, &drive).await?;
        errors(&graph, &drive).await?;
        counts(&drive).await?;
        revoke_and_shut_down(&graph, drive).await
    })
}

async fn mem(graph: &Graph, name: &str) -> Result<NodeRef> {
    let options = format!("driver=mem,node-name={name},size=65536");
    Ok(graph.open(Options::parse(&options)?).await?)
}

/// Backends have no name unless one is registered; names of backends and nodes are one namespace.
fn names(graph: &Graph) -> Result<Backend> {
    let options = BackendOptions { writable: true, ..BackendOptions::registered("drive0") };
    let drive = Backend::empty(graph, options)?;
    assert_eq!(graph.backend("drive0")?.name(), "drive0");
    assert_eq!(graph.backends().len(), 1);
    let again = Backend::empty(graph, BackendOptions::registered("drive0"));
    assert_eq!(again.map(drop).expect_err("it is taken").kind(), ErrorKind::AlreadyExists);
    println!("a drive:  {}", graph.query_backends());
    Ok(drive)
}

/// Inserting, replacing and ejecting a medium is a graph change: drained, checked, all or nothing.
async fn media(graph: &Graph, drive: &Backend) -> Result<()> {
    let (one, two) = (mem(graph, "one").await?, mem(graph, "two").await?);
    drive.insert(&one).await?;
    drive.write(0, vec![1; 4096].into(), Default::default()).await?;
    drive.replace_medium(&two).await?;

    let blocker = two.block(Operations::EJECT, "a backup runs");
    println!("blocked:  {}", drive.eject().await.map(drop).expect_err("blocked"));
    drop(blocker);
    let out = drive.eject().await?.expect("there was one");
    assert_eq!(out.id(), two.id());
    assert_eq!(drive.flush().await.expect_err("empty").kind(), ErrorKind::NoMedium);

    // As edits of a larger change.
    graph.change().insert(drive, &one).commit().await?;
    graph.change().eject(drive).insert(drive, &two).commit().await?;
    assert_eq!(drive.node().map(|node| node.id()), Some(two.id()));

    // Permissions it uses, and permissions it shares.
    drive.set_access(Perm::CONSISTENT_READ, Perm::CONSISTENT_READ).await?;
    let writer = BackendOptions { writable: true, name: "other".into(), ..Default::default() };
    println!("refused:  {}", Backend::new(&two, writer).map(drop).expect_err("not shared"));
    drive.eject().await?;
    drive.set_access(Perm::all(), Perm::all()).await?;
    Ok(())
}

/// A full disk stops the backend: the write waits until `resume`, then is retried.
async fn errors(graph: &Graph, drive: &Backend) -> Result<()> {
    let _below = mem(graph, "thin").await?;
    let full = "driver=blkdebug,node-name=full,image=thin,\
                inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.once=on";
    let full = graph.open(Options::parse(full)?).await?;
    drive.insert(&full).await?;
    let device = drive.attach_device("virtio0")?;
    println!("attached: {:?}", drive.device());
    drive.set_policies(ErrorPolicies { read: ErrorPolicy::Report, write: ErrorPolicy::Enospc });
    full.set_write_threshold(Some(32768));

    let mut events = graph.events();
    let guest = drive.clone();
    let write = bds::io::spawn(async move {
        guest.write(49152, vec![7; 4096].into(), Default::default()).await
    });
    let event = until_stopped(&mut events).await;
    println!("an event: {}", event.to_json());
    assert_eq!(drive.io_status(), IoStatus::NoSpace);
    assert_eq!(drive.in_flight(), 0, "a stopped request is not in flight");
    drive.resume();
    write.await?;
    assert_eq!(full.write_threshold(), None, "reported once, then removed");
    device.detach();
    Ok(())
}

async fn until_stopped(events: &mut Events) -> Event {
    loop {
        let event = events.next().await.expect("the graph lives");
        if matches!(event, Event::BlockIoError { action: ErrorAction::Stop, .. }) {
            return event;
        }
    }
}

/// During a drained section no request is in flight, so the statistics are complete.
async fn counts(drive: &Backend) -> Result<()> {
    let stats = drive.stats();
    stats.set_histogram(Operation::Read, &[10_000, 100_000])?;
    stats.add_interval(Duration::from_secs(60))?;
    stats.account_invalid(false);
    drive.read(0, vec![0; 512].into()).await?;
    let drained = drive.drain().await;
    assert_eq!(drained.backend().stats().totals(Operation::Read).ops, 1);
    println!("counts:   {}", stats.to_json());
    drop(drained);
    Ok(())
}

/// A backend owned by the monitor; revoking access of a device; shutdown of the graph.
async fn revoke_and_shut_down(graph: &Graph, drive: Backend) -> Result<()> {
    let device = drive.attach_device("virtio0")?;
    graph.own_backend(drive)?;
    println!("in use:   {}", graph.del_backend("drive0").expect_err("in use"));
    device.backend().revoke().await?;
    assert_eq!(device.backend().flush().await.expect_err("revoked").kind(), ErrorKind::NoMedium);
    drop(device);
    println!("deleted:  {:?}", graph.del_backend("drive0")?);
    let report = graph.shutdown().await;
    report.check_leaks()?;
    assert!(report.failed.is_empty());
    Ok(())
}

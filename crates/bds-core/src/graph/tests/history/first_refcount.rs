//! The five defects that the first reference count of QEMU's nodes brought with it or left standing (2013 to 2016). The count itself was
//! right from the first day; who owns, when it is given up, and what hangs on it was not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_refcount::{Holder, HolderKind, Release, Stale};

use super::super::fakes::{read, root};
use super::scripted_graph::{Point, World, commit, options, run};
use crate::graph::{
    Access, CloseError, JobEdge, JobSlot, NodeRef, Operations, Perm, ShutdownStage, Stoppable,
};
use crate::{Error, ErrorKind, Result};

/// Of 1.2, row 4 (4f6fd3491c; repaired f95c625ce4, 64dff52019). Deleting had become "give my reference up", but the mirror job
/// still closed its target by force in front of that, under everybody else who used it.
#[test]
fn series_a_shared_node_is_not_closed_by_force() {
    run(|world| async move {
        let target = world.part("target").await;
        let other = root(&target, "another user", Access::ALL);
        world.graph.own(target.clone()).unwrap();
        let id = target.id();
        let mut inside = Box::pin(read(&other));
        assert!(futures_util::poll!(&mut inside).is_pending());
        let before = world.picture();

        let CloseError::InUse { node, holders } = target.close().await.unwrap_err();
        assert!(holders.iter().any(|holder| holder.to_string().contains("another user")));
        let refused = world.graph.change().remove(node).commit();
        let error = Box::pin(refused).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("another user"), "{error}");
        let error = world.graph.del("target").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        // The two attempts took our reference with them, and nothing else.
        let ours = "  held by owner 'open'\n";
        assert_eq!(world.picture(), before.replace(ours, "").replace("refs=3", "refs=2"));

        inside.await.unwrap();
        read(&other).await.unwrap();
        assert_eq!(world.script.times("close target"), 0);
        drop(other);
        assert!(world.graph.del("target").await.unwrap().is_clean());
        assert_eq!(world.graph.acquire(id).unwrap_err(), Stale::Released);
    });
}

/// Stands for an NBD export: it owns its node, clients own the export.
struct Export {
    node: NodeRef,
    takes_clients: AtomicBool,
}

impl Export {
    fn new(node: &NodeRef) -> Arc<Self> {
        let node = node.clone().held_as(Holder::new(HolderKind::Export, "disk"));
        Arc::new(Self { node, takes_clients: AtomicBool::new(true) })
    }

    fn client(self: &Arc<Self>) -> Option<Arc<Self>> {
        self.takes_clients.load(Ordering::SeqCst).then(|| Arc::clone(self))
    }
}

impl Stoppable for Export {
    fn name(&self) -> String {
        "disk".into()
    }

    fn stop(&self) -> crate::driver::BoxFuture<'_, Result<()>> {
        self.takes_clients.store(false, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }
}

/// Of 1.2, row 7 (38b54b6dc1; repaired d626834849), and the catalogue's row 3 seen from the graph. The export gave its node up
/// when it was told to close, although connected clients still sent requests through it: they met a null pointer.
#[test]
fn series_an_export_keeps_its_node_until_its_last_client_has_left() {
    run(|world| async move {
        let node = world.part("disk").await;
        let id = node.id();
        let export = Export::new(&node);
        let watched: Arc<dyn Stoppable> = export.clone();
        world.graph.on_shutdown(ShutdownStage::Exports, &watched);
        drop(watched);
        let client = export.client().unwrap();
        drop(node);

        let report = world.graph.shutdown().await;
        drop(export);
        assert!(report.closed.is_empty() && client.client().is_none(), "closed to new clients");
        let error = report.check_leaks().unwrap_err().to_string();
        assert!(error.contains("export 'disk'"), "{error}");
        // The client that is still there notices nothing.
        let edge = root(&client.node, "request", Access::READ);
        read(&edge).await.unwrap();
        drop(edge);
        assert_eq!(client.node.id(), id);

        drop(client);
        let again = world.graph.shutdown().await;
        assert_eq!((again.closed.len(), again.leaked.len()), (1, 0));
        assert_eq!(world.script.times("close disk"), 1);
    });
}

/// Stands for a job: everything it took is a field, so there is no place where giving back could be forgotten.
struct Job {
    _slot: JobSlot,
    _blocker: crate::graph::Blocker,
    _edges: Vec<JobEdge>,
    filter: NodeRef,
}

/// Takes everything a mirror job takes, and then looks at its parameters. What comes first is given back if what comes later fails.
async fn create_job(world: &World, speed: i64) -> Result<Job> {
    let source = world.graph.find("source")?;
    let target = world.graph.find("target")?;
    let slot = source.claim_job("mirror0")?;
    let blocker = target.block(Operations::DELETE, "job 'mirror0' writes to it");
    let only_mine = Access { perm: Perm::all(), shared: Perm::CONSISTENT_READ };
    let edges = vec![
        world.graph.attach_job(&source, "mirror0", Access::READ)?,
        world.graph.attach_job(&target, "mirror0", only_mine)?,
    ];
    let filter = world.graph.open(options("driver=sieve,node-name=filter,file=source")).await?;
    commit(world.graph.change().insert_filter(&source, &filter)).await?;
    if speed < 0 {
        commit(world.graph.change().drop_filter(&filter).remove(filter)).await?;
        return Err(Error::new(ErrorKind::InvalidInput, "a speed is not negative"));
    }
    Ok(Job { _slot: slot, _blocker: blocker, _edges: edges, filter })
}

/// Of 1.2, row 8, defect A (fa510ebffa; repaired 18930ba3d1); row 32. Creating a job took a reference and then looked at the
/// speed; on a bad one it returned and left the reference behind, for ever. Here every step fails once, a bad speed included.
#[test]
fn series_a_job_that_cannot_be_created_keeps_nothing() {
    run(|world| async move {
        let source = world.part("source").await;
        let target = world.part("target").await;
        let guest = root(&source, "guest", Access::ALL);
        let before = world.picture();
        let error = create_job(&world, -1).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert_eq!(world.picture(), before);
        // Somebody reads the target and does not bear that it is written: the second edge is refused.
        let jealous = root(&target, "reader", Access { shared: Perm::empty(), ..Access::READ });
        let refused = world.picture();
        assert_eq!(create_job(&world, 0).await.err().unwrap().kind(), ErrorKind::InUse);
        assert_eq!(world.picture(), refused);
        drop(jealous);
        // The filter cannot be opened.
        world.script.fail_at("filter", Point::Open);
        assert_eq!(create_job(&world, 0).await.err().unwrap().kind(), ErrorKind::Io);
        assert_eq!(world.picture(), before);
        world.script.forget("filter", Point::Open);

        let job = world.fail_every_step(|| create_job(&world, 0)).await;
        assert_eq!(guest.target().id(), job.filter.id());
        assert!(source.job().is_some());
        assert_eq!(target.blocked(Operations::DELETE).len(), 1);
    });
}

/// Of 1.2, row 8, defect B (fa510ebffa; repaired 18930ba3d1). The job took the reference, but giving it up was left to each
/// user's completion callback; every callback but one did not know. Here what ends the job ends what it took, whatever its user does.
#[test]
fn series_what_a_job_took_is_given_back_whoever_its_user_is() {
    type Callback = fn(&NodeRef, Result<()>);
    let callbacks: [Callback; 3] = [
        |_, _| {},
        |node, result| assert!(result.is_ok() && node.is_writable()),
        |node, _| drop(node.clone()),
    ];
    for told in callbacks {
        run(|world| async move {
            let source = world.part("source").await;
            let target = world.part("target").await;
            let before = world.picture();
            let job = create_job(&world, 0).await.unwrap();
            let filter = job.filter.clone();
            commit(world.graph.change().drop_filter(&filter)).await.unwrap();
            drop(filter);
            told(&source, Ok(()));
            drop(job);
            world.graph.reap().await;
            assert_eq!(world.picture(), before, "claims, blockers and edges are gone");
            assert!(source.job().is_none() && target.blocked(Operations::all()).is_empty());
            assert_eq!(target.release(), Release::Last);
        });
    }
}

/// Of 1.2, row 8, defect C (a94a3fa..fa510eb; repaired 3ae59580a0), and row 2 seen from the graph. A drive's own record was freed
/// when the drive was unplugged, while the node it described lived on by the job's reference, and the job's end looked into the
/// record. Here what is remembered of a node (claims, bitmaps) lies in the node and ends with it.
#[test]
fn series_what_is_known_of_a_node_ends_with_the_node_and_not_before() {
    run(|world| async move {
        let drive = world.part("drive").await;
        let id = drive.id();
        let record = drive.add_bitmap("record").unwrap();
        let blocker = drive.block(Operations::RESIZE, "a job needs its length");
        let job = world.graph.attach_job(&drive, "backup0", Access::READ).unwrap();
        // Unplugged under the job.
        assert_eq!(drive.release(), Release::NotLast);
        world.graph.reap().await;
        assert_eq!(job.node().find_bitmap("record"), Some(record));
        assert_eq!(job.node().blocked(Operations::RESIZE).len(), 1);
        let lease = world.graph.lease_bitmap(record, "backup0").unwrap();
        drop(lease);

        drop(job);
        let closed = world.graph.reap().await;
        assert!(closed.len() == 1 && closed[0].is_clean(), "{closed:?}");
        assert_eq!(world.graph.acquire(id).unwrap_err(), Stale::Released);
        assert_eq!(world.graph.lease_bitmap(record, "late").unwrap_err().kind(), ErrorKind::Stale);
        // A guard that outlives it holds nothing and does no harm.
        drop(blocker);
        world.assert_empty().await;
    });
}

//! The five defects of the first reference count of QEMU's nodes (2013 to 2016). The count was
//! right from the start; owners, the time of the release, and state attached to the node were not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Release, Stale};

use super::scripted_graph::{ScriptedGraph, commit, options, run};
use crate::graph::{
    Access, BitmapOptions, BlockOps, CloseError, JobEdge, JobSlot, NodeRef, Perm, ShutdownStage,
    Stoppable,
};
use crate::test_kit::gate_port::{read, root};
use crate::test_kit::scripted::Point;
use crate::{Error, ErrorKind, Result};

/// 4f6fd3491c, repaired by f95c625ce4 and 64dff52019. Deleting had become "release my reference",
/// but the mirror job still closed its target by force before that, under all other users.
#[test]
fn shared_node_is_not_closed_by_force() {
    run(|test| async move {
        let target = test.part("target").await;
        let other = root(&target, "another user", Access::ALL);
        test.graph.own(target.clone()).unwrap();
        let id = target.id();
        let mut inside = Box::pin(read(&other));
        assert!(futures_util::poll!(&mut inside).is_pending());
        let before = test.snapshot();

        let CloseError::InUse { node, holders } = target.close().await.unwrap_err();
        assert!(holders.iter().any(|holder| holder.to_string().contains("another user")));
        let refused = test.graph.change().remove(node).commit();
        let error = Box::pin(refused).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("another user"), "{error}");
        let error = test.graph.del("target").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        // The two attempts consumed our reference, and nothing else.
        let ours = "  held by owner 'open'\n";
        assert_eq!(test.snapshot(), before.replace(ours, "").replace("refs=3", "refs=2"));

        inside.await.unwrap();
        read(&other).await.unwrap();
        assert_eq!(test.script.times("close target"), 0);
        drop(other);
        assert!(test.graph.del("target").await.unwrap().is_clean());
        assert_eq!(test.graph.acquire(id).unwrap_err(), Stale::Released);
    });
}

/// Stands for an NBD export: it owns its node, and clients own the export.
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

/// 38b54b6dc1, repaired by d626834849; row 3 seen from the graph. The export released its node when
/// it was closed, although connected clients still sent requests through it: they met a null
/// pointer.
#[test]
fn export_keeps_its_node_until_its_last_client_leaves() {
    run(|test| async move {
        let node = test.part("disk").await;
        let id = node.id();
        let export = Export::new(&node);
        let watched: Arc<dyn Stoppable> = export.clone();
        test.graph.on_shutdown(ShutdownStage::Exports, &watched);
        drop(watched);
        let client = export.client().unwrap();
        drop(node);

        let report = test.graph.shutdown().await;
        drop(export);
        assert!(report.closed.is_empty() && client.client().is_none(), "closed to new clients");
        let error = report.check_leaks().unwrap_err().to_string();
        assert!(error.contains("export 'disk'"), "{error}");
        // The remaining client is not affected.
        let edge = root(&client.node, "request", Access::READ);
        read(&edge).await.unwrap();
        drop(edge);
        assert_eq!(client.node.id(), id);

        drop(client);
        let again = test.graph.shutdown().await;
        assert_eq!((again.closed.len(), again.leaked.len()), (1, 0));
        assert_eq!(test.script.times("close disk"), 1);
    });
}

/// Stands for a job: everything it took is a field, so that dropping the job releases all of it.
struct Job {
    _slot: JobSlot,
    _blocker: crate::graph::Blocker,
    _edges: Vec<JobEdge>,
    filter: NodeRef,
}

/// Takes everything a mirror job takes, then checks its parameters. A later failure releases what
/// was taken before.
async fn create_job(test: &ScriptedGraph, speed: i64) -> Result<Job> {
    let source = test.graph.find("source")?;
    let target = test.graph.find("target")?;
    let slot = source.claim_job("mirror0")?;
    let blocker = target.block(BlockOps::DELETE, "job 'mirror0' writes to it");
    let only_mine = Access { perm: Perm::all(), shared: Perm::CONSISTENT_READ };
    let edges = vec![
        test.graph.attach_job(&source, "mirror0", Access::READ)?,
        test.graph.attach_job(&target, "mirror0", only_mine)?,
    ];
    let filter = test.graph.open(options("driver=sieve,node-name=filter,file=source")).await?;
    commit(test.graph.change().insert_filter(&source, &filter)).await?;
    if speed < 0 {
        commit(test.graph.change().drop_filter(&filter).remove(filter)).await?;
        return Err(Error::new(ErrorKind::InvalidInput, "a speed is not negative"));
    }
    Ok(Job { _slot: slot, _blocker: blocker, _edges: edges, filter })
}

/// Defect A of fa510ebffa, repaired by 18930ba3d1; row 32. Creating a job took a reference and then
/// checked the speed; with a bad one it returned and leaked the reference. Here every step fails
/// once, a bad speed included.
#[test]
fn job_that_cannot_be_created_keeps_nothing() {
    run(|test| async move {
        let source = test.part("source").await;
        let target = test.part("target").await;
        let guest = root(&source, "guest", Access::ALL);
        let before = test.snapshot();
        let error = create_job(&test, -1).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert_eq!(test.snapshot(), before);
        // A reader of the target does not share writing: the second edge is refused.
        let exclusive = root(&target, "reader", Access { shared: Perm::empty(), ..Access::READ });
        let refused = test.snapshot();
        assert_eq!(create_job(&test, 0).await.err().unwrap().kind(), ErrorKind::InUse);
        assert_eq!(test.snapshot(), refused);
        drop(exclusive);
        // The filter cannot be opened.
        test.script.fail_at("filter", Point::Open);
        assert_eq!(create_job(&test, 0).await.err().unwrap().kind(), ErrorKind::Io);
        assert_eq!(test.snapshot(), before);
        test.script.clear("filter", Point::Open);

        let job = test.fail_every_step(|| create_job(&test, 0)).await;
        assert_eq!(guest.target().id(), job.filter.id());
        assert!(source.job().is_some());
        assert_eq!(target.blocked(BlockOps::DELETE).len(), 1);
    });
}

/// Defect B of fa510ebffa, repaired by 18930ba3d1; row 32. The job took the reference, but its
/// release was left to each user's completion callback, and all callbacks but one omitted it. Here
/// the end of the job releases what it took, whatever its user does.
#[test]
fn job_releases_its_claims_whatever_its_user_does() {
    type Callback = fn(&NodeRef, Result<()>);
    let callbacks: [Callback; 3] = [
        |_, _| {},
        |node, result| assert!(result.is_ok() && node.is_writable()),
        |node, _| drop(node.clone()),
    ];
    for callback in callbacks {
        run(|test| async move {
            let source = test.part("source").await;
            let target = test.part("target").await;
            let before = test.snapshot();
            let job = create_job(&test, 0).await.unwrap();
            let filter = job.filter.clone();
            commit(test.graph.change().drop_filter(&filter)).await.unwrap();
            drop(filter);
            callback(&source, Ok(()));
            drop(job);
            test.graph.reap().await;
            assert_eq!(test.snapshot(), before, "claims, blockers and edges are gone");
            assert!(source.job().is_none() && target.blocked(BlockOps::all()).is_empty());
            assert_eq!(target.release(), Release::Last);
        });
    }
}

/// Defect C of a94a3fa..fa510eb, repaired by 3ae59580a0; row 2 seen from the graph. A drive's
/// record was freed when the drive was unplugged, while the node it described lived on through the
/// job's reference, and the job's end read the record. Here claims and bitmaps are part of the node
/// and end with it.
#[test]
fn node_state_lives_as_long_as_the_node() {
    run(|test| async move {
        let drive = test.part("drive").await;
        let id = drive.id();
        let record = drive.add_bitmap(BitmapOptions::named("record")).await.unwrap();
        let blocker = drive.block(BlockOps::RESIZE, "a job needs its length");
        let job = test.graph.attach_job(&drive, "backup0", Access::READ).unwrap();
        // Unplugged under the job.
        assert_eq!(drive.release(), Release::NotLast);
        test.graph.reap().await;
        assert_eq!(job.node().find_bitmap("record"), Some(record));
        assert_eq!(job.node().blocked(BlockOps::RESIZE).len(), 1);
        let lease = test.graph.lease_bitmap(record, "backup0").unwrap();
        drop(lease);

        drop(job);
        let closed = test.graph.reap().await;
        assert!(closed.len() == 1 && closed[0].is_clean(), "{closed:?}");
        assert_eq!(test.graph.acquire(id).unwrap_err(), Stale::Released);
        assert_eq!(test.graph.lease_bitmap(record, "late").unwrap_err().kind(), ErrorKind::Stale);
        // A guard that outlives the node holds nothing and is harmless.
        drop(blocker);
        test.assert_empty().await;
    });
}

//! Tests of the checks at the start: texts, kinds, and that nothing has changed.

use bds_core::graph::{BlockOps, NodeRef};
use bds_core::{Error, ErrorKind};
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions, Mirror, MirrorOptions, MirrorSync};
use bds_jobs::{JobOptions, JobStatus};

use super::kit::{LEN, World, shape, writer};

async fn mem(world: &World, name: &str, more: &str) -> NodeRef {
    world.open(&format!("driver=mem,node-name={name}{more}")).await
}

async fn refused(world: &World, options: MirrorOptions) -> Error {
    let before = shape(&world.graph);
    let error = Mirror::prepare(options).await.expect_err("it is refused");
    let _closed = world.graph.reap().await;
    assert_eq!(shape(&world.graph), before, "{error}");
    error
}

#[test]
fn wrong_options_are_refused_before_anything_changes() {
    let world = World::new(1);
    world.block_on(async {
        let source = mem(&world, "source", ",size=1M").await;
        let target = mem(&world, "target", ",size=1M").await;
        let long = mem(&world, "long", ",size=2M").await;
        let read_only = mem(&world, "frozen", ",size=1M,read-only=on").await;
        let new = || MirrorOptions::new(&source, &target, "mirror0");
        let check = async |options: MirrorOptions, kind: ErrorKind, words: &str| {
            let error = refused(&world, options).await;
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(error.kind(), kind, "{error}");
        };
        let wrong = ErrorKind::InvalidInput;
        let into_itself = MirrorOptions { target: source.clone(), ..new() };
        check(into_itself, wrong, "Can't mirror node into itself").await;
        for granularity in [256, 128 << 20] {
            let options = MirrorOptions { granularity: Some(granularity), ..new() };
            let words = "Parameter 'granularity' expects a value in range [512B, 64MB]";
            check(options, wrong, words).await;
        }
        let options = MirrorOptions { granularity: Some(12345), ..new() };
        check(options, wrong, "Parameter 'granularity' expects a power of 2").await;
        let options = MirrorOptions { buf_size: u64::MAX, ..new() };
        check(options, wrong, "Invalid parameter 'buf-size'").await;
        let options = MirrorOptions { target: long.clone(), ..new() };
        check(options, wrong, "Source and target image have different sizes").await;
        let options = MirrorOptions { target: read_only.clone(), ..new() };
        check(options, ErrorKind::ReadOnly, "read-only").await;
        let options = MirrorOptions { replaces: Some("nothing".into()), ..new() };
        let words = "Failed to find node with node-name='nothing'";
        check(options, ErrorKind::NotFound, words).await;
        let options = MirrorOptions { replaces: Some("long".into()), ..new() };
        let words = "Cannot replace 'long' by a node mirrored from 'source', because it cannot be \
                     guaranteed that doing so would not lead to an abrupt change of visible data";
        check(options, wrong, words).await;
        let blocker = source.block(BlockOps::DELETE, "something");
        drop(blocker);
        let other = target.claim_job("other").expect("free");
        check(new(), ErrorKind::InUse, "other").await;
        drop(other);
        let guest = writer(&target, "guest");
        check(new(), ErrorKind::InUse, "backend 'guest'").await;
        drop(guest);
        let options = MirrorOptions { filter_node_name: Some("source".into()), ..new() };
        check(options, ErrorKind::AlreadyExists, "the name 'source' is taken").await;
        let error = MirrorSync::parse("bitmap").expect_err("QEMU has none either");
        assert_eq!(error.message(), "Sync mode 'bitmap' not supported");
    });
    world.end();
}

#[test]
fn a_mirror_ends_while_its_nodes_may_not_be_ejected() {
    for is_cancelled in [false, true] {
        let world = World::new(1);
        world.block_on(async {
            let source = mem(&world, "source", ",size=1M").await;
            let target = mem(&world, "target", ",size=1M").await;
            let guest = writer(&source, "guest");
            let mirror = Mirror::prepare(MirrorOptions::new(&source, &target, "mirror0"));
            let mirror = Box::new(mirror.await.expect("it can be prepared"));
            let job = world.manager.start(JobOptions::new("mirror0"), mirror).await;
            let job = job.expect("it starts");
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            let _blockers = [&source, &target].map(|node| node.block(BlockOps::EJECT, "a user"));
            match is_cancelled {
                true => job.cancel(true).expect("it can be cancelled"),
                false => job.complete().expect("it completes"),
            }
            assert_eq!(job.wait().await.is_ok(), !is_cancelled);
            let now = if is_cancelled { &source } else { &target };
            assert_eq!(guest.node().expect("a disk").id(), now.id());
        });
        world.end();
    }
}

#[test]
fn places_in_the_graph_are_checked() {
    let world = World::new(1);
    world.block_on(async {
        world.put("base", &[0; 262_144]);
        let base = world.raw("base").await;
        world.make_qcow2("top", &format!("size={LEN}")).await;
        let top = world.qcow2("top", ",backing=base").await;
        let target = mem(&world, "target", &format!(",size={LEN}")).await;
        let filter =
            world.open("driver=throttle,node-name=filter,limits.bps-total=1T,file=base").await;
        for (source, target, words) in [
            (&top, &base, "'base' is in the backing chain of 'top'"),
            (&top, &filter, "to a filter on top of a node in the source's backing chain"),
            (&base, &filter, "Can't mirror node into itself"),
            (&base, &target, "Need a root block node"),
        ] {
            let error = refused(&world, MirrorOptions::new(source, target, "mirror0")).await;
            assert!(error.to_string().contains(words), "{error}");
        }
    });
    world.end();
}

#[test]
fn active_commits_are_checked() {
    let world = World::new(1);
    world.block_on(async {
        world.put("base", &[0; 262_144]);
        let base = world.raw("base").await;
        world.make_qcow2("top", &format!("size={LEN}")).await;
        let top = world.qcow2("top", ",backing=base").await;
        world.make_qcow2("sibling", &format!("size={LEN}")).await;
        let other = mem(&world, "other", ",size=1M").await;
        let new = || ActiveCommitOptions::new(&top, "commit0");
        let with_base = |base: &NodeRef| ActiveCommitOptions { base: Some(base.clone()), ..new() };
        let before = shape(&world.graph);
        for (options, words) in [
            (with_base(&top), "cannot commit an image into itself"),
            (with_base(&other), "Can't find 'other' in the backing chain"),
            (ActiveCommitOptions::new(&base, "commit0"), "There is no backimg image"),
            (
                ActiveCommitOptions { granularity: Some(1000), ..new() },
                "Parameter 'granularity' expects a power of 2",
            ),
        ] {
            let error = ActiveCommit::prepare(options).await.expect_err("refused");
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(shape(&world.graph), before);
        }
        let sibling = world.qcow2("sibling", ",backing=base").await;
        let user = writer(&sibling, "another guest");
        let before = shape(&world.graph);
        let error = ActiveCommit::prepare(new()).await.expect_err("the base is shared");
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("sibling.backing"), "{error}");
        let _closed = world.graph.reap().await;
        assert_eq!(shape(&world.graph), before);
        drop(user);
    });
    world.end();
}

//! A mirror of the top layer into an image whose backing node comes later (scenario 24 of
//! `docs/jobs-scenarios.md`): the layers below are copied by other means meanwhile, and the target
//! is put on top of their copy as a snapshot would be.

use std::time::Duration;

use bds_core::Options;
use bds_core::graph::NodeRef;
use bds_jobs::mirror::{Mirror, MirrorOptions, MirrorSync};
use bds_jobs::{CopyMode, JobHandle, JobOptions, JobStatus};
use bds_testkit::Chance;

use super::kit::{Client, Habits, LEN, World, bytes_of, first_difference, pattern, write, writer};

/// When the target gets its backing node.
#[derive(Clone, Copy, Debug)]
enum When {
    Running,
    Ready,
    Pending,
}

/// What the target's header says about a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recorded {
    Named,
    Not,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    when: When,
    recorded: Recorded,
    mode: CopyMode,
    seed: u64,
}

/// `top ─► middle ─► lowest`, each layer with bytes of its own; and what the top and the middle
/// show.
async fn chain(world: &World, chance: &mut Chance) -> (NodeRef, Vec<u8>, Vec<u8>) {
    let mut bytes = pattern(chance.draw(), LEN);
    world.put("lowest", &bytes);
    let mut top = world.raw("lowest").await;
    let mut below = Vec::new();
    for (name, under) in [("middle", "lowest"), ("top", "middle")] {
        below.clone_from(&bytes);
        let cluster = 1 << chance.between(9, 13);
        world.make_qcow2(name, &format!("size={LEN},cluster_size={cluster}")).await;
        top = world.qcow2(name, &format!(",backing={under}")).await;
        let disk = writer(&top, "fill");
        for _ in 0..6 {
            let at = chance.below(LEN / 1024) * 1024;
            let piece = vec![u8::try_from(chance.below(200)).expect("a byte"); 1024];
            write(&disk, at, &piece).await.expect("written");
            let start = usize::try_from(at).expect("small");
            bytes[start..start + piece.len()].copy_from_slice(&piece);
        }
        disk.flush().await.expect("flushed");
    }
    (top, bytes, below)
}

/// Opens the target alone, whatever its header records.
async fn target(world: &World, recorded: Recorded, chance: &mut Chance) -> NodeRef {
    let cluster = 1_u64 << chance.between(9, 16);
    // Version 2 has no zero clusters: it can only tell that something will be below by its header.
    let is_old = recorded == Recorded::Named && chance.one_in(3);
    let compat = if is_old { "0.10" } else { "1.1" };
    let mut create = format!("size={LEN},cluster_size={cluster},compat={compat}");
    if recorded == Recorded::Named {
        create += ",backing_file=/under,backing_fmt=raw";
    }
    world.make_qcow2("target", &create).await;
    let text = "driver=qcow2,node-name=target,discard=unmap,file.driver=file,\
                file.filename=/target,file.discard=unmap";
    let options = Options::parse(text).expect("well-formed");
    let options = options.with("backing", serde_json::Value::Null);
    world.graph.open(options).await.expect("it can be opened")
}

async fn attach(world: &World, under: &NodeRef, target: &NodeRef) {
    world.graph.append(under, target).await.expect("it becomes the overlay");
}

/// Waits for the moment of the case, attaches the backing node, and goes on until it is pending.
async fn until_pending(world: &World, case: Case, job: &JobHandle, nodes: (&NodeRef, &NodeRef)) {
    let (under, target) = nodes;
    let mut chance = Chance::new(case.seed ^ 0x1a7e);
    if let When::Running = case.when {
        bds_io::sleep(Duration::from_micros(chance.below(3000))).await;
        attach(world, under, target).await;
    }
    job.wait_status(JobStatus::Ready).await.expect("it gets ready");
    bds_io::sleep(Duration::from_micros(chance.below(4000))).await;
    if let When::Ready = case.when {
        attach(world, under, target).await;
        bds_io::sleep(Duration::from_micros(chance.below(4000))).await;
    }
    job.complete().expect("it completes");
    job.wait_status(JobStatus::Pending).await.expect("it is pending");
    if let When::Pending = case.when {
        attach(world, under, target).await;
    }
}

fn mirror_with_a_late_backing_node(case: Case) {
    let world = World::new(case.seed);
    world.block_on(async {
        let mut chance = Chance::new(case.seed);
        let (top, bytes, below) = chain(&world, &mut chance).await;
        world.put("under", &below);
        let under = world.raw("under").await;
        let target = target(&world, case.recorded, &mut chance).await;
        let habits =
            Habits { seed: case.seed, slot: 0, of: 2, cell: 2048, unmaps: true, pause_us: 60 };
        let client = Client::new(writer(&top, "client"), bytes, habits).start();
        let granularities = [None, Some(512), Some(4096)];
        let options = MirrorOptions {
            sync: MirrorSync::Top,
            granularity: granularities[usize::try_from(chance.below(3)).expect("small")],
            unmap: chance.one_in(2),
            copy_mode: case.mode,
            ..MirrorOptions::new(&top, &target, "mirror0")
        };
        let mirror = Mirror::prepare(options).await.expect("it can be prepared");
        let manual = JobOptions { auto_finalize: false, ..JobOptions::new("mirror0") };
        let job = world.manager.start(manual, Box::new(mirror)).await.expect("it starts");
        until_pending(&world, case, &job, (&under, &target)).await;
        let (from, to) = (bytes_of(&top).await, bytes_of(&target).await);
        assert_eq!(first_difference(&from, &to), None, "{case:?}");
        assert_eq!(bytes_of(&under).await, below, "{case:?}: nothing is written below");
        job.finalize().expect("it can be finalized");
        job.wait().await.expect("it ends well");
        let client = client.stop().await;
        assert_eq!(client.backend.node().map(|node| node.id()), Some(target.id()));
        client.check().await.unwrap_or_else(|words| panic!("{case:?}: {words}"));
    });
    world.end();
}

#[test]
fn scenario_24_the_backing_node_is_attached_late_by_a_snapshot() {
    for seed in crate::budget::seeds(6, 200) {
        for when in [When::Running, When::Ready, When::Pending] {
            for recorded in [Recorded::Named, Recorded::Not] {
                for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
                    mirror_with_a_late_backing_node(Case { when, recorded, mode, seed });
                }
            }
        }
    }
}

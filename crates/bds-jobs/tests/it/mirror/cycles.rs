//! Cycles of start, complete and cancel at random moments, with clients that come at random
//! moments: no acknowledged write is missing on the side that survives, and at the moment of the
//! end both sides hold the same bytes.
//!
//! `BDS_TEST_BUDGET=full` runs a thousand of each, `BDS_TEST_SEED=7` one.

use std::time::Duration;

use bds_core::graph::{NodeRef, walk};
use bds_core::request::Backend;
use bds_io::Task;
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions, Mirror, MirrorOptions};
use bds_jobs::{CopyMode, JobChange, JobHandle, JobOptions, JobStatus};
use bds_testkit::Chance;

use super::kit::{
    Client, Habits, LEN, Running, World, bytes_of, first_difference, pattern, shape, write, writer,
};

const DEFAULT_CYCLES: u64 = 60;

fn seeds() -> Vec<u64> {
    crate::budget::seeds(DEFAULT_CYCLES, crate::budget::CYCLES).collect()
}

/// The clients of one cycle, who come one by one.
struct Clients {
    /// The first one's backend, which shows what the disk's users use now.
    first: Option<Backend>,
    running: Vec<Running>,
    initial: Vec<u8>,
    of: u64,
    cell: u64,
    unmaps: bool,
}

impl Clients {
    fn new(chance: &mut Chance, initial: Vec<u8>) -> Self {
        let cells = [1024, 2048, 5120, 16384, 65536];
        let cell = cells[usize::try_from(chance.below(5)).expect("small")];
        Self { first: None, running: Vec::new(), initial, of: 4, cell, unmaps: !chance.one_in(3) }
    }

    /// The next client attaches to the node that the disk's users use now.
    fn come(&mut self, chance: &mut Chance) {
        let node = self.first.as_ref().and_then(Backend::node).expect("it has a medium");
        self.come_to(chance, &node);
    }

    fn come_to(&mut self, chance: &mut Chance, node: &NodeRef) {
        let slot = self.running.len() as u64;
        if slot >= self.of {
            return;
        }
        let backend = writer(node, "client");
        self.first.get_or_insert_with(|| backend.clone());
        let habits = Habits {
            seed: chance.draw(),
            slot,
            of: self.of,
            cell: self.cell,
            unmaps: self.unmaps,
            pause_us: chance.below(500),
        };
        self.running.push(Client::new(backend, self.initial.clone(), habits).start());
    }
}

async fn pause(chance: &mut Chance, max_us: u64) {
    bds_io::sleep(Duration::from_micros(chance.below(max_us))).await;
}

/// Makes a source and a target of random kinds.
async fn disks(world: &World, chance: &mut Chance) -> (NodeRef, NodeRef, Vec<u8>) {
    let bytes = pattern(chance.draw(), LEN);
    let cluster = 1 << chance.between(9, 16);
    world.put("lowest", &bytes);
    let source = match chance.below(4) {
        0 => world.raw("lowest").await,
        1 => {
            // Most writes are done inline.
            let memory =
                world.open(&format!("driver=mem,node-name=memory,size={LEN},discard=unmap")).await;
            write(&writer(&memory, "fill"), 0, &bytes).await.expect("written");
            memory
        }
        _ => {
            let lowest = world.raw("lowest").await;
            world.make_qcow2("overlay", &format!("size={LEN},cluster_size={cluster}")).await;
            let overlay = world.qcow2("overlay", ",backing=lowest").await;
            drop(lowest);
            overlay
        }
    };
    let target = match chance.below(2) {
        0 => {
            world.put("target", &pattern(chance.draw(), LEN));
            world.raw("target").await
        }
        _ => {
            let cluster = 1 << chance.between(9, 16);
            world.make_qcow2("target", &format!("size={LEN},cluster_size={cluster}")).await;
            world.qcow2("target", "").await
        }
    };
    (source, target, bytes)
}

fn options(chance: &mut Chance, source: &NodeRef, target: &NodeRef) -> MirrorOptions {
    let granularities = [None, Some(512), Some(4096), Some(16384), Some(65536)];
    let write_blocking = chance.one_in(2);
    MirrorOptions {
        granularity: granularities[usize::try_from(chance.below(5)).expect("small")],
        copy_mode: if write_blocking { CopyMode::WriteBlocking } else { CopyMode::Background },
        unmap: chance.one_in(2),
        max_pivot_stall: chance.one_in(2).then(|| Duration::from_millis(chance.between(1, 50))),
        ..MirrorOptions::new(source, target, "mirror0")
    }
}

/// Takes drained sections of the disks and of everything at random moments.
fn drain_now_and_then(world: &World, seed: u64, disks: [&NodeRef; 2]) -> Task<()> {
    let (graph, ids) = (world.graph.clone(), disks.map(NodeRef::id));
    bds_io::spawn(async move {
        let mut chance = Chance::new(seed);
        for _ in 0..chance.below(8) {
            pause(&mut chance, 2000).await;
            let node = ids.get(usize::try_from(chance.below(3)).expect("small"));
            let drained = match node.and_then(|id| graph.acquire(*id).ok()) {
                Some(node) => graph.drain(&node).await,
                None => graph.drain_all().await,
            };
            pause(&mut chance, 300).await;
            drop(drained);
        }
    })
}

/// Checks the images of formats that can be checked: no cluster has two owners.
async fn check_image(node: &NodeRef, seed: u64) {
    if node.driver_name() == "qcow2" {
        let reader = Backend::new(node, Default::default()).expect("it can be read");
        let report = reader.check(&|_, _| ()).await.expect("it can be checked");
        assert_eq!(report.corruptions, 0, "seed {seed}: '{}': {report:?}", node.name());
    }
}

/// How the job ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Pivoted,
    Kept,
}

/// Lets the job go on for a while, then ends it in some way.
async fn finish(
    chance: &mut Chance,
    job: &JobHandle,
    clients: &mut Clients,
    sides: (&NodeRef, &NodeRef),
) -> End {
    if chance.one_in(8) {
        pause(chance, 3000).await;
        job.cancel(true).expect("it can be cancelled");
        job.wait().await.expect_err("it was cancelled");
        return End::Kept;
    }
    job.wait_status(JobStatus::Ready).await.expect("it gets ready");
    if chance.one_in(3) {
        let change = JobChange::MirrorCopyMode(CopyMode::WriteBlocking);
        job.change(change).expect("it changes");
    }
    pause(chance, 3000).await;
    if chance.one_in(2) {
        clients.come(chance);
    }
    let completes = !chance.one_in(3);
    match completes {
        true => job.complete().expect("it completes"),
        false => job.cancel(chance.one_in(4)).expect("it can be cancelled"),
    }
    if !job.info().auto_finalize && job.wait_status(JobStatus::Pending).await.is_ok() {
        return finish_pending(chance, job, clients, sides, completes).await;
    }
    match job.wait().await {
        Ok(()) if completes => End::Pivoted,
        Ok(()) | Err(_) => End::Kept,
    }
}

/// Both sides are equal while the job is pending, and no write is acknowledged.
async fn finish_pending(
    chance: &mut Chance,
    job: &JobHandle,
    clients: &mut Clients,
    (source, target): (&NodeRef, &NodeRef),
    completes: bool,
) -> End {
    clients.come(chance);
    let (from, to) = (bytes_of(source).await, bytes_of(target).await);
    if let Some(difference) = first_difference(&from, &to) {
        panic!("source and target differ while the job is pending: {difference}");
    }
    bds_io::sleep(Duration::from_secs(5)).await;
    clients.come(chance);
    assert_eq!(bytes_of(source).await, from, "a write was let through");
    assert_eq!(bytes_of(target).await, to, "a write was let through");
    if chance.one_in(4) {
        job.cancel(true).expect("it can be cancelled");
        job.wait().await.expect_err("it was cancelled");
        return End::Kept;
    }
    job.finalize().expect("it can be finalized");
    job.wait().await.expect("it ends well");
    if completes { End::Pivoted } else { End::Kept }
}

/// Stops all clients and checks what they wrote.
async fn check(clients: Clients, expected: &NodeRef, seed: u64) {
    let mut acknowledged = 0;
    let mut stopped = Vec::new();
    drop(clients.first);
    for running in clients.running {
        stopped.push(running.stop().await);
    }
    for client in &stopped {
        let node = client.backend.node().expect("it has a medium");
        assert_eq!(node.id(), expected.id(), "seed {seed}: the client uses '{}'", node.name());
        client.check().await.unwrap_or_else(|words| panic!("seed {seed}: {words}"));
        acknowledged += client.acknowledged;
    }
    assert!(acknowledged > 0, "seed {seed}: no client got anything done");
}

fn job_options(chance: &mut Chance) -> JobOptions {
    JobOptions { auto_finalize: chance.one_in(2), ..JobOptions::new("mirror0") }
}

fn mirror_cycle(seed: u64) -> End {
    let world = World::new(seed);
    let mut chance = Chance::new(seed);
    let end = world.block_on(async {
        let (source, target, bytes) = disks(&world, &mut chance).await;
        let mut clients = Clients::new(&mut chance, bytes);
        clients.come_to(&mut chance, &source);
        pause(&mut chance, 2000).await;
        let before = shape(&world.graph);
        let drains = drain_now_and_then(&world, chance.draw(), [&source, &target]);
        let options = options(&mut chance, &source, &target);
        let mirror = Mirror::prepare(options).await.expect("it can be prepared");
        let job_options = job_options(&mut chance);
        let job = world.manager.start(job_options, Box::new(mirror)).await.expect("it starts");
        pause(&mut chance, 2000).await;
        if chance.one_in(2) {
            clients.come(&mut chance);
        }
        let sides = (&source, &target);
        let end = finish(&mut chance, &job, &mut clients, sides).await;
        drains.await;
        pause(&mut chance, 2000).await;
        let disk = if end == End::Pivoted { &target } else { &source };
        // A drain that looked at the filter just then may have been its last holder.
        let _closed = world.graph.reap().await;
        if end == End::Kept && clients.running.len() == 1 {
            assert_eq!(shape(&world.graph), before, "seed {seed}: the graph is as before");
        }
        assert_eq!(job.info().cleanup_error, None, "seed {seed}");
        check(clients, disk, seed).await;
        check_image(&source, seed).await;
        check_image(&target, seed).await;
        end
    });
    world.end();
    end
}

#[test]
fn no_write_is_lost_over_cycles_of_a_mirror() {
    let ends: Vec<End> = seeds().into_iter().map(mirror_cycle).collect();
    if ends.len() > 20 {
        assert!(ends.contains(&End::Pivoted) && ends.contains(&End::Kept));
    }
}

fn commit_cycle(seed: u64) -> End {
    let world = World::new(seed);
    let mut chance = Chance::new(seed);
    let end = world.block_on(async {
        let bytes = pattern(chance.draw(), LEN);
        world.put("base", &bytes);
        let base = world.raw("base").await;
        let mut below = "base".to_owned();
        let mut top = base.clone();
        for layer in 0..chance.between(1, 3) {
            let name = format!("layer{layer}");
            let cluster = 1 << chance.between(9, 16);
            world.make_qcow2(&name, &format!("size={LEN},cluster_size={cluster}")).await;
            top = world.qcow2(&name, &format!(",backing={below}")).await;
            below = name;
        }
        let mut clients = Clients::new(&mut chance, bytes);
        clients.come_to(&mut chance, &top);
        pause(&mut chance, 4000).await;
        let write_blocking = chance.one_in(2);
        let options = ActiveCommitOptions {
            copy_mode: if write_blocking { CopyMode::WriteBlocking } else { CopyMode::Background },
            ..ActiveCommitOptions::new(&top, "mirror0")
        };
        let drains = drain_now_and_then(&world, chance.draw(), [&top, &base]);
        let commit = ActiveCommit::prepare(options).await.expect("it can be prepared");
        let job_options = job_options(&mut chance);
        let job = world.manager.start(job_options, Box::new(commit)).await.expect("it starts");
        pause(&mut chance, 2000).await;
        let end = finish(&mut chance, &job, &mut clients, (&top, &base)).await;
        drains.await;
        let disk = if end == End::Pivoted { &base } else { &top };
        pause(&mut chance, 2000).await;
        assert_eq!(job.info().cleanup_error, None, "seed {seed}");
        check(clients, disk, seed).await;
        assert!(walk::next_below(&top).is_some(), "the layers are still there");
        check_image(&top, seed).await;
        end
    });
    world.end();
    end
}

#[test]
fn no_write_is_lost_over_cycles_of_an_active_commit() {
    let ends: Vec<End> = seeds().into_iter().map(commit_cycle).collect();
    if ends.len() > 20 {
        assert!(ends.contains(&End::Pivoted) && ends.contains(&End::Kept));
    }
}

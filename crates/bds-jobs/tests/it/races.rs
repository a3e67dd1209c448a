//! Random groups under random commands, drains and guest writes, on the deterministic scheduler.
//!
//! Each member holds an edge, a blocker, a job slot and a filter, and its part of the group's
//! change renames its node. After each seed: the state table was never violated, every job had
//! exactly one final event, was concluded and dismissed once and retired once; all nodes were
//! renamed if all jobs succeeded, else none; and the graph is what it was.
//!
//! `BDS_TEST_SEED=n` runs one seed, `BDS_TEST_BUDGET=full` ten thousand.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_core::driver::{BoxFuture, WriteFlags};
use bds_core::graph::{Access, BlockOps, Blocker, Change, Graph, JobEdge, JobSlot, NodeRef, Perm};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::{
    ErrorSite, ErrorVerdict, JobContext, JobDriver, JobEvent, JobHandle, JobManager, JobOptions,
    JobStatus, JobType, OnError, Outcome, Side,
};
use bds_testkit::Chance;

use crate::fake::{calm, manager};

/// A job that holds one of everything.
struct Greedy {
    node: NodeRef,
    filter: Option<NodeRef>,
    held: Option<(JobEdge, Blocker, JobSlot)>,
    is_mirror: bool,
    chance: Chance,
    /// Probability of a failure: one in so many.
    failures: u64,
    retired: Arc<Mutex<BTreeMap<String, u32>>>,
}

impl Greedy {
    async fn prepare(graph: &Graph, id: &str, node: &NodeRef, chance: Chance) -> Result<Self> {
        let access = Access { perm: Perm::CONSISTENT_READ, shared: Perm::all() };
        let slot = node.claim_job(id)?;
        let edge = graph.attach_job(node, id, access)?;
        let blocker = node.block(BlockOps::RESIZE, "a job runs");
        let options = format!(
            "driver=throttle,limits.iops-total=1000000000,node-name={id}-filter,file={}",
            node.name()
        );
        let filter = graph.open(Options::parse(&options)?).await?;
        graph.insert_filter(node, &filter).await?;
        let held = Some((edge, blocker, slot));
        let retired = Arc::default();
        let (node, filter) = (node.clone(), Some(filter));
        Ok(Self { node, filter, held, is_mirror: false, chance, failures: 0, retired })
    }

    fn may_fail(&mut self, what: &str) -> Result<()> {
        if self.failures > 0 && self.chance.one_in(self.failures) {
            return Err(Error::new(ErrorKind::Io, format!("{what} broke")));
        }
        Ok(())
    }

    /// Some time passes, or only a turn, or nothing.
    async fn pass(&mut self) {
        match self.chance.below(3) {
            0 => bds_io::yield_now().await,
            1 => bds_io::sleep(Duration::from_micros(self.chance.below(60))).await,
            _ => {}
        }
    }

    async fn work(&mut self, ctx: &JobContext) -> Result<()> {
        for _ in 0..self.chance.below(6) {
            self.pass().await;
            ctx.pause_point().await;
            match self.chance.below(4) {
                0 => ctx.throttle(4096).await,
                1 => {
                    let is_full = self.chance.one_in(2);
                    let kind = if is_full { ErrorKind::NoSpace } else { ErrorKind::Io };
                    let error = Error::new(kind, "request");
                    let site = ErrorSite { offset: 0, len: 512, node: "x".into() };
                    match ctx.on_error(Side::Target, site, &error).await {
                        ErrorVerdict::Fail => return Err(error),
                        _ => ctx.pause_point().await,
                    }
                }
                _ => ctx.progress().advance(1),
            }
            self.may_fail("run")?;
        }
        if !self.is_mirror {
            return Ok(());
        }
        ctx.ready().await;
        loop {
            ctx.pause_point().await;
            if ctx.complete_requested() || ctx.soft_cancel_requested() {
                return Ok(());
            }
            self.pass().await;
            bds_io::sleep(Duration::from_micros(20)).await;
        }
    }
}

impl JobDriver for Greedy {
    fn job_type(&self) -> JobType {
        if self.is_mirror { JobType::Mirror } else { JobType::Backup }
    }

    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.work(ctx))
    }

    fn plan<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        change: Change,
    ) -> BoxFuture<'a, Result<Change>> {
        Box::pin(async move {
            self.pass().await;
            self.may_fail("plan")?;
            self.pass().await;
            let filter = self.filter.as_ref().expect("until it is retired");
            Ok(change.drop_filter(filter).rename(&self.node, &format!("{}-done", ctx.id())))
        })
    }

    fn retire<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        outcome: Outcome<'a>,
    ) -> BoxFuture<'a, Result<()>> {
        let mut retired = self.retired.lock().expect("no thread panics");
        *retired.entry(ctx.id().to_owned()).or_default() += 1;
        drop(retired);
        Box::pin(async move {
            self.pass().await;
            if let (Some(filter), Outcome::Aborted(_)) = (&self.filter, outcome) {
                ctx.graph().drop_filter(filter).await?;
            }
            self.pass().await;
            self.held = None;
            let filter = self.filter.take().expect("retired once");
            filter.close().await?.into_result()
        })
    }

    fn supports_complete(&self) -> bool {
        self.is_mirror
    }

    fn supports_soft_cancel(&self) -> bool {
        self.is_mirror
    }
}

/// Nodes, guests and jobs of one seed.
struct World {
    jobs: JobManager,
    nodes: Vec<NodeRef>,
    guests: Vec<Backend>,
    handles: Vec<JobHandle>,
    retired: Arc<Mutex<BTreeMap<String, u32>>>,
}

impl World {
    async fn start(jobs: &JobManager, chance: &mut Chance) -> (Self, String) {
        let count = chance.between(1, 4);
        let failures = [0, 0, 40, 8][usize::try_from(chance.below(4)).expect("small")];
        let (mut nodes, mut guests) = (Vec::new(), Vec::new());
        for n in 0..count {
            let options = format!("driver=mem,node-name=n{n},size=64k");
            let node = jobs.graph().open(Options::parse(&options).expect("right")).await;
            let node = node.expect("a disk in memory");
            let options =
                BackendOptions { writable: true, ..BackendOptions::registered(format!("g{n}")) };
            guests.push(Backend::new(&node, options).expect("it is free"));
            nodes.push(node);
        }
        let before = jobs.graph().dump();
        let retired = Arc::default();
        let mut group: Vec<(JobOptions, Box<dyn JobDriver>)> = Vec::new();
        for (n, node) in nodes.iter().enumerate() {
            let id = format!("j{n}");
            let chance_of_job = Chance::new(chance.draw());
            let job = Greedy::prepare(jobs.graph(), &id, node, chance_of_job).await;
            let mut job = job.expect("nothing is in the way");
            job.is_mirror = chance.one_in(3);
            job.failures = failures;
            job.retired = Arc::clone(&retired);
            let policies = [OnError::Enospc, OnError::Ignore, OnError::Stop, OnError::Ignore];
            let options = JobOptions {
                speed: if chance.one_in(2) { 0 } else { 40_000_000 },
                auto_finalize: chance.one_in(2),
                auto_dismiss: chance.one_in(2),
                on_target_error: policies[usize::try_from(chance.below(4)).expect("small")],
                ..JobOptions::new(id)
            };
            group.push((options, Box::new(job)));
        }
        let handles = jobs.start_group(group).await.expect("the ids are free");
        (Self { jobs: jobs.clone(), nodes, guests, handles, retired }, before)
    }

    /// Commands, drains and writes for a while.
    async fn storm(&self, mut chance: Chance) {
        for _ in 0..chance.below(12) {
            bds_io::sleep(Duration::from_micros(chance.below(80))).await;
            let n = usize::try_from(chance.below(self.handles.len() as u64)).expect("small");
            let job = &self.handles[n];
            let done = match chance.below(16) {
                0..=2 => job.pause(),
                3..=5 => job.resume(),
                6 if chance.one_in(3) => job.cancel(false),
                7 if chance.one_in(5) => job.cancel(true),
                8 => job.complete(),
                9 => job.finalize(),
                10 => self.jobs.dismiss(job.id()),
                11 => job.set_speed(chance.below(100) * 1_000_000),
                12 => {
                    drop(self.jobs.graph().drain(&self.nodes[n]).await);
                    Ok(())
                }
                13 => {
                    assert!(self.jobs.query().len() <= self.handles.len());
                    Ok(())
                }
                _ => {
                    let bytes = vec![7; 512];
                    self.guests[n].write(0, bytes.into(), WriteFlags::empty()).await
                }
            };
            if let Err(error) = done {
                let kind = error.kind();
                assert!(
                    matches!(kind, ErrorKind::InvalidInput | ErrorKind::NotFound),
                    "a refusal: {error:?}"
                );
            }
        }
    }

    /// Lets all jobs end.
    async fn finish(&self) {
        for round in 0.. {
            if self.handles.iter().all(|job| job.status().is_over()) {
                break;
            }
            for job in &self.handles {
                // Each may be refused: the state is unknown.
                let _refused = [job.resume(), job.complete(), job.finalize()];
                if round > 50 {
                    let _refused = job.cancel(true);
                }
            }
            bds_io::sleep(Duration::from_micros(200)).await;
        }
        bds_io::sleep(Duration::from_millis(1)).await;
        for job in &self.handles {
            if job.status() == JobStatus::Concluded {
                self.jobs.dismiss(job.id()).expect("it is concluded");
            }
        }
    }

    /// The invariants at the end. True if the group took effect.
    async fn check(&self, before: &str, events: Vec<JobEvent>) -> bool {
        let mut results = Vec::new();
        for job in &self.handles {
            assert_eq!(job.status(), JobStatus::Null);
            results.push(job.wait().await.is_ok());
            assert_eq!(job.info().cleanup_error, None);
            check_events(job.id(), &events);
            let retired = self.retired.lock().expect("no thread panics").get(job.id()).copied();
            assert_eq!(retired, Some(1), "{} is retired once", job.id());
        }
        let is_committed = results[0];
        assert!(results.iter().all(|ok| *ok == is_committed), "all or none: {results:?}");
        let mut after = self.jobs.graph().dump();
        for (n, node) in self.nodes.iter().enumerate() {
            let done = format!("j{n}-done");
            assert_eq!(node.name() == done, is_committed, "all or none");
            after = after.replace(&done, &format!("n{n}"));
            assert_eq!(node.job(), None);
            assert!(node.blocked(BlockOps::all()).is_empty());
        }
        // The order of the nodes depends on their names.
        assert_eq!(sorted(&after), sorted(before));
        assert!(self.jobs.query().is_empty());
        assert_eq!(self.jobs.history().records.len(), self.handles.len());
        is_committed
    }
}

fn sorted(dump: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = dump.lines().collect();
    lines.sort_unstable();
    lines
}

/// One job's events: each state may follow the one before, one end, one final event before it.
fn check_events(id: &str, events: &[JobEvent]) {
    let mine: Vec<&JobEvent> = events.iter().filter(|event| event.id() == Some(id)).collect();
    let mut status = JobStatus::Undefined;
    let mut is_started = false;
    let mut ends = 0;
    for (place, event) in mine.iter().enumerate() {
        match event {
            JobEvent::StatusChange { status: next, .. } => {
                assert!(status.may_become(*next), "{id}: {status} -> {next}: {mine:?}");
                assert_ne!(status, *next, "{id}: no event without a change");
                is_started |= *next == JobStatus::Running;
                status = *next;
            }
            JobEvent::Cancelled(_) | JobEvent::Completed { .. } => {
                ends += 1;
                let concluded =
                    JobEvent::StatusChange { id: id.to_owned(), status: JobStatus::Concluded };
                assert_eq!(mine.get(place + 1), Some(&&concluded), "{id}: {mine:?}");
            }
            JobEvent::Ready(_) => assert_eq!(status, JobStatus::Ready),
            JobEvent::Pending { .. } => assert_eq!(status, JobStatus::Pending),
            _ => {}
        }
    }
    assert_eq!(status, JobStatus::Null, "{id}: {mine:?}");
    assert_eq!(ends, u32::from(is_started), "{id}: one final event if it had started: {mine:?}");
}

/// True if the group took effect.
fn run_seed(seed: u64) -> bool {
    let sim = calm(seed);
    let jobs = manager(&sim);
    let is_committed = sim.block_on(async {
        let mut chance = Chance::new(seed);
        let mut events = jobs.events();
        let (world, before) = World::start(&jobs, &mut chance).await;
        let world = Arc::new(world);
        let storms: Vec<_> = (0..3)
            .map(|_| {
                let (world, chance) = (Arc::clone(&world), Chance::new(chance.draw()));
                bds_io::spawn(async move { world.storm(chance).await })
            })
            .collect();
        for storm in storms {
            storm.await;
        }
        world.finish().await;
        let events = std::iter::from_fn(|| events.try_next()).collect();
        world.check(&before, events).await
    });
    sim.run_until_idle();
    sim.block_on(async { jobs.graph().shutdown().await.check_leaks() }).expect("no leak");
    is_committed
}

#[test]
fn races() {
    if let Ok(seed) = std::env::var("BDS_TEST_SEED") {
        run_seed(seed.parse().expect("a number"));
        return;
    }
    let is_full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    let (seeds, mut committed) = (if is_full { 10_000 } else { 1500 }, 0);
    for seed in 0..seeds {
        match std::panic::catch_unwind(|| run_seed(seed)) {
            Ok(is_committed) => committed += u64::from(is_committed),
            Err(panic) => {
                eprintln!("BDS_TEST_SEED={seed} runs this seed alone");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!((seeds / 5..seeds / 5 * 4).contains(&committed), "both ends: {committed} of {seeds}");
}

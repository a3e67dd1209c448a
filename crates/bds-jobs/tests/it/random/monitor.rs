//! Two clients that give commands to the graph and its jobs, and what they know about the jobs.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use bds_core::graph::{BitmapOptions, NodeId, NodeRef};
use bds_core::{ErrorKind, Result};
use bds_io::Sim;
use bds_io::sim::{Fault, OpMask};
use bds_jobs::backup::{AtLimit, Backup, BackupOptions, BackupSync, BitmapSync};
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions, Mirror, MirrorOptions, MirrorSync};
use bds_jobs::{
    Commit, CommitOptions, CopyMode, JobDriver, JobHandle, JobManager, JobOptions, JobStatus,
    OnError, Stream, StreamOptions,
};
use bds_testkit::{Chance, Tick};
use futures_util::future::{Either, join, select};

use super::disks::Disks;
use super::plan::{Command, DISKS, Plan, Verb};

/// Virtual time within which a command returns.
const LIMIT: Duration = Duration::from_secs(120);

/// What a backup that succeeds must hold.
pub(super) struct Copy {
    pub(super) target: NodeRef,
    pub(super) disk: usize,
    /// When its point in time is. `None`: the guest may have got an overlay before, so that what
    /// was copied is no longer the guest's disk.
    pub(super) window: Option<(Tick, Tick)>,
    /// The node whose increments go on from here.
    chain_of: Option<NodeId>,
}

/// A job that was started.
struct Started {
    job: JobHandle,
    copy: Option<Copy>,
}

/// A job that is prepared.
struct Prepared {
    options: JobOptions,
    driver: Box<dyn JobDriver>,
    copy: Option<Copy>,
}

pub(super) struct Monitor<'a> {
    sim: &'a Sim,
    pub(super) plan: &'a Plan,
    pub(super) disks: Disks,
    pub(super) jobs: JobManager,
    started: RefCell<Vec<Started>>,
    /// The last backup of a chain of increments, by the node that has the bitmap.
    bases: RefCell<HashMap<NodeId, NodeRef>>,
    next_id: Cell<u64>,
}

impl<'a> Monitor<'a> {
    pub(super) fn new(sim: &'a Sim, disks: Disks, plan: &'a Plan) -> Self {
        let jobs = JobManager::new(&disks.graph);
        let (started, bases) = (RefCell::default(), RefCell::default());
        Self { sim, plan, disks, jobs, started, bases, next_id: Cell::new(0) }
    }

    /// Gives all commands.
    pub(super) async fn play(&self) {
        join(self.client(0), self.client(1)).await;
    }

    async fn client(&self, number: usize) {
        for command in self.plan.commands.iter().filter(|c| c.client == number) {
            bds_io::sleep(Duration::from_micros(command.pause_us)).await;
            let result = self.within_limit(*command).await;
            if let Err(error) = result {
                let kind = error.kind();
                let is_refusal = matches!(
                    kind,
                    ErrorKind::InvalidInput
                        | ErrorKind::NotFound
                        | ErrorKind::InUse
                        | ErrorKind::NotSupported
                        | ErrorKind::Cancelled
                        | ErrorKind::AlreadyExists
                );
                assert!(
                    is_refusal || self.plan.has_faults(),
                    "seed {}: {command:?}: {error:?}",
                    self.plan.seed
                );
            }
        }
    }

    async fn within_limit(&self, command: Command) -> Result<()> {
        let done = pin!(self.give(command));
        let limit = pin!(bds_io::sleep(LIMIT));
        match select(done, limit).await {
            Either::Left((result, _)) => result,
            Either::Right(_) => {
                panic!("seed {}: {command:?} hangs\n{}", self.plan.seed, self.disks.graph.dump())
            }
        }
    }

    async fn give(&self, command: Command) -> Result<()> {
        let mut chance = Chance::new(command.pick);
        match command.verb {
            Verb::Snapshot => self.snapshot(command.disk, &mut chance).await,
            Verb::Backup
            | Verb::Increment
            | Verb::Mirror
            | Verb::ActiveCommit
            | Verb::Commit
            | Verb::Stream => {
                let prepared = self.prepare(command.verb, command.disk, &mut chance).await?;
                self.start(vec![prepared]).await
            }
            Verb::Group => self.group(command.disk, &mut chance).await,
            Verb::Bitmap => self.bitmap(command.disk, &mut chance).await,
            Verb::Drain => {
                let chain = self.disks.chain(command.disk);
                let node = &chain[chance.below(chain.len() as u64) as usize];
                let drained = self.disks.graph.drain(node).await;
                bds_io::sleep(Duration::from_micros(chance.below(500))).await;
                drop(drained);
                Ok(())
            }
            Verb::DrainAll => {
                drop(self.disks.graph.drain_all().await);
                Ok(())
            }
            Verb::Query => self.query(),
            Verb::Fault => {
                let errno = if chance.one_in(2) { libc::EIO } else { libc::ENOSPC };
                let ops = [OpMask::WRITE, OpMask::READ, OpMask::IO][chance.below(3) as usize];
                self.sim.fail_nth(chance.below(40), Fault::once(errno).on(ops));
                Ok(())
            }
            Verb::FailTarget => {
                let images = self.sim.paths().len() as u64;
                let path = format!("i{}.", images.saturating_sub(chance.below(3)));
                self.sim.fail_nth(0, Fault::sticky(libc::EIO).on(OpMask::WRITE).in_path(&path));
                Ok(())
            }
            Verb::Heal => {
                self.sim.clear_faults();
                Ok(())
            }
            verb => self.job_verb(verb, &mut chance),
        }
    }

    async fn snapshot(&self, disk: usize, chance: &mut Chance) -> Result<()> {
        let top = self.disks.top(disk);
        if self.disks.chain(disk).len() >= 4 {
            return Ok(());
        }
        let name = self.disks.create(chance, Some(&top)).await?;
        let overlay = self.disks.open(&name, None).await?;
        // Another command may have moved the guest meanwhile.
        if self.disks.top(disk).id() != top.id() {
            return Ok(());
        }
        self.disks.graph.append(&top, &overlay).await
    }

    async fn prepare(&self, verb: Verb, disk: usize, chance: &mut Chance) -> Result<Prepared> {
        self.next_id.set(self.next_id.get() + 1);
        let id = format!("j{}", self.next_id.get());
        let mut copy = None;
        let driver: Box<dyn JobDriver> = match verb {
            Verb::Backup => {
                let (backup, made) = self.backup(&id, disk, chance).await?;
                copy = Some(made);
                Box::new(backup)
            }
            Verb::Increment => {
                let (backup, made) = self.increment(&id, disk, chance).await?;
                copy = Some(made);
                Box::new(backup)
            }
            Verb::Mirror => Box::new(self.mirror(&id, disk, chance).await?),
            Verb::ActiveCommit => {
                let mut options = ActiveCommitOptions::new(&self.disks.top(disk), &id);
                options.copy_mode = copy_mode(chance);
                options.max_pivot_stall = chance.one_in(2).then(|| Duration::from_millis(5));
                Box::new(ActiveCommit::prepare(options).await?)
            }
            Verb::Commit => {
                let chain = self.disks.chain(disk);
                // Mostly an image below the guest's, into one below that.
                let first = u64::from(!chance.one_in(4)).min(chain.len() as u64 - 1);
                let top = chance.between(first, chain.len() as u64 - 1);
                let base = chance.between(top, chain.len() as u64 - 1);
                let node = |at: u64| Some(chain[at as usize].clone());
                let mut options = CommitOptions::new(&chain[0]);
                options.top = node(top);
                options.base = node(base).filter(|_| !chance.one_in(3));
                Commit::prepare(&id, options).await?
            }
            _ => {
                let chain = self.disks.chain(disk);
                let at = chance.below(chain.len() as u64) as usize;
                let mut options = StreamOptions::new(&chain[if chance.one_in(2) { 0 } else { at }]);
                options.base = chance.one_in(2).then(|| chain[chain.len() - 1].clone());
                Stream::prepare(&id, options).await?
            }
        };
        let policies = [OnError::Report, OnError::Stop, OnError::Ignore, OnError::Enospc];
        let mut policy = || policies[chance.below(4) as usize];
        let options = JobOptions {
            on_source_error: policy(),
            on_target_error: policy(),
            speed: if chance.one_in(3) { 4 << 20 } else { 0 },
            auto_finalize: !chance.one_in(3),
            auto_dismiss: chance.one_in(2),
            ..JobOptions::new(&id)
        };
        Ok(Prepared { options, driver, copy })
    }

    /// A full backup, or one of the disk's own layer.
    async fn backup(&self, id: &str, disk: usize, chance: &mut Chance) -> Result<(Backup, Copy)> {
        let source = self.disks.top(disk);
        let below = self.disks.chain(disk).get(1).cloned();
        let has_layer = source.driver_name() == "qcow2" && below.is_some();
        let is_top = has_layer && chance.one_in(3);
        let backing = below.filter(|_| is_top);
        let target = self.disks.image(chance, backing.as_ref()).await?;
        let mut options = BackupOptions::new(&source, &target, id);
        options.sync = if is_top { BackupSync::Top } else { BackupSync::Full };
        self.backup_of(options, disk, None, chance).await
    }

    /// The next backup of a chain of increments; a full one if there is none.
    async fn increment(
        &self,
        id: &str,
        disk: usize,
        chance: &mut Chance,
    ) -> Result<(Backup, Copy)> {
        let source = self.disks.top(disk);
        let base = self.bases.borrow().get(&source.id()).cloned();
        if base.is_none() && source.find_bitmap("chain").is_none() {
            let granularity = Some([512, 4096, 65536][chance.below(3) as usize]);
            let options = BitmapOptions { granularity, ..BitmapOptions::named("chain") };
            source.add_bitmap(options).await?;
        }
        let target = self.disks.image(chance, base.as_ref()).await?;
        let mut options = BackupOptions::new(&source, &target, id);
        options.bitmap = Some("chain".into());
        options.bitmap_mode = Some(BitmapSync::OnSuccess);
        options.sync = if base.is_some() { BackupSync::Incremental } else { BackupSync::Full };
        self.backup_of(options, disk, Some(source.id()), chance).await
    }

    async fn backup_of(
        &self,
        mut options: BackupOptions,
        disk: usize,
        chain_of: Option<NodeId>,
        chance: &mut Chance,
    ) -> Result<(Backup, Copy)> {
        options.staging_len = [0, 64 << 10, 1 << 20][chance.below(3) as usize];
        options.staging_policy = if chance.one_in(2) { AtLimit::Stall } else { AtLimit::Throttle };
        let (source, target) = (options.source.clone(), options.target.clone());
        let model = &self.disks.disks[disk].model;
        let from = model.now();
        let backup = Backup::prepare(options).await?;
        let is_top = self.disks.top(disk).id() == source.id();
        let window = is_top.then(|| (from, model.now()));
        Ok((backup, Copy { target, disk, window, chain_of }))
    }

    async fn mirror(&self, id: &str, disk: usize, chance: &mut Chance) -> Result<Mirror> {
        let source = self.disks.top(disk);
        let below = self.disks.chain(disk).get(1).cloned();
        let is_top = source.driver_name() == "qcow2" && below.is_some() && chance.one_in(3);
        let backing = below.filter(|_| is_top);
        let target = self.disks.image(chance, backing.as_ref()).await?;
        let mut options = MirrorOptions::new(&source, &target, id);
        options.sync = if is_top { MirrorSync::Top } else { MirrorSync::Full };
        options.copy_mode = copy_mode(chance);
        options.granularity = [None, Some(512), Some(4096), Some(65536)][chance.below(4) as usize];
        options.unmap = chance.one_in(2);
        options.target_is_zero = !is_top && chance.one_in(2);
        options.max_pivot_stall = chance.one_in(2).then(|| Duration::from_millis(5));
        Mirror::prepare(options).await
    }

    /// Two jobs of two disks as a group.
    async fn group(&self, disk: usize, chance: &mut Chance) -> Result<()> {
        let verbs = [Verb::Backup, Verb::Mirror, Verb::Commit, Verb::Stream, Verb::Increment];
        let mut group: Vec<Prepared> = Vec::new();
        for n in 0..2 {
            let verb = verbs[chance.below(5) as usize];
            match self.prepare(verb, (disk + n) % DISKS, chance).await {
                Ok(prepared) => group.push(prepared),
                Err(error) if group.is_empty() => return Err(error),
                Err(_) => {}
            }
        }
        self.start(group).await
    }

    async fn start(&self, group: Vec<Prepared>) -> Result<()> {
        let (mut jobs, mut copies) = (Vec::new(), Vec::new());
        for Prepared { options, driver, copy } in group {
            jobs.push((options, driver));
            copies.push(copy);
        }
        let handles = self.jobs.start_group(jobs).await?;
        let started = handles.into_iter().zip(copies).map(|(job, copy)| Started { job, copy });
        self.started.borrow_mut().extend(started);
        self.note_increments();
        Ok(())
    }

    /// Remembers the increments that are done as what the next ones are based on.
    fn note_increments(&self) {
        for started in &*self.started.borrow() {
            let Some(Copy { target, chain_of: Some(source), .. }) = &started.copy else { continue };
            if started.job.info().error.is_none() && started.job.status().is_over() {
                self.bases.borrow_mut().insert(*source, target.clone());
            }
        }
    }

    async fn bitmap(&self, disk: usize, chance: &mut Chance) -> Result<()> {
        let node = self.disks.top(disk);
        let name = ["a", "b"][chance.below(2) as usize];
        match chance.below(6) {
            0 | 1 => node.add_bitmap(BitmapOptions::named(name)).await.map(drop),
            2 => node.remove_bitmap(name).await,
            3 => node.clear_bitmap(name).await,
            4 => node.merge_bitmaps("a", &[(&node, "b")]).await,
            _ => {
                let change = self.disks.graph.change().add_bitmap(&node, BitmapOptions::named("b"));
                let other = self.disks.top((disk + 1) % DISKS);
                change.clear_bitmap(&other, "a").commit().await.map(drop)
            }
        }
    }

    fn job_verb(&self, verb: Verb, chance: &mut Chance) -> Result<()> {
        let started = self.started.borrow();
        // Mostly one of the last.
        let reach = if chance.one_in(4) { started.len() } else { started.len().min(4) };
        let back = 1 + chance.below(reach as u64) as usize;
        let Some(started) = started.len().checked_sub(back).map(|at| &started[at]) else {
            return Ok(());
        };
        let job = &started.job;
        match verb {
            Verb::Pause => job.pause(),
            Verb::Resume => job.resume(),
            Verb::Complete => job.complete(),
            Verb::Cancel => job.cancel(chance.one_in(2)),
            Verb::Finalize => job.finalize(),
            Verb::Dismiss => self.jobs.dismiss(job.id()),
            _ => job.set_speed([0, 1 << 20, 64 << 20][chance.below(3) as usize]),
        }
    }

    fn query(&self) -> Result<()> {
        assert!(self.disks.graph.query_graph()["nodes"].is_array());
        let _jobs = self.jobs.query();
        self.note_increments();
        Ok(())
    }

    /// Lets all jobs end: faults are over, what waits for a command gets it.
    pub(super) async fn end_jobs(&self) {
        self.sim.clear_faults();
        let jobs: Vec<JobHandle> = self.started.borrow().iter().map(|s| s.job.clone()).collect();
        for round in 0.. {
            if jobs.iter().all(|job| job.status().is_over()) {
                break;
            }
            let words = || format!("{:?}\n{}", self.jobs.query(), self.disks.graph.dump());
            assert!(round < 4000, "seed {}: a job does not end: {}", self.plan.seed, words());
            for job in jobs.iter().filter(|job| !job.status().is_over()) {
                // Each may be refused: the state is unknown.
                let _refused = [job.resume(), job.set_speed(0), job.complete(), job.finalize()];
                if round > 1000 {
                    let _refused = job.cancel(true);
                }
            }
            bds_io::sleep(Duration::from_millis(if round < 500 { 1 } else { 50 })).await;
        }
        for job in jobs.iter().filter(|job| job.status() == JobStatus::Concluded) {
            self.jobs.dismiss(job.id()).expect("it is concluded");
        }
    }

    /// Ends the knowledge about jobs: backups that succeeded, and how many jobs did.
    pub(super) fn into_results(self) -> (Disks, JobManager, Vec<Copy>, u64) {
        let has_faults = self.plan.has_faults();
        let (mut copies, mut count) = (Vec::new(), 0);
        for Started { job, copy } in self.started.into_inner() {
            let info = job.info();
            if !job.status().is_over() {
                continue;
            }
            let seed = self.plan.seed;
            assert!(has_faults || info.cleanup_error.is_none(), "seed {seed}: {info:?}");
            if info.error.is_none() {
                count += 1;
                copies.extend(copy);
            } else if !has_faults {
                check_failure(info.error.as_deref().unwrap_or_default(), seed);
            }
        }
        (self.disks, self.jobs, copies, count)
    }
}

/// Without faults a job fails only because it was cancelled, or another of its group failed.
fn check_failure(error: &str, seed: u64) {
    assert!(error.contains("canceled"), "seed {seed}: a job failed without a fault: {error}");
}

fn copy_mode(chance: &mut Chance) -> CopyMode {
    if chance.one_in(2) { CopyMode::Background } else { CopyMode::WriteBlocking }
}

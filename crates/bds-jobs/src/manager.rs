//! `JobManager`: owns all jobs of a graph, starts them, and finds them for commands.

use std::sync::Arc;

use bds_core::graph::{Graph, ShutdownStage, Stoppable};
use bds_core::{Error, ErrorKind, Result};

use crate::context::JobContext;
use crate::driver::{JobDriver, Outcome};
use crate::event::JobEvents;
use crate::handle::JobHandle;
use crate::job::{Facts, GroupSignal, Job};
use crate::kinds::JobChange;
use crate::options::JobOptions;
use crate::query::{History, JobInfo};
use crate::registry::Registry;
use crate::state::JobVerb;
use crate::txn::{self, Group};

/// The jobs of a graph. Clones are the same manager. [`Graph::shutdown`] ends all its jobs.
#[derive(Clone, Debug)]
pub struct JobManager(Arc<Registry>);

/// A job to start: its options and its work.
pub type NewJob = (JobOptions, Box<dyn JobDriver>);

impl JobManager {
    /// Makes the manager of a graph's jobs and registers it with the graph's shutdown.
    pub fn new(graph: &Graph) -> Self {
        let registry = Registry::new(graph);
        let stoppable: Arc<dyn Stoppable> = registry.clone();
        graph.on_shutdown(ShutdownStage::Jobs, &stoppable);
        Self(registry)
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// Checks that a job of this id could be started now, before its set-up.
    ///
    /// # Errors
    /// `InvalidInput`: the id is not well-formed; `AlreadyExists`: it is in use.
    pub fn check_id(&self, id: &str) -> Result<()> {
        JobOptions::new(id).check()?;
        self.0.lock().check_free(id)
    }

    /// Starts a job. It runs in a task of its own.
    ///
    /// # Errors
    /// The job was retired as aborted and nothing remains. `InvalidInput`: its id is not
    /// well-formed; `AlreadyExists`: it is in use; `Cancelled`: the graph was shut down.
    pub async fn start(&self, options: JobOptions, job: Box<dyn JobDriver>) -> Result<JobHandle> {
        let mut handles = self.start_group(vec![(options, job)]).await?;
        Ok(handles.pop().expect("one for each job"))
    }

    /// Starts jobs that take effect together or not at all: if one fails or is cancelled, all end
    /// as cancelled, and nothing has changed.
    ///
    /// # Errors
    /// As [`JobManager::start`]: none was started, all were retired.
    pub async fn start_group(&self, jobs: Vec<NewJob>) -> Result<Vec<JobHandle>> {
        Ok(self.enter(vec![jobs]).await?.begin())
    }

    /// Enters groups of jobs in the list, all or none, without starting them: their ids are taken.
    ///
    /// # Errors
    /// As [`JobManager::start_group`].
    pub(crate) async fn enter(&self, groups: Vec<Vec<NewJob>>) -> Result<Entered> {
        let (graph, events) = (&self.0.graph, &self.0.events);
        let mut entered = Vec::with_capacity(groups.len());
        for jobs in groups {
            let signal = Arc::<GroupSignal>::default();
            let mut group = Group { jobs: Vec::with_capacity(jobs.len()), signal };
            let mut drivers = Vec::with_capacity(jobs.len());
            for (options, driver) in jobs {
                let facts = facts(driver.as_ref());
                group.jobs.push(Job::new(graph, events, &group.signal, options, facts));
                drivers.push(driver);
            }
            entered.push((group, drivers));
        }
        let all: Vec<_> = entered.iter().flat_map(|(group, _)| &group.jobs).cloned().collect();
        let entered = Entered { registry: Arc::clone(&self.0), groups: entered };
        match self.0.register(&all) {
            Ok(()) => Ok(entered),
            Err(error) => Err(bds_io::spawn_now(entered.refuse(error)).detach_on_drop().await),
        }
    }

    /// The job of this id, of any type: what the `job-…` commands find.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn job(&self, id: &str) -> Result<JobHandle> {
        let job = self.0.lock().find(id);
        job.map(JobHandle).ok_or_else(|| Error::new(ErrorKind::NotFound, "Job not found"))
    }

    /// The job of this id on nodes of the graph: what the `block-job-…` commands find.
    ///
    /// # Errors
    /// `NotFound` (QMP class `DeviceNotActive`).
    pub fn block_job(&self, id: &str) -> Result<JobHandle> {
        let job = self.0.lock().find(id).filter(|job| job.facts.job_type.is_block_job());
        job.map(JobHandle)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("Block job '{id}' not found")))
    }

    /// All jobs, newest first.
    pub fn jobs(&self) -> Vec<JobHandle> {
        self.0.lock().jobs.iter().rev().cloned().map(JobHandle).collect()
    }

    /// Pauses a job: see [`JobHandle::pause`].
    ///
    /// # Errors
    /// As there, and `NotFound`.
    pub fn pause(&self, id: &str) -> Result<()> {
        self.job(id)?.pause()
    }

    /// Resumes a job: see [`JobHandle::resume`].
    ///
    /// # Errors
    /// As there, and `NotFound`.
    pub fn resume(&self, id: &str) -> Result<()> {
        self.job(id)?.resume()
    }

    /// Cancels a job: see [`JobHandle::cancel`].
    ///
    /// # Errors
    /// As there, and `NotFound`.
    pub fn cancel(&self, id: &str, is_forced: bool) -> Result<()> {
        self.job(id)?.cancel(is_forced)
    }

    /// Completes a job: see [`JobHandle::complete`].
    ///
    /// # Errors
    /// As there, and `NotFound`.
    pub fn complete(&self, id: &str) -> Result<()> {
        self.job(id)?.complete()
    }

    /// Finalizes a job's group: see [`JobHandle::finalize`].
    ///
    /// # Errors
    /// As there, and `NotFound`.
    pub fn finalize(&self, id: &str) -> Result<()> {
        self.job(id)?.finalize()
    }

    /// Sets a job's speed: see [`JobHandle::set_speed`].
    ///
    /// # Errors
    /// As there, and `NotFound`.
    pub fn set_speed(&self, id: &str, speed: u64) -> Result<()> {
        self.job(id)?.set_speed(speed)
    }

    /// Changes an option of a job: see [`JobHandle::change`].
    ///
    /// # Errors
    /// As there, and `NotFound`.
    pub fn change(&self, id: &str, change: JobChange) -> Result<()> {
        self.job(id)?.change(change)
    }

    /// Forgets a concluded job: its id is free, and its record goes to the history.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput`: it is not concluded.
    pub fn dismiss(&self, id: &str) -> Result<()> {
        let mut list = self.0.lock();
        let job = list.find(id).ok_or_else(|| Error::new(ErrorKind::NotFound, "Job not found"))?;
        job.status().check(id, JobVerb::Dismiss)?;
        list.dismiss(&job);
        Ok(())
    }

    /// All jobs as queries show them, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        self.0.lock().jobs.iter().rev().map(|job| JobInfo::of(job)).collect()
    }

    /// Records of jobs that were dismissed, oldest first.
    pub fn history(&self) -> History {
        self.0.lock().history.clone()
    }

    /// Subscribes to events of all jobs, in order, from now on.
    pub fn events(&self) -> JobEvents {
        self.0.events.subscribe()
    }
}

/// Groups of jobs that are in the list and have not begun.
pub(crate) struct Entered {
    registry: Arc<Registry>,
    groups: Vec<(Group, Vec<Box<dyn JobDriver>>)>,
}

impl Entered {
    /// Starts them. Returns the handles in the order of the jobs.
    pub(crate) fn begin(self) -> Vec<JobHandle> {
        let mut handles = Vec::new();
        for (group, drivers) in self.groups {
            handles.extend(group.jobs.iter().map(|job| JobHandle(Arc::clone(job))));
            bds_io::spawn(txn::conduct(Arc::clone(&self.registry), group, drivers)).detach();
        }
        handles
    }

    /// Cancels them before they begin, and waits until they have given everything back.
    pub(crate) async fn abandon(self) {
        let jobs = self.groups.iter().flat_map(|(group, _)| group.jobs.iter());
        jobs.for_each(|job| job.force_cancel());
        for handle in self.begin() {
            // Cancelled, in any case.
            let _result = handle.wait().await;
        }
    }

    /// Retires them: they were not entered.
    async fn refuse(self, error: Error) -> Error {
        let members = self
            .groups
            .into_iter()
            .flat_map(|(group, drivers)| group.jobs.into_iter().zip(drivers).collect::<Vec<_>>());
        let mut failed = None;
        for (job, mut driver) in members.collect::<Vec<_>>().into_iter().rev() {
            let retired = driver.retire(&JobContext(job), Outcome::Aborted(&error)).await;
            failed = failed.or(retired.err());
        }
        match failed {
            Some(failed) => error.caused_by(failed),
            None => error,
        }
    }
}

fn facts(driver: &dyn JobDriver) -> Facts {
    Facts {
        job_type: driver.job_type(),
        targets: driver.target_nodes(),
        ignored_error: driver.ignored_error(),
        supports_complete: driver.supports_complete(),
        supports_soft_cancel: driver.supports_soft_cancel(),
        control: driver.control(),
    }
}

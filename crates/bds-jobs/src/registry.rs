//! The list of a graph's jobs, the records of those that were dismissed, and the end of all at the
//! graph's shutdown.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::driver::BoxFuture;
use bds_core::graph::{Graph, Stoppable};
use bds_core::{Error, ErrorKind, Result};

use crate::event::EventHub;
use crate::job::Job;
use crate::query::{History, JobInfo};
use crate::state::JobStatus;

/// The jobs of a graph.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) graph: Graph,
    pub(crate) events: EventHub,
    list: Mutex<List>,
}

#[derive(Debug, Default)]
pub(crate) struct List {
    /// In the order of their creation.
    pub(crate) jobs: Vec<Arc<Job>>,
    pub(crate) history: History,
    is_shut_down: bool,
}

impl Registry {
    pub(crate) fn new(graph: &Graph) -> Arc<Self> {
        let (events, list) = (EventHub::new(), Mutex::default());
        Arc::new(Self { graph: graph.clone(), events, list })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds all jobs to the list, or none.
    pub(crate) fn register(&self, jobs: &[Arc<Job>]) -> Result<()> {
        let mut list = self.lock();
        if list.is_shut_down {
            return Err(Error::new(ErrorKind::Cancelled, "the graph was shut down"));
        }
        for (index, job) in jobs.iter().enumerate() {
            job.options.check()?;
            list.check_free(job.id())?;
            if jobs[..index].iter().any(|other| other.id() == job.id()) {
                return Err(in_use(job.id()));
            }
        }
        for job in jobs {
            job.transition(&mut job.lock(), JobStatus::Created);
            list.jobs.push(Arc::clone(job));
        }
        Ok(())
    }

    /// Dismisses a job that just concluded, unless a user was quicker.
    pub(crate) fn dismiss_now(&self, job: &Arc<Job>) {
        self.lock().dismiss(job);
    }
}

impl List {
    pub(crate) fn find(&self, id: &str) -> Option<Arc<Job>> {
        self.jobs.iter().find(|job| job.id() == id).cloned()
    }

    pub(crate) fn check_free(&self, id: &str) -> Result<()> {
        if self.jobs.iter().any(|job| job.id() == id) { Err(in_use(id)) } else { Ok(()) }
    }

    /// concluded → null, and out of the list, unless that happened already.
    pub(crate) fn dismiss(&mut self, job: &Arc<Job>) {
        let Some(place) = self.jobs.iter().position(|known| Arc::ptr_eq(known, job)) else {
            return;
        };
        self.history.push(JobInfo::of(job));
        self.jobs.remove(place);
        job.transition(&mut job.lock(), JobStatus::Null);
    }
}

fn in_use(id: &str) -> Error {
    Error::new(ErrorKind::AlreadyExists, format!("Job ID '{id}' already in use"))
}

impl Stoppable for Registry {
    fn name(&self) -> String {
        "block jobs".to_owned()
    }

    fn stop(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let jobs = {
                let mut list = self.lock();
                list.is_shut_down = true;
                list.jobs.clone()
            };
            jobs.iter().for_each(|job| job.force_cancel());
            let mut failed = None;
            for job in jobs {
                // Its result was asked for by its user, or is in the history.
                let _result = job.wait().await;
                failed = failed.or(job.lock().cleanup_error.as_ref().map(Error::duplicate));
                self.dismiss_now(&job);
            }
            failed.map_or(Ok(()), Err)
        })
    }
}

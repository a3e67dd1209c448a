//! What must not be done to a node just now, and why; and which job works on it.
//!
//! Existence is not exclusivity: a reference keeps a node, it never means "busy". Who needs a node left alone says so here,
//! with a reason that the next user reads. Guards take their claim back, so none can be forgotten; they hold no reference, so none
//! keeps the node open.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use slab::Slab;

use super::node::Node;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::NodeRef;

bitflags::bitflags! {
    /// Things that can be asked of a node as a whole.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Operations: u32 {
        /// Being copied by a backup job.
        const BACKUP_SOURCE = 1;
        /// Being written by a backup job.
        const BACKUP_TARGET = 1 << 1;
        /// Being committed into the node below.
        const COMMIT_SOURCE = 1 << 2;
        /// Being committed into.
        const COMMIT_TARGET = 1 << 3;
        /// Being deleted by name.
        const DELETE = 1 << 4;
        /// Being taken out of a backend, or another one put in its place.
        const EJECT = 1 << 5;
        /// Getting an overlay.
        const EXTERNAL_SNAPSHOT = 1 << 6;
        /// Getting an internal snapshot, or losing one.
        const INTERNAL_SNAPSHOT = 1 << 7;
        /// Being copied by a mirror job.
        const MIRROR_SOURCE = 1 << 8;
        /// Being written by a mirror job.
        const MIRROR_TARGET = 1 << 9;
        /// Changing its length at a user's wish.
        const RESIZE = 1 << 10;
        /// Being filled from below.
        const STREAM = 1 << 11;
        /// Giving its place to another node.
        const REPLACE = 1 << 12;
    }
}

impl fmt::Display for Operations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> =
            self.iter_names().map(|(name, _)| name.to_lowercase().replace('_', "-")).collect();
        f.write_str(&words.join(", "))
    }
}

struct Block {
    operations: Operations,
    reason: Arc<str>,
}

#[derive(Default)]
struct Book {
    blocks: Slab<Block>,
    job: Option<Arc<str>>,
}

/// A node's claims. Nothing is allocated before the first.
#[derive(Default)]
pub(in crate::graph) struct Claims(OnceLock<Arc<Mutex<Book>>>);

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Some operations are refused on a node until this is dropped.
#[must_use = "the operations are allowed again when this is dropped"]
pub struct Blocker {
    book: Arc<Mutex<Book>>,
    place: usize,
}

impl fmt::Debug for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let book = lock(&self.book);
        let block = &book.blocks[self.place];
        write!(f, "Blocker({}: {})", block.operations, block.reason)
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        lock(&self.book).blocks.remove(self.place);
    }
}

/// A job's place on its main node, until this is dropped.
#[must_use = "the place is free again when this is dropped"]
pub struct JobSlot {
    book: Arc<Mutex<Book>>,
}

impl fmt::Debug for JobSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JobSlot({})", lock(&self.book).job.as_deref().unwrap_or_default())
    }
}

impl Drop for JobSlot {
    fn drop(&mut self) {
        lock(&self.book).job = None;
    }
}

impl Node {
    fn book(&self) -> Arc<Mutex<Book>> {
        Arc::clone(self.claims.0.get_or_init(Arc::default))
    }

    /// Is this operation refused, and why?
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let blocker = disk.block(Operations::RESIZE, "a backup runs");
    /// disk.check_allowed(Operations::EJECT)?;
    /// let error = disk.check_allowed(Operations::RESIZE).unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': resize is not possible now: a backup runs");
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// `InUse` with the first reason.
    pub fn check_allowed(&self, operation: Operations) -> Result<()> {
        match self.blocked(operation).into_iter().next() {
            None => Ok(()),
            Some(reason) => {
                let words = format!("{operation} is not possible now: {reason}");
                Err(Error::new(ErrorKind::InUse, words).node(self.name()))
            }
        }
    }

    /// The reasons why any of these operations is refused.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let one = disk.block(Operations::RESIZE, "a backup runs");
    /// let two = disk.block(Operations::RESIZE | Operations::DELETE, "it is exported");
    /// let reasons = disk.blocked(Operations::all());
    /// assert_eq!((reasons.len(), &*reasons[1]), (2, "it is exported"));
    /// # Ok(()) });
    /// ```
    pub fn blocked(&self, operations: Operations) -> Vec<Arc<str>> {
        let Some(book) = self.claims.0.get() else { return Vec::new() };
        let book = lock(book);
        let blocks = book.blocks.iter().map(|(_, block)| block);
        let hits = blocks.filter(|block| block.operations.intersects(operations));
        hits.map(|block| Arc::clone(&block.reason)).collect()
    }

    /// The job whose main node this is.
    pub fn job(&self) -> Option<Arc<str>> {
        self.claims.0.get().and_then(|book| lock(book).job.clone())
    }
}

impl NodeRef {
    /// Has these operations refused, with this reason, until the answer is dropped. Several may block the same.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// graph.add(Options::parse("driver=memory,node-name=disk")?).await?;
    /// let blocker = graph.find("disk")?.block(Operations::DELETE, "a backup runs");
    /// let error = graph.del("disk").await.unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': delete is not possible now: a backup runs");
    /// drop(blocker); // allowed again, and it kept no reference
    /// graph.del("disk").await?;
    /// # Ok(()) });
    /// ```
    pub fn block(&self, operations: Operations, reason: &str) -> Blocker {
        let book = self.node().book();
        let place = lock(&book).blocks.insert(Block { operations, reason: reason.into() });
        Blocker { book, place }
    }

    /// Takes the one place for a job on this node.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let slot = disk.claim_job("backup0")?;
    /// assert_eq!(disk.job().as_deref(), Some("backup0"));
    /// let error = disk.claim_job("mirror0").unwrap_err();
    /// assert_eq!(error.message(), "job 'backup0' works on it: wait for it, or cancel it");
    /// drop(slot);
    /// disk.claim_job("mirror0")?;
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// `InUse` names the job that has it.
    pub fn claim_job(&self, job: &str) -> Result<JobSlot> {
        let book = self.node().book();
        let mut guard = lock(&book);
        if let Some(other) = &guard.job {
            let words = format!("job '{other}' works on it: wait for it, or cancel it");
            return Err(Error::new(ErrorKind::InUse, words).node(self.name()));
        }
        guard.job = Some(job.into());
        drop(guard);
        Ok(JobSlot { book })
    }
}

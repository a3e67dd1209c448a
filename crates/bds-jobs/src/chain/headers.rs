//! Rewrites the backing files that images record, all or none: what was written is written back if
//! the job fails.
//!
//! Each record that is written is valid under the graph before the end of the job and after it, so
//! a crash between two of them does no harm.

use bds_core::driver::BackingRecord;
use bds_core::graph::{Access, NodeRef, Perm};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, Result};

use super::names;
use super::take_out::{DROP_TIMEOUT, Deadline};
use super::writable::MadeWritable;

struct Rewritten {
    image: NodeRef,
    old: Option<BackingRecord>,
}

/// Records that a job has rewritten.
#[derive(Default)]
pub(crate) struct Headers {
    rewritten: Vec<Rewritten>,
    writable: MadeWritable,
}

impl Headers {
    /// Rewrites the record of one image, durably and with all of its data durable before. An image
    /// that is read-only is made writable.
    ///
    /// # Errors
    /// Name the image; call [`Headers::write_back`] then.
    pub(crate) async fn rewrite(
        &mut self,
        image: &NodeRef,
        new: Option<BackingRecord>,
        job: &str,
    ) -> Result<()> {
        let named = |error: Error| {
            let words =
                format!("image '{}': cannot rewrite the backing file it records", image.name());
            error.context(words).node(image.name())
        };
        let old = names::recorded(image).await.map_err(named)?;
        self.writable.make(image).await.map_err(named)?;
        let backend = writer(image, job).map_err(named)?;
        // Noted before: after an error, or if this is dropped, the new record may be there.
        self.rewritten.push(Rewritten { image: image.clone(), old });
        backend.set_backing_record(new).await.map_err(named)
    }

    /// Writes the old records back, the last one first. Goes on after an error and returns the
    /// first.
    pub(crate) async fn write_back(&mut self, job: &str) -> Result<()> {
        let mut first = Ok(());
        while let Some(Rewritten { image, old }) = self.rewritten.pop() {
            let written = async { writer(&image, job)?.set_backing_record(old).await };
            let words = "cannot write back the backing file that the image recorded";
            first = first.and(written.await.map_err(|e| e.context(words).node(image.name())));
        }
        first.and(self.finish().await)
    }

    /// Keeps the new records; images are read-only again that were.
    pub(crate) async fn finish(&mut self) -> Result<()> {
        self.rewritten.clear();
        self.writable.restore(Deadline::after(DROP_TIMEOUT)).await
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rewritten.is_empty() && self.writable.is_empty()
    }
}

/// A user of the image that may write what does not change what is read.
fn writer(image: &NodeRef, job: &str) -> Result<Backend> {
    let access = Access { perm: Perm::WRITE_UNCHANGED, shared: Perm::all() };
    Backend::new(image, BackendOptions::job(job, access))
}

/// Lets an overlay forget what its backing file showed, before a job writes that: the overlay
/// decides every byte that the job changes, so the base stays right for it. An image that is
/// read-only is made writable for it. Where that fails the note stays, and a crash leaves a chain
/// that is opened with `backing-check=off`.
pub(crate) async fn forget_base(image: &NodeRef, job: &str) {
    let (image, job) = (image.clone(), job.to_owned());
    let forget = async move {
        let nothing = Access { perm: Perm::empty(), shared: Perm::all() };
        let info = Backend::new(&image, BackendOptions::job(&*job, nothing))?.info().await?;
        if !info.marks_base {
            return Ok(());
        }
        let mut writable = MadeWritable::default();
        writable.make(&image).await?;
        let forgotten = async { writer(&image, &job)?.forget_base().await }.await;
        forgotten.and(writable.restore(Deadline::after(DROP_TIMEOUT)).await)
    };
    // Ends what it has begun also if the set-up of the job is dropped.
    let forgotten: Result<()> = bds_io::spawn_now(forget).detach_on_drop().await;
    if let Err(error) = forgotten {
        tracing::warn!(%error, "an overlay keeps its note of a base that is written now");
    }
}

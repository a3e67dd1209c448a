//! What an earlier run has left of a point, and whether this run can go on with it.
//!
//! **Why a point that goes on is right.** The job compares each chunk that it would copy with what
//! its record says of the target, by content, so a chunk that this run copies is what the source
//! holds now. All other chunks show the point below, and the bitmap of that point says that the
//! source holds the same there. So no chunk may be stored in the image that the bitmap does not
//! mark: [`check_layer`] looks.

use bds_core::copy::CopyMap;
use bds_core::driver::{Precision, StatusFlags};
use bds_core::graph::{Graph, NodeRef};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::record::{RecordState, look_at_record};

use super::notes::Found;
use crate::backup_set::{BackupSet, Kind, Point, image_name};
use crate::image;

/// What was found.
#[derive(Debug)]
pub(super) enum Leftover {
    Nothing,
    /// The open image.
    Usable(NodeRef),
    /// Why not.
    Unusable(String),
}

/// The point that this run makes.
pub(super) struct Wanted<'a> {
    pub(super) graph: &'a Graph,
    pub(super) set: &'a BackupSet,
    pub(super) source: &'a NodeRef,
    pub(super) number: u32,
    pub(super) base: Option<&'a Point>,
    /// What of the source differs from the base; everything without one.
    pub(super) map: &'a CopyMap,
    pub(super) notes: &'a Found,
}

impl Wanted<'_> {
    /// Finds out what was left. Changes nothing but the name of an image that has its final one
    /// too early.
    ///
    /// # Errors
    /// Something could not be read, so it is not known: nothing is to be removed.
    pub(super) async fn left(&self) -> Result<Leftover> {
        if self.notes.notes().is_some() {
            self.set.recover_image(self.number)?;
        }
        if std::fs::symlink_metadata(self.set.partial_image(self.number)).is_err() {
            return Ok(Leftover::Nothing);
        }
        if let Err(why) = self.check_notes() {
            return unusable(why);
        }
        let node = match open(self.graph, self.set, self.number).await {
            Ok(node) => node,
            Err(error) => return unusable(error),
        };
        match self.check(&node).await {
            Ok(()) => Ok(Leftover::Usable(node)),
            Err(error) => {
                // Nothing was written to it, and the first error is the one that matters.
                let _closed = node.close().await;
                unusable(error)
            }
        }
    }

    fn check_notes(&self) -> Result<()> {
        let refuse = |words: &str| Err(Error::new(ErrorKind::InvalidImage, words));
        let notes = match self.notes {
            Found::Notes(notes) => notes,
            Found::Missing => return refuse("there are no notes of what it is"),
            Found::Damaged => return refuse("the notes of what it is are damaged"),
        };
        match (notes.kind, self.base) {
            (Kind::Full, None) => {}
            (Kind::Full, Some(_)) => return refuse("it is a full backup"),
            (Kind::Incremental, None) => return refuse("it is an increment"),
            (Kind::Incremental, Some(base)) => {
                if notes.base != Some(base.manifest.root().to_string()) {
                    return refuse("it is an increment on another point");
                }
            }
        }
        match notes.are_of(self.source) {
            true => Ok(()),
            false => refuse("it is of another disk"),
        }
    }

    async fn check(&self, node: &NodeRef) -> Result<()> {
        let refuse = |words: &str| Err(Error::new(ErrorKind::InvalidImage, words));
        if node.len() != self.source.len() {
            return refuse("the source has another length now");
        }
        let record = self.set.record(self.number);
        match look_at_record(&record, self.source, node).await? {
            RecordState::Fits => {}
            RecordState::Missing => return refuse("there is no record of what its image holds"),
            RecordState::Damaged => return refuse("the record of what its image holds is damaged"),
        }
        let backend = image::backend(node, false)?;
        let base = self.base.map(|base| image_name(base.number));
        if backend.info().await?.backing_file != base.map(Into::into) {
            return refuse("its image has another backing file");
        }
        let report = backend.check(&|_, _| {}).await?;
        if report.corruptions != 0 || report.check_errors != 0 {
            return refuse("its image is damaged");
        }
        check_layer(&backend, self.map).await
    }
}

/// Checks that the image itself holds nothing that is not to be copied.
async fn check_layer(image: &Backend, map: &CopyMap) -> Result<()> {
    let mut at = 0;
    while at < image.len() {
        let run = image.layer_status(at, image.len() - at, Precision::Exact).await?;
        let end = at + run.len.clamp(1, image.len() - at);
        if run.flags.contains(StatusFlags::ALLOCATED) && map.bitmap().next_clean(at..end).is_some()
        {
            let message = format!("its image holds what has not changed, at byte {at}");
            return Err(Error::new(ErrorKind::InvalidImage, message));
        }
        at = end;
    }
    Ok(())
}

/// Opens the image of a point that is being made.
pub(super) async fn open(graph: &Graph, set: &BackupSet, number: u32) -> Result<NodeRef> {
    let mut options = Options::new();
    options.set("driver", "qcow2");
    options.set("discard", "unmap");
    options.set("file.driver", "file");
    options.set_path("file.filename", set.partial_image(number));
    graph.open(options).await
}

/// # Errors
/// The error is one of the system, not of what was found: another run may get further.
fn unusable(error: Error) -> Result<Leftover> {
    match error.kind() {
        ErrorKind::InvalidImage
        | ErrorKind::InvalidInput
        | ErrorKind::NotSupported
        | ErrorKind::NotFound
        | ErrorKind::Corrupt
        | ErrorKind::LimitExceeded => Ok(Leftover::Unusable(crate::report::message(&error))),
        _ => Err(error.context("cannot look at the unfinished backup (see --start-over)")),
    }
}

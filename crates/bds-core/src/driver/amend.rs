//! A change of an image's format options (`amend`): what is to change, its progress, and its
//! cancellation.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;

/// A change of an image's format options.
#[derive(Clone, Debug, Default)]
pub struct Amendment {
    /// Options by the names of [`super::DriverType::amend_options`].
    pub options: Options,
    /// Allows changes that lose data in some cases (erasing the last key of an encrypted image).
    pub force: bool,
    /// The node has persistent bitmaps, in the image or only in memory so far. Set by the request
    /// path.
    pub has_persistent_bitmaps: bool,
    /// Receives progress; cancels.
    pub control: AmendControl,
}

impl Amendment {
    /// These options, without force.
    pub fn new(options: Options) -> Self {
        Self { options, ..Self::default() }
    }
}

type Report = dyn Fn(u64, u64) + Send + Sync;

/// Progress and cancellation of an [`Amendment`]. Clones are the same.
#[derive(Clone, Default)]
pub struct AmendControl(Arc<Shared>);

#[derive(Default)]
struct Shared {
    is_cancelled: AtomicBool,
    report: Option<Box<Report>>,
}

impl fmt::Debug for AmendControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AmendControl(cancelled: {})", self.is_cancelled())
    }
}

impl AmendControl {
    /// `report` is called with (done, total), in units of the driver, from the task that does the
    /// work. Both may rise; `done` never falls.
    pub fn new(report: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        let is_cancelled = AtomicBool::new(false);
        Self(Arc::new(Shared { is_cancelled, report: Some(Box::new(report)) }))
    }

    /// Lets the work end at its next step. Without effect once the change is being made.
    pub fn cancel(&self) {
        self.0.is_cancelled.store(true, Ordering::Release);
    }

    /// True if it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.is_cancelled.load(Ordering::Acquire)
    }

    /// Reports progress. For drivers, between steps that may stand alone.
    ///
    /// # Errors
    /// `Cancelled`: the work is to end.
    pub fn step(&self, done: u64, total: u64) -> Result<()> {
        if let Some(report) = &self.0.report {
            report(done, total);
        }
        if self.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "the change of options was cancelled"));
        }
        Ok(())
    }
}

//! Tests of the graph on the fake drivers of the test kit.

mod bitmaps;
mod change;
mod close;
mod close_reports;
mod create;
mod gate_interleavings;
mod history;
mod open;
mod properties;
mod reference_gate;
mod schedules;
mod tally;
mod threads;
mod unpolled_futures;

use std::sync::Mutex;

use crate::error::{Error, ErrorKind, Result};

/// Makes numbered steps fail.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<Option<usize>>);

impl Faults {
    /// Fails the n-th step from now, counted from 0; `None` fails none.
    fn set(&self, step: Option<usize>) {
        *self.0.lock().unwrap() = step;
    }

    /// True if the step has failed.
    fn has_struck(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }

    pub(super) fn step(&self) -> Result<()> {
        let mut left = self.0.lock().unwrap();
        match *left {
            None => Ok(()),
            Some(0) => {
                *left = None;
                Err(Error::new(ErrorKind::Io, "injected failure of a step"))
            }
            Some(n) => {
                *left = Some(n - 1);
                Ok(())
            }
        }
    }
}

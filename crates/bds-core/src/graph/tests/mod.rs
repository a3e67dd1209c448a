//! The graph with small fake drivers.

mod bitmaps;
mod change;
mod close;
mod close_reports;
mod create;
mod fakes;
mod gate_interleavings;
mod gates;
mod history;
mod open;
mod properties;
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
    /// Fails the n-th step from here, counted from 0. `None`: none.
    fn set(&self, step: Option<usize>) {
        *self.0.lock().unwrap() = step;
    }

    /// Has it failed?
    fn has_struck(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }

    pub(super) fn step(&self) -> Result<()> {
        let mut left = self.0.lock().unwrap();
        match *left {
            None => Ok(()),
            Some(0) => {
                *left = None;
                Err(Error::new(ErrorKind::Io, "a step was told to fail"))
            }
            Some(n) => {
                *left = Some(n - 1);
                Ok(())
            }
        }
    }
}

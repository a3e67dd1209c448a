//! Ctrl-C: the first asks the command to stop and say what it leaves behind, the second ends it at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::TERM_SIGNALS;
use signal_hook::flag;

/// What a shell reports for a program that Ctrl-C ended.
pub(crate) const EXIT_CODE: u8 = 130;

/// Whether the user wants the command to stop.
#[derive(Clone, Debug)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Watches for the signals from now on.
    pub(crate) fn watch() -> io::Result<Self> {
        let wanted = Arc::new(AtomicBool::new(false));
        for signal in TERM_SIGNALS {
            // Order matters: the second signal finds the flag set by the first.
            flag::register_conditional_shutdown(*signal, EXIT_CODE.into(), Arc::clone(&wanted))?;
            flag::register(*signal, Arc::clone(&wanted))?;
        }
        Ok(Self(wanted))
    }

    /// Does the user want the command to stop?
    pub(crate) fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Stop {
    /// The flag itself, for the library's own loops.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

//! Signals that ask the process to stop: the first one lets the command clean up, a later one ends it at once.
//!
//! "Later" is a second later: `timeout` and some shells send the same signal twice, to the process and to its group, and
//! the twin must not cut the cleaning short.
//!
//! A signal that the process was started with ignored stays ignored (`nohup`, `trap '' INT`): its parent wants it so.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bds_core::{Error, ErrorKind, Result};
use bds_io::Task;
use futures_util::future::{Either, select};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXCPU};
use signal_hook::flag;

/// What asks a process to end, and may be caught.
const SIGNALS: [i32; 5] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGXCPU];
/// A signal handler can wake no future, so what waits for a signal looks this often.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// From this long after the first signal on, another one ends the process at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// The number of the first signal that arrived; 0 if none has.
static FIRST: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// Tells whether the command was asked to stop.
#[derive(Clone, Debug)]
pub(crate) struct Stop {
    wanted: Arc<AtomicBool>,
    /// Makes the next signal deadly some time after the first. Dropped, and so ended, with the last clone.
    _patience: Arc<Task<()>>,
}

impl Stop {
    /// Watches for the signals from now on, while the current Context is driven. Called once a process: each call adds
    /// handlers.
    pub(crate) fn watch() -> Result<Self> {
        Self::register().map_err(|e| Error::io(e, "cannot watch for signals"))
    }

    fn register() -> io::Result<Self> {
        let wanted = Arc::new(AtomicBool::new(false));
        let is_deadly = Arc::new(AtomicBool::new(false));
        let first = FIRST.get_or_init(Arc::default);
        for signal in SIGNALS {
            if bds_io::signals::is_ignored(signal)? {
                continue;
            }
            let code = i32::from(code_of(signal));
            flag::register_conditional_shutdown(signal, code, Arc::clone(&is_deadly))?;
            let number = usize::try_from(signal).expect("signals have positive numbers");
            flag::register_usize(signal, Arc::clone(first), number)?;
            flag::register(signal, Arc::clone(&wanted))?;
        }
        let patience = bds_io::spawn(lose_patience(Arc::clone(&wanted), is_deadly));
        Ok(Self { wanted, _patience: Arc::new(patience) })
    }

    /// Whether a signal has arrived.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// The flag itself, for the library's own loops.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.wanted)
    }

    /// Runs `work` to its end, or drops it when a signal arrives. For work that undoes itself when it is dropped.
    ///
    /// # Errors
    /// Those of the work; `Cancelled` after a signal.
    pub(crate) async fn or_drop<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let signal = pin!(arrival(&self.wanted));
        match select(pin!(work), signal).await {
            Either::Left((ended, _)) => ended,
            Either::Right(((), _)) => Err(Error::new(ErrorKind::Cancelled, "interrupted")),
        }
    }
}

async fn arrival(wanted: &AtomicBool) {
    while !wanted.load(Ordering::Relaxed) {
        bds_io::sleep(POLL_INTERVAL).await;
    }
}

async fn lose_patience(wanted: Arc<AtomicBool>, is_deadly: Arc<AtomicBool>) {
    arrival(&wanted).await;
    bds_io::sleep(PATIENCE).await;
    is_deadly.store(true, Ordering::Relaxed);
}

/// What a shell reports for a process that the first signal ended; `None` if no signal has arrived.
pub(crate) fn exit_code() -> Option<u8> {
    let number = FIRST.get()?.load(Ordering::Relaxed);
    i32::try_from(number).ok().filter(|number| *number > 0).map(code_of)
}

/// 128 and the number, as shells count.
fn code_of(signal: i32) -> u8 {
    u8::try_from(signal).map_or(u8::MAX, |number| number.saturating_add(128))
}

//! Handles SIGINT, SIGTERM and the like: the first one lets the command clean up, one that comes a
//! second later exits at once.
//!
//! `timeout` and some shells send the same signal twice, to the process and to its group; the
//! second must not cut the clean-up short, hence the second. A signal that was ignored when the
//! process started stays ignored (`nohup`, `trap '' INT`).

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

/// The signals that end a process and may be caught.
const SIGNALS: [i32; 5] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGXCPU];
/// A signal handler cannot wake a future, so waiting for a signal polls at this interval.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// From this long after the first signal on, another one exits at once.
const GRACE_PERIOD: Duration = Duration::from_secs(1);

/// The number of the first signal that arrived; 0 if none has.
static FIRST: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// A flag that the first signal sets.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt {
    arrived: Arc<AtomicBool>,
    /// Lets the next signal exit at once, some time after the first. Cancelled with the last clone.
    _grace_period: Arc<Task<()>>,
}

impl Interrupt {
    /// Watches for the signals from now on, while the current Context is driven. Called once a
    /// process: each call adds handlers.
    pub(crate) fn watch() -> Result<Self> {
        Self::register().map_err(|e| Error::io(e, "cannot watch for signals"))
    }

    fn register() -> io::Result<Self> {
        let arrived = Arc::new(AtomicBool::new(false));
        let exits_at_once = Arc::new(AtomicBool::new(false));
        let first = FIRST.get_or_init(Arc::default);
        for signal in SIGNALS {
            if bds_io::signals::is_ignored(signal)? {
                continue;
            }
            let code = i32::from(code_of(signal));
            flag::register_conditional_shutdown(signal, code, Arc::clone(&exits_at_once))?;
            let number = usize::try_from(signal).expect("signals have positive numbers");
            flag::register_usize(signal, Arc::clone(first), number)?;
            flag::register(signal, Arc::clone(&arrived))?;
        }
        let grace_period = bds_io::spawn(wait_grace_period(Arc::clone(&arrived), exits_at_once));
        Ok(Self { arrived, _grace_period: Arc::new(grace_period) })
    }

    /// Whether a signal has arrived.
    pub(crate) fn has_arrived(&self) -> bool {
        self.arrived.load(Ordering::Relaxed)
    }

    /// The flag itself, for the library's own loops.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.arrived)
    }

    /// Runs `work` to its end, or drops it when a signal arrives. For work that cleans up when it
    /// is dropped.
    ///
    /// # Errors
    /// Those of the work; `Cancelled` after a signal.
    pub(crate) async fn run_or_drop<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let signal = pin!(arrival(&self.arrived));
        match select(pin!(work), signal).await {
            Either::Left((ended, _)) => ended,
            Either::Right(((), _)) => Err(Error::new(ErrorKind::Cancelled, "interrupted")),
        }
    }
}

async fn arrival(arrived: &AtomicBool) {
    while !arrived.load(Ordering::Relaxed) {
        bds_io::sleep(POLL_INTERVAL).await;
    }
}

async fn wait_grace_period(arrived: Arc<AtomicBool>, exits_at_once: Arc<AtomicBool>) {
    arrival(&arrived).await;
    bds_io::sleep(GRACE_PERIOD).await;
    exits_at_once.store(true, Ordering::Relaxed);
}

/// Returns the exit code for the first signal, as a shell reports it; `None` if no signal has
/// arrived.
pub(crate) fn exit_code() -> Option<u8> {
    let number = FIRST.get()?.load(Ordering::Relaxed);
    i32::try_from(number).ok().filter(|number| *number > 0).map(code_of)
}

/// 128 plus the number, as shells do.
fn code_of(signal: i32) -> u8 {
    u8::try_from(signal).map_or(u8::MAX, |number| number.saturating_add(128))
}

//! Points at which tests make the library panic; nothing in builds without debug assertions.
//!
//! One point is armed at a time: the n-th thread that comes to it panics. The boundary and the
//! queues promise what a caller finds afterwards (`entry.rs`, `ticket.rs`), and tests hold them to
//! it. `bds_test_panic_at`, which no header declares and no version of the library exports, lets C
//! programs arm one.

/// Panics here, once, if a test asked for it.
#[inline(always)]
pub(crate) fn point(name: &'static str) {
    #[cfg(debug_assertions)]
    armed::point(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
pub(crate) mod armed {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Mutex, PoisonError};
    use std::thread;

    /// Set while a point is armed, so that all others cost one load.
    static IS_ARMED: AtomicBool = AtomicBool::new(false);
    /// The point, and how many threads pass it before one panics.
    static ARMED: Mutex<Option<(String, u64)>> = Mutex::new(None);

    fn lock() -> std::sync::MutexGuard<'static, Option<(String, u64)>> {
        ARMED.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn point(name: &'static str) {
        // A second panic of a thread would end the process.
        if !IS_ARMED.load(Ordering::Relaxed) || thread::panicking() {
            return;
        }
        let mut armed = lock();
        let Some((wanted, left)) = armed.as_mut() else { return };
        if wanted != name {
            return;
        }
        if *left > 0 {
            *left -= 1;
            return;
        }
        *armed = None;
        IS_ARMED.store(false, Ordering::Relaxed);
        drop(armed);
        panic!("injected at {name}");
    }

    /// Arms a point: it is passed `skip` times first. An empty name disarms. Returns whether the
    /// point that was armed before is still armed: no thread came to it.
    pub(crate) fn arm(name: &str, skip: u64) -> bool {
        let next = (!name.is_empty()).then(|| (name.to_owned(), skip));
        IS_ARMED.store(next.is_some(), Ordering::Relaxed);
        std::mem::replace(&mut *lock(), next).is_some()
    }
}

/// `armed::arm` for C: 1 or 0; -1 for a name that is none.
#[cfg(debug_assertions)]
#[unsafe(no_mangle)]
extern "C" fn bds_test_panic_at(name: crate::ptr::Text, skip: u64) -> i32 {
    name.str("name").map_or(-1, |name| i32::from(armed::arm(name, skip)))
}

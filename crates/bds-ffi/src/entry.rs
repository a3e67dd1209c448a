//! The boundary around every exported function: fork check, panics, errors.
//!
//! A panic does not leave the library: it becomes `BDS_ERR_PANIC`, and what the call worked on is
//! poisoned on the way (`table::Ref`). A process that was forked off gets `BDS_ERR_FORKED` before
//! any lock is touched, because a lock may be held by a thread that the child does not have.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::abi::bds_status::{BDS_ERR_FORKED, BDS_ERR_PANIC};
use crate::failure::{self, Failure};
use crate::fault;

/// Set in the child of a fork.
static IS_FORKED: AtomicBool = AtomicBool::new(false);

/// Marks this process as a forked one; called in the child.
pub(crate) extern "C" fn mark_forked() {
    IS_FORKED.store(true, Ordering::Relaxed);
}

/// Runs the body of a function that returns a status.
#[inline]
pub(crate) fn entry(name: &'static str, body: impl FnOnce() -> Result<i32, Failure>) -> i32 {
    if IS_FORKED.load(Ordering::Relaxed) {
        return BDS_ERR_FORKED as i32;
    }
    let body = || {
        fault::point("entry");
        body()
    };
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(failure)) => failure::record(name, failure),
        Err(payload) => record_panic(name, payload),
    }
}

/// Runs the body of a function that returns something else; `otherwise` after a failure.
#[inline]
pub(crate) fn entry_or<T>(
    name: &'static str,
    otherwise: T,
    body: impl FnOnce() -> Result<T, Failure>,
) -> T {
    let mut value = None;
    entry(name, || {
        value = Some(body()?);
        Ok(0)
    });
    value.unwrap_or(otherwise)
}

#[cold]
fn record_panic(name: &'static str, payload: Box<dyn Any + Send>) -> i32 {
    let words = panic_text(&*payload);
    forget_payload(payload);
    failure::record(name, Failure::new(BDS_ERR_PANIC, format!("the library panicked: {words}")))
}

/// The text of a panic.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

/// Drops the payload of a panic, whose own drop may panic.
pub(crate) fn forget_payload(payload: Box<dyn Any + Send>) {
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(second);
    }
}

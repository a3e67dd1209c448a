//! Tracks what drives the current thread: a Context of the host, a simulated world, or neither.
//!
//! `Context::block_on`, `Context::turn` and `Sim::block_on` enter theirs for as long as they run;
//! the free functions and the leaf operations look here for the Context to use. Entering nests.

use std::cell::RefCell;
use std::rc::Rc;

use crate::executor::Local;
use crate::sim::Sim;

/// The driver of this thread.
#[derive(Clone, Default)]
pub(crate) enum Current {
    /// Neither: a plain thread or a foreign executor.
    #[default]
    None,
    /// A host Context.
    Host(Rc<Local>),
    /// A simulated world.
    Sim(Sim),
}

thread_local! {
    static CURRENT: RefCell<Current> = const { RefCell::new(Current::None) };
}

/// Restores the former driver when dropped.
pub(crate) struct Entered {
    former: Current,
}

/// Makes `driver` the current one until the guard is dropped. Guards must be dropped in reverse
/// order (they are locals).
pub(crate) fn enter(driver: Current) -> Entered {
    Entered { former: CURRENT.with(|current| current.replace(driver)) }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let former = std::mem::take(&mut self.former);
        // While the thread ends there is nothing to restore.
        let _ = CURRENT.try_with(|current| current.replace(former));
    }
}

/// Calls `read` with the current driver. `read` must not enter another one.
pub(crate) fn with<R>(read: impl FnOnce(&Current) -> R) -> R {
    let mut read = Some(read);
    let result = CURRENT.try_with(|current| read.take().map(|read| read(&current.borrow())));
    match result {
        Ok(Some(result)) => result,
        // The thread is ending and its locals are gone: nothing drives it.
        _ => read.take().expect("try_with failed before calling the closure")(&Current::None),
    }
}

/// A clone of the current driver.
pub(crate) fn get() -> Current {
    with(Clone::clone)
}

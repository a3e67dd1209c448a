//! Which world this thread is in: a host Context, a simulated one, or none.
//!
//! `Context::block_on`, `Context::turn` and `Sim::block_on` enter their world for as long as they run;
//! the free functions and the leaf operations ask here where they belong. Entering nests.

use std::cell::RefCell;
use std::rc::Rc;

use crate::executor::Local;
use crate::sim::Sim;

/// The world that drives this thread now.
#[derive(Clone, Default)]
pub(crate) enum Current {
    /// Nobody of ours: a plain thread or a foreign executor.
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

/// Restores the former world when dropped.
pub(crate) struct Entered {
    former: Current,
}

/// Enters `world` until the guard is dropped. Guards must be dropped in reverse order (they are locals).
pub(crate) fn enter(world: Current) -> Entered {
    Entered { former: CURRENT.with(|current| current.replace(world)) }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let former = std::mem::take(&mut self.former);
        // While the thread ends there is no world to restore.
        let _ = CURRENT.try_with(|current| current.replace(former));
    }
}

/// Looks at the current world. `look` must not enter another one.
pub(crate) fn with<R>(look: impl FnOnce(&Current) -> R) -> R {
    let mut look = Some(look);
    let answer = CURRENT.try_with(|current| look.take().map(|look| look(&current.borrow())));
    match answer {
        Ok(Some(answer)) => answer,
        // The thread is ending and its locals are gone: nobody drives it.
        _ => look.take().expect("try_with failed before calling the closure")(&Current::None),
    }
}

/// A copy of the current world.
pub(crate) fn get() -> Current {
    with(Clone::clone)
}

//! Waiting without blocking a thread. FIFO, consults no clock, so a seed replays it.

pub use tokio::sync::{
    Mutex, MutexGuard, Notify, OwnedMutexGuard, OwnedRwLockReadGuard, OwnedRwLockWriteGuard,
    OwnedSemaphorePermit, RwLock, RwLockReadGuard, RwLockWriteGuard, Semaphore, SemaphorePermit,
    broadcast,
};

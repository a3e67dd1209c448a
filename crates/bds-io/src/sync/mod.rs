//! Locks, notifications and queues that make a task wait instead of blocking its thread.
//!
//! | type | guarantee |
//! |---|---|
//! | [`Mutex`] | held across awaits; waiters get it in the order of their first poll |
//! | [`Semaphore`] | permits in the order of the first poll; closing it fails all waiters |
//! | [`Notify`] | wakes one or all waiters; [`Notify::wait_until`] waits for a condition without losing a wake-up |
//! | [`broadcast`] | each receiver has a bounded queue; what does not fit pushes out the oldest, and the receiver sees how many |
//! | [`oneshot`] | one value from one sender to one receiver |
//!
//! All of them are FIFO, consult no clock and need no runtime, so they work on every executor and a
//! seed of the simulated world replays them. Dropping a waiting future gives up its place and loses
//! nothing.
//!
//! The types are this crate's own: they wrap those of `tokio::sync`, which do not appear in any
//! signature, so exchanging them breaks no user. Only what is used is wrapped.

pub mod broadcast;
mod mutex;
mod notify;
pub mod oneshot;
mod semaphore;

pub use mutex::{Mutex, MutexGuard, OwnedMutexGuard, TryLockError};
pub use notify::{Notified, Notify};
pub use semaphore::{Closed, OwnedSemaphorePermit, Semaphore, SemaphorePermit};

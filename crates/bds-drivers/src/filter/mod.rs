//! Filters change when or whether a request happens, never what is stored.

#[cfg(feature = "blkdebug")]
pub mod blkdebug;

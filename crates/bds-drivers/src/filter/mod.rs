//! Filters: drivers that change when or whether a request happens, never what is stored.

#[cfg(feature = "blkdebug")]
pub mod blkdebug;
#[cfg(feature = "compress")]
pub mod compress;
#[cfg(feature = "copy-on-read")]
pub mod copy_on_read;
#[cfg(all(test, feature = "throttle"))]
mod harness;
#[cfg(any(
    feature = "blkdebug",
    feature = "compress",
    feature = "copy-on-read",
    feature = "preallocate",
    feature = "throttle"
))]
mod plain;
#[cfg(feature = "preallocate")]
pub mod preallocate;
#[cfg(feature = "throttle")]
pub mod throttle;

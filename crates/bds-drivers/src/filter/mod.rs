//! Filters: drivers that change when or whether a request happens, never what is stored.

#[cfg(feature = "blkdebug")]
pub mod blkdebug;
#[cfg(feature = "compress")]
pub mod compress;
#[cfg(feature = "copy-before-write")]
pub mod copy_before_write;
#[cfg(feature = "copy-on-read")]
pub mod copy_on_read;
#[cfg(any(
    feature = "blkdebug",
    feature = "compress",
    feature = "copy-before-write",
    feature = "copy-on-read",
    feature = "preallocate",
    feature = "throttle"
))]
mod pass_through;
#[cfg(feature = "preallocate")]
pub mod preallocate;
#[cfg(all(test, feature = "throttle"))]
mod test_node;
#[cfg(feature = "throttle")]
pub mod throttle;

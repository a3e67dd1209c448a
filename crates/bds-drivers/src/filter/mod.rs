//! Filters change when or whether a request happens, never what is stored.

#[cfg(feature = "blkdebug")]
pub mod blkdebug;
#[cfg(feature = "compress")]
pub mod compress;
#[cfg(feature = "copy-on-read")]
pub mod copy_on_read;
#[cfg(all(test, feature = "throttle"))]
mod harness;
#[cfg(feature = "preallocate")]
pub mod preallocate;
#[cfg(feature = "throttle")]
pub mod throttle;

/// What a filter answers to a status question: ask the child `name`, which is `end` bytes long.
#[cfg(any(
    feature = "compress",
    feature = "copy-on-read",
    feature = "preallocate",
    feature = "throttle"
))]
fn pass_status(name: &'static str, end: u64, offset: u64, len: u64) -> bds_core::driver::StatusRun {
    use bds_core::driver::{HostMap, StatusFlags, StatusRun};
    if offset >= end {
        return StatusRun { len: 0, flags: StatusFlags::EOF, map: None };
    }
    let map = Some(HostMap { child: name, offset });
    StatusRun { len: len.min(end - offset), flags: StatusFlags::RAW, map }
}

//! Block drivers: image formats, protocols and filters, and the registry that holds them. A driver
//! sees only its own children.
//!
//! | feature | drivers | what they do |
//! |---|---|---|
//! | `file` | `file`, `host_device` | reads and writes files and devices of the host |
//! | `null` | `null-co`, `null-aio` | discards writes and reads zeros or nothing, for measurements |
//! | `mem` | `mem` | holds a sparse disk in memory |
//! | `raw` | `raw` | passes bytes through, or shows a window of its file |
//! | `qcow2` | `qcow2` | reads and writes QEMU's image format |
//! | `blkdebug` | `blkdebug` | injects errors and odd limits, for tests |
//! | `copy-before-write` | `copy-before-write` | keeps what a write is about to change |
//! | `snapshot-access` | `copy-before-write` | shows what such a filter keeps |
//! | `copy-on-read` | `copy-on-read` | copies what is read into the node below |
//! | `compress` | `compress` | writes compressed clusters to the image below |
//! | `preallocate` | `preallocate` | grows the file ahead of writes |
//! | `throttle` | `throttle` | delays requests to the rates of a group |
#![doc = include_str!("../OPTIONS.md")]
#![forbid(unsafe_code)]

pub mod filter;
pub mod format;
pub mod protocol;

use std::sync::Arc;

use bds_core::Result;
use bds_core::driver::{DriverType, Registry};

/// Makes a registry with all drivers of this build.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    register_all(&mut registry).expect("every driver here has a name of its own");
    registry
}

/// Makes a registry as [`registry`] does, whose throttle nodes may join `groups`. With [`registry`]
/// there are no groups: a throttle node then has limits of its own.
#[cfg(feature = "throttle")]
pub fn registry_with_groups(groups: &filter::throttle::ThrottleGroups) -> Registry {
    let mut registry = Registry::new();
    let throttle = filter::throttle::Throttle::new(groups.clone());
    let all = drivers().into_iter().chain([Arc::new(throttle) as Arc<dyn DriverType>]);
    for driver in all {
        registry.register(driver).expect("every driver here has a name of its own");
    }
    registry
}

/// Adds all drivers this build has to `registry`.
///
/// # Errors
/// `AlreadyExists` if a driver of one of their names is there; those added before it stay.
pub fn register_all(registry: &mut Registry) -> Result<()> {
    for driver in drivers() {
        registry.register(driver)?;
    }
    #[cfg(feature = "throttle")]
    registry.register(Arc::<filter::throttle::Throttle>::default())?;
    Ok(())
}

/// All drivers except those that share state with the program (throttle groups).
fn drivers() -> Vec<Arc<dyn DriverType>> {
    vec![
        #[cfg(feature = "file")]
        Arc::new(protocol::file::FileProtocol),
        #[cfg(feature = "file")]
        Arc::new(protocol::file::HostDevice),
        #[cfg(feature = "null")]
        Arc::new(protocol::null::Null::CO),
        #[cfg(feature = "null")]
        Arc::new(protocol::null::Null::AIO),
        #[cfg(feature = "mem")]
        Arc::new(protocol::mem::Mem),
        #[cfg(feature = "raw")]
        Arc::new(format::raw::Raw),
        #[cfg(feature = "qcow2")]
        Arc::new(format::qcow2::Qcow2Format),
        #[cfg(feature = "blkdebug")]
        Arc::new(filter::blkdebug::Blkdebug),
        #[cfg(feature = "preallocate")]
        Arc::new(filter::preallocate::Preallocate),
        #[cfg(feature = "compress")]
        Arc::new(filter::compress::Compress),
        #[cfg(feature = "copy-before-write")]
        Arc::new(filter::copy_before_write::CopyBeforeWrite),
        #[cfg(feature = "copy-before-write")]
        Arc::new(filter::copy_before_write::access::SnapshotAccess),
        #[cfg(feature = "copy-on-read")]
        Arc::new(filter::copy_on_read::CopyOnRead),
    ]
}

/// The example of the crate's README, compiled and run.
#[cfg(all(doctest, feature = "mem", feature = "throttle"))]
#[doc = include_str!("../README.md")]
struct Readme;

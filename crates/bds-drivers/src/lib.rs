//! The rooms: image formats, protocols and filters. Each sees only its own children.
//!
//! | feature | drivers | what they do |
//! |---|---|---|
//! | `file` | `file`, `host_device` | bytes of the host |
//! | `null` | `null-co`, `null-aio` | bytes of nowhere |
//! | `mem` | `mem` | bytes in memory |
//! | `raw` | `raw` | bytes as they are, or a window of them |
//! | `qcow2` | `qcow2` | QEMU's image format |
//! | `blkdebug` | `blkdebug` | faults and limits on demand |
//! | `copy-on-read` | `copy-on-read` | what is read is kept in the node below |
//! | `compress` | `compress` | writes become compressed clusters of the image below |
//! | `preallocate` | `preallocate` | the file grows ahead of writes |
//! | `throttle` | `throttle` | requests wait until rates allow them |
#![doc = include_str!("../OPTIONS.md")]
#![forbid(unsafe_code)]

pub mod filter;
pub mod format;
pub mod protocol;

use std::sync::Arc;

use bds_core::Result;
use bds_core::driver::{DriverType, Registry};

/// All drivers this build has.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    register_all(&mut registry).expect("every driver here has a name of its own");
    registry
}

/// As [`registry`], with the groups that throttle nodes may join. In the other ones there are none: a node's limits are then its own.
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

/// All but those that share something with the program.
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
        #[cfg(feature = "copy-on-read")]
        Arc::new(filter::copy_on_read::CopyOnRead),
    ]
}

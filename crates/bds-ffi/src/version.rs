//! Version and features of the library.

use std::ffi::c_char;

use crate::entry::{entry, entry_or};
use crate::failure::Failure;
use crate::ptr::{Text, static_text};
use crate::{BDS_VERSION_MAJOR, BDS_VERSION_MINOR, BDS_VERSION_PATCH};

/// The version of the library that runs, as `BDS_VERSION_NUMBER` encodes it. [any]
///
/// Compare it with `BDS_VERSION_NUMBER`, the version that the program was compiled with.
#[unsafe(no_mangle)]
pub extern "C" fn bds_version_number() -> u32 {
    entry_or("bds_version_number", 0, || {
        Ok(BDS_VERSION_MAJOR << 16 | BDS_VERSION_MINOR << 8 | BDS_VERSION_PATCH)
    })
}

/// The version of the library that runs, as text ("0.1.0"). Static; never NULL. [any]
#[unsafe(no_mangle)]
pub extern "C" fn bds_version_string() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    static_text(VERSION)
}

/// 1 if the library has a feature, 0 if not. [any]
///
/// Features are the names of drivers ("qcow2", "file", "throttle") and those of groups of
/// functions: "queue", "memory", "change", "image".
///
/// Errors: BDS_ERR_ARGUMENT for NULL, BDS_ERR_UTF8.
#[unsafe(no_mangle)]
pub extern "C" fn bds_has_feature(feature: Text) -> i32 {
    entry("bds_has_feature", || {
        let feature = feature.str("feature")?;
        let groups = ["queue", "memory", "change", "image"];
        let is_driver = || bds_drivers::registry().driver(feature).is_ok();
        Ok::<_, Failure>(i32::from(groups.contains(&feature) || is_driver()))
    })
}

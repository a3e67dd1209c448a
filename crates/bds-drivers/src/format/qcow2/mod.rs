//! qcow2, versions 2 and 3.

mod compress;
mod create;
mod entry;
mod extension;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod measure;
mod units;

//! qcow2, versions 2 and 3.

mod bitmap;
mod census;
mod check;
mod compress;
mod create;
mod entry;
mod extension;
mod fetch;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod info;
mod measure;
mod refmap;
mod snapshot;
mod stored;
mod units;

pub use check::check_image;

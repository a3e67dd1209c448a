//! qcow2, versions 2 and 3.

mod compress;
mod entry;
mod extension;
mod header;
mod units;

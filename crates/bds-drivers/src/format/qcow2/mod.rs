//! qcow2, versions 2 and 3.

mod entry;
mod extension;
mod header;
mod units;

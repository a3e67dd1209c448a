//! Tests qcow2 in a graph on the simulated disk, against a byte model and QEMU's tools.

mod base_mark;
pub(crate) mod bitmaps;
mod concurrent;
mod data_file;
mod detect_zeroes;
mod harness;
mod images;
mod late_backing;
mod random;
mod raw_data_file;
mod reused_places;
mod sweeps;
mod truncated_files;
mod unmaintained;
mod write_back;

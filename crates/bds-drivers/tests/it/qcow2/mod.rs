//! Tests qcow2 in a graph on the simulated disk, against a byte model and QEMU's tools.

mod cut_short;
mod data_file;
mod extras;
mod harness;
mod images;
mod races;
mod random;
mod sweeps;
mod write_back;

//! Nodes in another mode, given away and taken back, by the driver contract alone: what a graph does with them is the graph's
//! test. Drivers stand on each other through a port that is as thin as can be, on the simulated disk.

mod backing;
mod faults;
mod others;
mod qcow2;
mod qemu;
mod random;
pub(crate) mod rig;

//! Tests reopen, inactivate and activate at the driver contract, without a graph. Drivers stand on each other through a
//! minimal port, on the simulated disk.

mod backing;
mod faults;
mod others;
mod qcow2;
mod qemu;
mod random;
pub(crate) mod rig;

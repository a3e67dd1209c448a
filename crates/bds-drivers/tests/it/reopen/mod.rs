//! Tests reopen, inactivate and activate at the driver contract, without a graph. Drivers are
//! stacked through a minimal port, on the simulated disk.

mod backing;
pub(crate) mod driver_stack;
mod faults;
mod other_drivers;
mod qcow2;
mod qemu;
mod random;

//! Persistent bitmaps: what is stored is loaded again, by this driver and by QEMU, whatever fails
//! on the way.

mod close_and_open;
mod cuts;
pub(crate) mod hostile;
mod kit;
mod limits;
mod qemu;
mod sessions;

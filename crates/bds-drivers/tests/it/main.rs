//! The drivers from outside: formats against QEMU's tools, hostile images, replayed fuzz corpora.

#[cfg(feature = "qcow2")]
mod qcow2;
#[cfg(feature = "qcow2")]
mod qcow2_check;

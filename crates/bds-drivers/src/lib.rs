//! The rooms: image formats, protocols and filters. Each sees only its own children.
//!
//! | feature | drivers | what they do |
//! |---|---|---|
//! | `file` | `file`, `host_device` | bytes of the host |
//! | `null` | `null-co`, `null-aio` | bytes of nowhere |
//! | `mem` | `mem` | bytes in memory |
//! | `raw` | `raw` | bytes as they are, or a window of them |
//! | `qcow2` | `qcow2` | QEMU's image format |
//! | `blkdebug` | `blkdebug` | faults and limits on demand |
#![forbid(unsafe_code)]

pub mod filter;
pub mod format;
pub mod protocol;

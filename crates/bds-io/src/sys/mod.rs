//! Wraps every system call in a safe function. Raw descriptors and `errno` stay below this module.
//!
//! Calls are restarted when a signal interrupts them; errors keep their errno. Short transfers are
//! passed on.

mod linux;

pub(crate) use linux::{LockKind, Seek};
pub(crate) use linux::{
    allocate_range, block_size, clear, copy_range, device_len, dio_align, discard, eventfd,
    ignore_signal, is_locked_by_others, is_read_only_device, is_signal_ignored, lock, open,
    read_at, redirect, seek, set_extent_size_hint, set_len, set_no_cow, signal, stat, stat_path,
    sync_data, to_off, vectors, write_at, zero_out,
};

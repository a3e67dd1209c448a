//! Buffers, executor and engines: all syscalls, all chance, all time.

//! Persistent bitmaps of any image: load, mark, store, remove.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bds_drivers::format::qcow2::fuzzing::bitmaps(data));

//! The write-intent log of persistent bitmaps: any file is read, recovered from, and continued.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bds_drivers::format::qcow2::fuzzing::bitmap_log(data));

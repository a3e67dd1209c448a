//! Check and info on any bytes: they terminate, change nothing, and return the same twice.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bds_drivers::format::qcow2::fuzzing::check(data));

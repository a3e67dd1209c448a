//! L2 entries against a plain reading of the specification.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bds_drivers::format::qcow2::fuzzing::l2(data));

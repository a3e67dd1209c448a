//! Header and extensions: parse, write, parse again.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bds_drivers::format::qcow2::fuzzing::header(data));

//! Decoders and encoders of compressed clusters.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bds_drivers::format::qcow2::fuzzing::decompress(data));

//! A manifest's file, as it is and with the right root hash.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bds_jobs::record::fuzzing::manifest(data));

//! The file of a job's record, as it is and with right checksums.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bds_jobs::record::fuzzing::job_record(data));

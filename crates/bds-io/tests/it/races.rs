//! Races on a buffer: clones used by several threads at once, by safe code alone.
//!
//! The bytes of a race are unspecified; the program's behaviour is not. What shows a mistake here
//! is Miri (`cargo +nightly miri test -p bds-io --test it races`) or ThreadSanitizer (`cargo xtask
//! test --tier full`). Miri takes the copies written in Rust by itself; it also runs `--lib buf`.

#![forbid(unsafe_code)]

use std::thread;

use bds_io::Buf;

/// Rounds for real machines, and few under Miri, which finds a race in any.
const ROUNDS: usize = if cfg!(miri) { 20 } else { 20_000 };

#[test]
fn clones_of_a_buffer_may_be_read_and_written_at_once() {
    let shared = Buf::zeroed(4096, 4096);
    let other = shared.clone();
    let writer = thread::spawn(move || {
        for round in 0..ROUNDS {
            let byte = u8::from(round % 2 == 1);
            other.copy_from(0, &[byte; 512]);
            other.iov().fill(512..1024, byte);
            // Other places and sizes than the reader's: a race of accesses of different sizes is
            // one too.
            other.copy_from(3, &[byte; 13]);
            other.slice(1024..1536).copy_from_iov(0, &other.slice(0..512));
        }
    });
    let mut out = [0; 512];
    for _ in 0..ROUNDS {
        shared.copy_to(0, &mut out);
        assert!(out.iter().all(|byte| *byte <= 1), "no byte that was never written");
        let _ = shared.iov().is_zero(0..1536);
        shared.iov().copy_to(1021, &mut out[..9]);
        assert!(out.iter().all(|byte| *byte <= 1), "no byte that was never written");
    }
    writer.join().unwrap();
    let last = u8::from(ROUNDS.is_multiple_of(2));
    assert_eq!(shared.iov().to_vec(0..1536), vec![last; 1536], "what was handed over by join");
}

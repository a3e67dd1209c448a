//! What marking a write in a dirty bitmap costs: single-digit nanoseconds, whether the granule is
//! dirty already or not.

use std::hint::black_box;

use bds_core::bitmap::HBitmap;
use criterion::{Criterion, criterion_group, criterion_main};

const LEN: u64 = 1 << 40;

fn marking(c: &mut Criterion) {
    let bitmap = HBitmap::new(LEN, 65536).expect("a valid shape");
    bitmap.set_all();
    let mut at = 0;
    c.bench_function("bitmap/set a dirty granule", |b| {
        b.iter(|| {
            at = (at + 4096) % (1 << 30);
            black_box(&bitmap).set(at..at + 4096);
        });
    });
    c.bench_function("bitmap/set a clean granule and claim it", |b| {
        bitmap.clear(0..LEN);
        b.iter(|| {
            at = (at + 65536) % (1 << 30);
            bitmap.set(at..at + 4096);
            black_box(bitmap.claim(at..at + 65536, 65536))
        });
    });
}

/// Searching 1 TiB for its one dirty granule, at the far end.
fn searching(c: &mut Criterion) {
    let bitmap = HBitmap::new(LEN, 65536).expect("a valid shape");
    bitmap.set(LEN - 1..LEN);
    c.bench_function("bitmap/search 1 TiB", |b| {
        b.iter(|| black_box(&bitmap).next_dirty(0..LEN));
    });
}

criterion_group!(benches, marking, searching);
criterion_main!(benches);

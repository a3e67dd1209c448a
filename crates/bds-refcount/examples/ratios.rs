//! Measures counting and look-up beside `Arc` and `Weak`, as ratios that hold on a noisy machine.
//! Expected: a few nanoseconds a pair alone and on separate objects, two to three times that
//! contended; ratios to `Arc` ≤ 1.05 and to `Weak` ≤ 1.1.
//!
//! All subjects are measured in turn in every round, so that other load of the machine affects them
//! alike; the ratio is the median of the rounds' ratios.
//!
//! `cargo run --release -p bds-refcount --example ratios [rounds]`
//!
//! Nanoseconds a pair, medians of one interleaved run of 201 rounds on two cores:
//!
//! | | alone | one object, two threads | two objects |
//! |---|---|---|---|
//! | `Strong` clone + drop (`Arc`) | 4.1 (4.1), ratio 1.00 | 26.6 (26.2), 1.02 | 4.2 (4.2), 1.00 |
//! | acquire + release (`Weak::upgrade` + drop) | 4.9 (4.8), 1.02 | 29.1 (30.5), 0.97 | 4.9 (4.7), 1.02 |
//! | check (`slotmap` get) | 1.7 (0.9) | 2.4 (1.5) | 1.9 (0.9) |
//! | `sharded-slab` get + drop; `RwLock<Slab>` | 18.6; 5.1 | 56.4; 45.7 | 18.8; 44.4 |
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program that prints figures")]

use std::{
    hint::{black_box, spin_loop},
    sync::{
        Arc, Mutex, RwLock, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use bds_refcount::{Arena, Handle, Kind, Strong};
use slab::Slab;
use slotmap::{DefaultKey, SlotMap};

const PAIRS: u32 = 100_000;

/// Runs PAIRS operations as thread 0 or 1.
type Work = Box<dyn Fn(usize) + Sync>;

struct Subject {
    name: &'static str,
    /// Compared with the subject of this name.
    beside: Option<&'static str>,
    work: Work,
}

fn times(mut op: impl FnMut()) {
    for _ in 0..PAIRS {
        op();
    }
}

/// How long this thread has waited for a processor so far, in nanoseconds; 0 where the system does
/// not say.
fn waited_ns() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0)
}

/// Nanoseconds a pair: the slower thread's. `None` unless the threads ran side by side, each on a
/// processor of its own, for nine tenths of the time.
fn attempt(threads: usize, work: &Work) -> Option<f64> {
    let ready = AtomicUsize::new(0);
    let run = |thread: usize| {
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < threads {
            spin_loop();
        }
        let (waited, start) = (waited_ns(), Instant::now());
        work(thread);
        (start, Instant::now(), waited_ns() - waited)
    };
    let spans: Vec<_> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|n| scope.spawn(move || run(n))).collect();
        let own = run(0);
        others.into_iter().map(|t| t.join().unwrap()).chain([own]).collect()
    });
    let longest = spans.iter().map(|(start, end, _)| *end - *start).max()?;
    let (last_start, first_end) =
        (spans.iter().map(|s| s.0).max()?, spans.iter().map(|s| s.1).min()?);
    let together = first_end.saturating_duration_since(last_start);
    let waited = spans.iter().map(|s| s.2).max()?;
    let nanoseconds = longest.as_nanos() as f64;
    let undisturbed = together > longest.mul_f64(0.9) && (waited as f64) < nanoseconds * 0.01;
    undisturbed.then_some(nanoseconds / f64::from(PAIRS))
}

fn measure(threads: usize, work: &Work) -> Option<f64> {
    (0..100).find_map(|_| attempt(threads, work))
}

#[repr(align(128))]
struct Padded(AtomicU64);

/// Two objects each; `spread` says which one a thread works on.
fn subjects(spread: bool) -> Vec<Subject> {
    let pick = move |thread: usize| if spread { thread } else { 0 };
    let mut all = Vec::new();
    let mut add = |name, beside, work: Work| all.push(Subject { name, beside, work });

    let bare = [Padded(AtomicU64::new(1)), Padded(AtomicU64::new(1))];
    add(
        "two bare atomics",
        None,
        Box::new(move |t| {
            let word = &bare[pick(t)].0;
            times(|| {
                black_box(word.fetch_add(1, Ordering::Relaxed));
                black_box(word.fetch_sub(1, Ordering::Release));
            });
        }),
    );

    // Large enough that two Arcs do not share a line, as our slots do not.
    let arcs = [Arc::new([0_u64; 32]), Arc::new([0_u64; 32])];
    let weaks = [Arc::downgrade(&arcs[0]), Arc::downgrade(&arcs[1])];
    let kept = arcs.clone();
    add(
        "Arc clone + drop",
        None,
        Box::new(move |t| {
            let arc = &arcs[pick(t)];
            times(|| drop(black_box(Arc::clone(black_box(arc)))));
        }),
    );

    let arena: Arena<[u64; 32]> = Arena::new(Kind::new(1));
    // Neither the first slots nor the first page.
    let crowd: Vec<_> = (0..1000).map(|_| arena.insert([0; 32]).unwrap()).collect();
    let strongs: [Strong<[u64; 32]>; 2] = [crowd[500].clone(), crowd[700].clone()];
    let handles: [Handle<[u64; 32]>; 2] = [strongs[0].handle(), strongs[1].handle()];
    add(
        "Strong clone + drop",
        Some("Arc clone + drop"),
        Box::new(move |t| {
            let strong = &strongs[pick(t)];
            times(|| drop(black_box(Strong::clone(black_box(strong)))));
        }),
    );

    add(
        "Weak upgrade + drop",
        None,
        Box::new(move |t| {
            let _alive = &kept;
            let weak: &Weak<_> = &weaks[pick(t)];
            times(|| drop(Weak::upgrade(black_box(weak)).map(black_box)));
        }),
    );

    let looked_up = arena.clone();
    add(
        "acquire + release",
        Some("Weak upgrade + drop"),
        Box::new(move |t| {
            let _alive = &crowd;
            let handle = handles[pick(t)];
            times(|| drop(looked_up.acquire(black_box(handle)).map(black_box)));
        }),
    );

    add(
        "check",
        Some("slotmap get"),
        Box::new(move |t| {
            let handle = handles[pick(t)];
            times(|| {
                let _ = black_box(arena.check(black_box(handle)));
            });
        }),
    );

    let mut map = SlotMap::new();
    let keys: Vec<DefaultKey> = (0..1000).map(|_| map.insert([0_u64; 32])).collect();
    add(
        "slotmap get",
        None,
        Box::new(move |t| {
            let key = keys[500 + 200 * pick(t)];
            times(|| {
                black_box(map.get(black_box(key)));
            });
        }),
    );

    let sharded = sharded_slab::Slab::new();
    let keys: Vec<usize> = (0..1000).map(|_| sharded.insert([0_u64; 32]).unwrap()).collect();
    add(
        "sharded-slab get + drop",
        Some("Weak upgrade + drop"),
        Box::new(move |t| {
            let key = keys[500 + 200 * pick(t)];
            times(|| drop(sharded.get(black_box(key)).map(black_box)));
        }),
    );

    let mut slab = Slab::new();
    let keys: Vec<usize> = (0..1000).map(|_| slab.insert(Arc::new([0_u64; 32]))).collect();
    let locked = RwLock::new(slab.clone());
    let mutexed = Mutex::new(slab);
    let second = keys.clone();
    add(
        "RwLock<Slab> look",
        None,
        Box::new(move |t| {
            let key = keys[500 + 200 * pick(t)];
            times(|| {
                black_box(&locked.read().unwrap()[black_box(key)]);
            });
        }),
    );
    add(
        "Mutex<Slab<Arc>> clone + drop",
        None,
        Box::new(move |t| {
            let key = second[500 + 200 * pick(t)];
            times(|| drop(black_box(Arc::clone(&mutexed.lock().unwrap()[black_box(key)]))));
        }),
    );
    all
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn compare(title: &str, threads: usize, spread: bool, rounds: usize) {
    let subjects = subjects(spread);
    let mut samples = vec![Vec::with_capacity(rounds); subjects.len()];
    let mut disturbed = 0;
    for round in 0..=rounds {
        let row: Option<Vec<f64>> = subjects.iter().map(|s| measure(threads, &s.work)).collect();
        match row {
            _ if round == 0 => {} // warms up
            Some(row) => row.into_iter().zip(&mut samples).for_each(|(ns, all)| all.push(ns)),
            None => disturbed += 1,
        }
    }
    let rounds = rounds - disturbed;
    if rounds == 0 {
        return println!(
            "\n{title}: the machine is too busy to run {threads} threads side by side"
        );
    }
    println!(
        "\n{title}, ns a pair, {rounds} interleaved rounds ({disturbed} disturbed ones left out)"
    );
    println!(
        "{:<32}{:>8}{:>8}{:>8}   ratio (median of rounds; of minima)",
        "", "median", "min", "max"
    );
    let place = |name| subjects.iter().position(|s| s.name == name).unwrap();
    for (subject, own) in subjects.iter().zip(&samples) {
        let mut sorted = own.clone();
        let middle = median(&mut sorted);
        let (min, max) = (sorted[0], sorted[rounds - 1]);
        print!("{:<32}{middle:>8.2}{min:>8.2}{max:>8.2}", subject.name);
        if let Some(beside) = subject.beside {
            let other = &samples[place(beside)];
            let mut ratios: Vec<f64> = own.iter().zip(other).map(|(a, b)| a / b).collect();
            let least = other.iter().copied().fold(f64::INFINITY, f64::min);
            print!("   {:.3}; {:.3}  of {beside}", median(&mut ratios), min / least);
        }
        println!();
    }
}

fn main() {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(101);
    compare("one thread", 1, false, rounds);
    compare("two threads, one object", 2, false, rounds);
    compare("two threads, two objects", 2, true, rounds);
}

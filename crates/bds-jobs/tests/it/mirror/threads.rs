//! A mirror of memory that several threads write to, mostly inline: what the simulated world, which
//! has one thread, cannot show.

use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::Options;
use bds_core::graph::{Graph, GraphConfig};
use bds_core::request::Backend;
use bds_jobs::mirror::{Mirror, MirrorOptions};
use bds_jobs::{CopyMode, JobManager, JobOptions, JobStatus};

use super::kit::writer;

const LEN: u64 = 4 << 20;
const THREADS: u64 = 3;
/// Bytes of a write; threads take turns in the places.
const PIECE: u64 = 1536;

/// Writes to own places until it is stopped; returns the last byte of each place.
fn write_places(guest: &Backend, own: u64, is_over: &AtomicBool) -> Vec<(u64, u8)> {
    let places: Vec<u64> = (0..LEN / PIECE)
        .filter(|place| place % THREADS == own)
        .map(|place| place * PIECE)
        .collect();
    let mut last = vec![0; places.len()];
    let mut round = 0_u64;
    while !is_over.load(Ordering::SeqCst) {
        round += 1;
        let byte = u8::try_from(round % 250 + 1).expect("a byte");
        // A stretch of the places, so that all of the disk stays in use.
        let start = usize::try_from(round * 37).expect("small") % places.len();
        for index in start..(start + 40).min(places.len()) {
            let bytes = vec![byte; usize::try_from(PIECE).expect("small")];
            guest.write_at(places[index], &bytes).expect("written");
            last[index] = byte;
        }
        std::thread::yield_now();
    }
    places.into_iter().zip(last).collect()
}

fn cycle(mode: CopyMode) {
    let graph = Graph::new(GraphConfig::new(bds_drivers::registry().into()));
    let manager = JobManager::new(&graph);
    let open = |name: &str| {
        let options = format!("driver=mem,node-name={name},size={LEN}");
        let options = Options::parse(&options).expect("well-formed");
        bds_io::block_on(graph.open(options)).expect("it can be opened")
    };
    let (source, target) = (open("source"), open("target"));
    let guests: Vec<Backend> = (0..THREADS).map(|_| writer(&source, "guest")).collect();
    let is_over = AtomicBool::new(false);
    let written: Vec<Vec<(u64, u8)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = guests
            .iter()
            .zip(0..)
            .map(|(guest, own)| {
                let is_over = &is_over;
                scope.spawn(move || write_places(guest, own, is_over))
            })
            .collect();
        bds_io::block_on(async {
            let options = MirrorOptions {
                copy_mode: mode,
                granularity: Some(4096),
                max_pivot_stall: Some(std::time::Duration::from_millis(20)),
                ..MirrorOptions::new(&source, &target, "mirror0")
            };
            let mirror = Mirror::prepare(options).await.expect("it can be prepared");
            let job = manager.start(JobOptions::new("mirror0"), Box::new(mirror)).await;
            let job = job.expect("it starts");
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            job.complete().expect("it completes");
            job.wait().await.expect("it ends well");
        });
        is_over.store(true, Ordering::SeqCst);
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let reader = Backend::new(&target, Default::default()).expect("it can be read");
    for (offset, byte) in written.into_iter().flatten() {
        let mut bytes = vec![0; usize::try_from(PIECE).expect("small")];
        reader.read_at(offset, &mut bytes).expect("read");
        assert!(bytes.iter().all(|found| *found == byte), "{mode:?}: {offset:#x} is not {byte}");
    }
    for guest in &guests {
        assert_eq!(guest.node().map(|node| node.id()), Some(target.id()));
    }
    drop((guests, reader, source, target));
    bds_io::block_on(graph.shutdown()).check_leaks().expect("no leaks");
}

#[test]
fn no_write_of_several_threads_is_lost() {
    for _ in 0..3 {
        cycle(CopyMode::Background);
        cycle(CopyMode::WriteBlocking);
    }
}

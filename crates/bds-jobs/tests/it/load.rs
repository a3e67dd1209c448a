//! Load for tests of jobs: random stamped writes, zero writes, discards, reads and flushes at a
//! queue depth, checked against what the disk may hold.
//!
//! ```text
//! let load = Load::start(&guest, 1 << 20, seed);   // 8 tasks on the backend
//! …                                                // jobs run
//! load.stop().await;                               // fails the test if a read was wrong
//! load.verify(&guest).await;                       // every block
//! load.verify_window(&target, (from, to)).await;   // a copy of one moment in the window
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bds_core::Result;
use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::request::Backend;
use bds_io::{Buf, Task};
use bds_testkit::{BLOCK, Chance, StampedDisk, StampedWrite, Tick};

/// How much a guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Requests in flight.
    pub(crate) depth: u64,
    /// Longest time between two requests of a task, in microseconds.
    pub(crate) max_pause_us: u64,
    /// Requests of a task; it ends by itself then.
    pub(crate) most: u64,
}

/// 4 KiB, queue depth 8, a flush every 100 writes: the load of the scenarios.
const USUAL: Pace = Pace { depth: 8, max_pause_us: 20, most: u64::MAX };
/// Requests between two flushes of all tasks.
const FLUSH_EVERY: u64 = 100;

/// A guest that works on its disk.
pub(crate) struct Load {
    pub(crate) disk: Arc<StampedDisk>,
    is_stopped: Arc<AtomicBool>,
    failures: Arc<AtomicU64>,
    tasks: Vec<Task<Result<(), String>>>,
}

impl Load {
    /// Starts it on a disk of `len` bytes that reads as zeros.
    pub(crate) fn start(guest: &Backend, len: u64, seed: u64) -> Self {
        Self::resume(guest, Arc::new(StampedDisk::new(seed, len)), seed)
    }

    /// Starts it on a disk that has been written by an earlier load.
    pub(crate) fn resume(guest: &Backend, disk: Arc<StampedDisk>, seed: u64) -> Self {
        Self::paced(guest, disk, seed, USUAL)
    }

    /// As [`Load::resume`], at another pace.
    pub(crate) fn paced(guest: &Backend, disk: Arc<StampedDisk>, seed: u64, pace: Pace) -> Self {
        let is_stopped = Arc::<AtomicBool>::default();
        let failures = Arc::<AtomicU64>::default();
        let worker = |n: u64| {
            let worker = Worker {
                guest: guest.clone(),
                disk: Arc::clone(&disk),
                failures: Arc::clone(&failures),
                pace,
                chance: Chance::new(seed.wrapping_mul(31).wrapping_add(n)),
            };
            bds_io::spawn(worker.work(Arc::clone(&is_stopped)))
        };
        let tasks = (0..pace.depth).map(worker).collect();
        Self { disk, is_stopped, failures, tasks }
    }

    /// Requests that failed so far.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Ends it. Fails the test if a read saw what it must not.
    pub(crate) async fn stop(&mut self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            if let Err(words) = task.await {
                panic!("a read under load: {words}");
            }
        }
    }

    /// Checks every block of a disk that holds the newest state.
    pub(crate) async fn verify(&self, disk: &Backend) {
        self.verify_window(disk, (self.disk.now(), self.disk.now())).await;
    }

    /// Checks every block of a copy that was made of one moment in a window.
    pub(crate) async fn verify_window(&self, copy: &Backend, (from, to): (Tick, Tick)) {
        for block in 0..self.disk.blocks() {
            let bytes = read(copy, block * BLOCK).await.expect("a disk that can be read");
            if let Err(words) = self.disk.check(block, &bytes, from, to) {
                panic!("disk of {}: {words}", copy.name());
            }
        }
    }
}

struct Worker {
    guest: Backend,
    disk: Arc<StampedDisk>,
    failures: Arc<AtomicU64>,
    pace: Pace,
    chance: Chance,
}

impl Worker {
    async fn work(mut self, is_stopped: Arc<AtomicBool>) -> Result<(), String> {
        for number in 1..self.pace.most {
            if is_stopped.load(Ordering::Relaxed) {
                break;
            }
            let block = self.chance.below(self.disk.blocks());
            match self.chance.below(16) {
                0..=2 => self.read(block).await?,
                3 => {
                    let write = self.disk.begin_zero(block);
                    let done = self
                        .guest
                        .write_zeroes(write.offset, BLOCK, ZeroFlags::MAY_UNMAP)
                        .await
                        .map(drop);
                    self.end(&write, done);
                }
                // Frees clusters beside the writes that allocate some. What a discard leaves is not
                // specified, so zeros follow.
                4 => {
                    let write = self.disk.begin_zero(block);
                    let mut done = self.guest.discard(write.offset, BLOCK).await;
                    if done.is_ok() {
                        let zeros =
                            self.guest.write_zeroes(write.offset, BLOCK, ZeroFlags::empty());
                        done = zeros.await.map(drop);
                    }
                    self.end(&write, done);
                }
                _ => {
                    let write = self.disk.begin_write(block);
                    let iov = write.bytes.clone().into();
                    let done = self.guest.write(write.offset, iov, WriteFlags::empty()).await;
                    self.end(&write, done);
                }
            }
            if number % (FLUSH_EVERY / self.pace.depth) == 0 {
                let begun = self.disk.begin_flush();
                match self.guest.flush().await {
                    Ok(()) => self.disk.end_flush(begun),
                    Err(_) => self.fail(),
                }
            }
            // A guest computes too: without it, inline requests would leave no time for others.
            bds_io::sleep(Duration::from_micros(self.chance.between(1, self.pace.max_pause_us)))
                .await;
        }
        Ok(())
    }

    async fn read(&self, block: u64) -> Result<(), String> {
        let from = self.disk.now();
        match read(&self.guest, block * BLOCK).await {
            Ok(bytes) => self.disk.check(block, &bytes, from, self.disk.now()),
            Err(_) => {
                self.fail();
                Ok(())
            }
        }
    }

    fn end(&self, write: &StampedWrite, done: Result<()>) {
        if done.is_err() {
            self.fail();
        }
        self.disk.end_write(write, done.is_ok());
    }

    fn fail(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}

async fn read(disk: &Backend, offset: u64) -> Result<Vec<u8>> {
    let len = usize::try_from(BLOCK).expect("small");
    let buf = Buf::zeroed(len, 512);
    disk.read(offset, buf.iov()).await?;
    Ok(buf.iov().to_vec(0..len))
}

#[test]
fn the_load_finds_a_lost_write() {
    use bds_core::Options;
    use bds_core::request::BackendOptions;

    let sim = crate::fake::calm(3);
    let jobs = crate::fake::manager(&sim);
    sim.block_on(async {
        let options = Options::parse("driver=mem,node-name=disk,size=256k").unwrap();
        let node = jobs.graph().open(options).await.unwrap();
        let guest = BackendOptions { writable: true, ..Default::default() };
        let guest = Backend::new(&node, guest).unwrap();
        let mut load = Load::start(&guest, 256 << 10, 3);
        bds_io::sleep(Duration::from_millis(1)).await;
        load.stop().await;
        assert!(load.disk.writes() > 500 && load.failures() == 0, "{}", load.disk.writes());
        load.verify(&guest).await;

        let lost = load.disk.begin_write(5);
        load.disk.end_write(&lost, true);
        let bytes = read(&guest, 5 * BLOCK).await.unwrap();
        let now = load.disk.now();
        assert!(load.disk.check(5, &bytes, now, now).is_err(), "it is not there");
    });
}

//! Dirty budgets: what is written back when, which requests wait, and where a failure is reported.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::driver::{
    BoxFuture, Child, ChildOpener, ChildRequest, Driver, DriverType, OpenContext, OpenFlags,
    ReadFlags, WriteFlags, ZeroFlags,
};
use bds_core::error::{ErrorKind, Result};
use bds_core::options::Options;
use bds_io::{Buf, Sim, SimConfig};
use futures_util::FutureExt;
use futures_util::future::{join, join_all};

use super::Image;
use crate::format::qcow2::driver::Qcow2;
use crate::format::qcow2::fuzzing::{self, MemPort};
use crate::format::qcow2::meta::budget::DirtyBudget;
use crate::format::qcow2::{Qcow2Format, check_image};

struct Opener(MemPort);

impl ChildOpener for Opener {
    fn open_child<'a>(&'a mut self, request: ChildRequest) -> BoxFuture<'a, Result<Option<Child>>> {
        let child = (request.name == "file").then(|| self.0.child("file"));
        Box::pin(std::future::ready(Ok(child)))
    }
}

fn make(size: &str, cluster: u64) -> MemPort {
    let file = MemPort::default();
    let options = Options::new().with("size", size).with("cluster_size", cluster);
    fuzzing::create(options, &file, None).unwrap();
    file
}

async fn open(file: &MemPort, options: Options) -> Box<dyn Driver> {
    let fs = bds_io::Fs::default();
    let mut opener = Opener(file.clone());
    let flags = OpenFlags { discard: true, ..OpenFlags::default() };
    let mut context = OpenContext::new("image", options, flags, &fs, &mut opener);
    Qcow2Format.open(&mut context).await.unwrap()
}

fn image_of(driver: &dyn Driver) -> Arc<Image> {
    Arc::clone(&driver.as_any().downcast_ref::<Qcow2>().expect("it was opened as one").image)
}

/// Lets all tasks run that can.
async fn run_ready_tasks() {
    for _ in 0..500 {
        bds_io::yield_now().await;
    }
}

/// L2 slices of 512 bytes map 32 KiB each; 32 of them and 8 refcount blocks are the budget.
fn tight() -> Options {
    Options::new().with("l2-cache-size", 16 << 10).with("refcount-cache-size", 4096)
}

const TIGHT: DirtyBudget = DirtyBudget { begin: 8 << 10, full: 20 << 10 };
const SPAN: u64 = 32 << 10;
/// What a single change may pin beyond the budget.
const SLACK: usize = 4 * 512;

async fn write(image: &Arc<Image>, at: u64, byte: u8) -> Result<()> {
    image.write(at, Buf::from_slice(&[byte; 512]).iov(), false).await
}

/// Writes to one slice after another until a write waits; that write and how many ended before.
async fn fill(image: &Arc<Image>) -> (bds_io::Task<Result<()>>, u64) {
    for number in 0.. {
        let writer = Arc::clone(image);
        let mut task = bds_io::spawn(async move { write(&writer, number * SPAN, 7).await });
        run_ready_tasks().await;
        match (&mut task).now_or_never() {
            Some(done) => done.unwrap(),
            None => return (task, number),
        }
    }
    unreachable!("the image is larger than the budget")
}

fn pinned(image: &Image) -> usize {
    image.meta().pinned_bytes()
}

#[test]
fn a_writer_waits_only_at_the_full_budget() {
    Sim::new(1, SimConfig::calm()).block_on(async {
        let file = make("8M", 512);
        let driver = open(&file, tight()).await;
        let image = image_of(&*driver);
        assert_eq!(image.config.load().dirty, TIGHT);
        file.hold_flushes(true);
        let (waiting, done) = fill(&image).await;
        assert!(image.meta().write_back_task.is_some(), "a write-back is under way");
        assert!(pinned(&image) + 512 > TIGHT.full, "waits at {} of {TIGHT:?}", pinned(&image));
        assert!(pinned(&image) <= TIGHT.full + SLACK);
        assert!(done > 20, "only {done} writes went on");
        file.hold_flushes(false);
        waiting.await.unwrap();
        for number in 0..=done {
            let iov = Buf::zeroed(512, 512).iov();
            driver.read(number * SPAN, iov.clone(), ReadFlags::empty()).await.unwrap();
            assert_eq!(iov.to_vec(0..512), [7; 512], "write {number}");
        }
        drop(image);
        driver.close().await.unwrap();
        let report = check_image(&file, None, &|_, _| {}).await.unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.messages);
    });
}

/// Dirties enough for a write-back, which fails.
async fn fail_in_the_background(file: &MemPort, image: &Arc<Image>) {
    file.fail_flushes(true);
    let mut number = 0;
    while image.meta().write_back_error.is_none() {
        write(image, number * SPAN, 7).await.expect("no write waits for it");
        run_ready_tasks().await;
        number += 1;
        assert!(number < 40, "no write-back began");
    }
    // No second one begins before the failure was reported.
    write(image, number * SPAN, 7).await.expect("no write waits for it");
    run_ready_tasks().await;
    assert!(image.meta().write_back_task.is_none());
    file.fail_flushes(false);
}

#[test]
fn a_failed_write_back_is_reported_by_the_next_flush_once() {
    Sim::new(2, SimConfig::calm()).block_on(async {
        let file = make("8M", 512);
        let driver = open(&file, tight()).await;
        let image = image_of(&*driver);
        fail_in_the_background(&file, &image).await;
        let error = driver.flush_to_os().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("in the background"), "{error}");
        driver.flush_to_os().await.expect("it was reported, and what it left is written");
        assert!(!image.has_unwritten(&image.meta()));
        driver.close().await.unwrap();
    });
}

#[test]
fn a_failed_write_back_that_no_flush_reported_is_reported_by_close() {
    Sim::new(3, SimConfig::calm()).block_on(async {
        let file = make("8M", 512);
        let driver = open(&file, tight()).await;
        fail_in_the_background(&file, &image_of(&*driver)).await;
        let error = driver.close().await.unwrap_err();
        assert!(error.to_string().contains("in the background"), "{error}");
        let report = check_image(&file, None, &|_, _| {}).await.unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "all was written all the same");
    });
}

#[test]
fn a_writer_that_waited_for_a_failed_write_back_fails() {
    Sim::new(4, SimConfig::calm()).block_on(async {
        let file = make("8M", 512);
        let driver = open(&file, tight()).await;
        let image = image_of(&*driver);
        file.hold_flushes(true);
        let (waiting, _) = fill(&image).await;
        file.fail_flushes(true);
        file.hold_flushes(false);
        assert_eq!(waiting.await.unwrap_err().kind(), ErrorKind::Io);
        file.fail_flushes(false);
        let _reported = driver.flush_to_os().await.unwrap_err();
        driver.flush_to_os().await.unwrap();
        driver.close().await.unwrap();
    });
}

#[test]
fn close_waits_for_the_write_back_and_nothing_holds_the_image_afterwards() {
    // Which goes on first, the task or close, is the schedule's choice.
    for seed in 0..40 {
        Sim::new(seed, SimConfig::calm()).block_on(async {
            let file = make("8M", 512);
            let driver = open(&file, tight()).await;
            let image = image_of(&*driver);
            file.hold_flushes(true);
            let mut number = 0;
            while image.meta().write_back_task.is_none() {
                write(&image, number * SPAN, 7).await.unwrap();
                number += 1;
            }
            let weak = Arc::downgrade(&image);
            drop(image);
            let mut close = driver.close();
            assert!((&mut close).now_or_never().is_none());
            run_ready_tasks().await;
            assert!((&mut close).now_or_never().is_none(), "the write-back is under way");
            file.hold_flushes(false);
            close.await.unwrap();
            drop(driver);
            assert!(weak.upgrade().is_none(), "seed {seed}: something holds the image");
        });
    }
}

/// Writes, zeros and discards from 16 sides at once, while a flush takes long.
#[test]
fn dirty_budget_holds_at_512_byte_clusters() {
    for seed in 0..6 {
        Sim::new(seed, SimConfig::calm()).block_on(async {
            let file = make("8M", 512);
            let driver = open(&file, tight()).await;
            let image = image_of(&*driver);
            let work = |side: u64| {
                let driver = &driver;
                async move {
                    for step in 0..60u64 {
                        let random = (seed + 1) * 7919 + side * 104_729 + step * 1_299_709;
                        let at = random % 254 * SPAN + random / 254 % 60 * 512;
                        match random % 40 {
                            0..5 => {
                                let zeros = driver.write_zeroes(at, 2048, ZeroFlags::MAY_UNMAP);
                                let _done = zeros.await.unwrap();
                            }
                            5..10 => {
                                let _done = driver.discard(at, 4096).await.unwrap();
                            }
                            10 => driver.flush_to_os().await.unwrap(),
                            11 => driver.flush_to_disk().await.unwrap(),
                            _ => {
                                let iov = Buf::from_slice(&[3; 1024]).iov();
                                driver.write(at, iov, WriteFlags::empty()).await.unwrap();
                            }
                        }
                    }
                }
            };
            let is_over = AtomicBool::new(false);
            let slow_flushes = async {
                while !is_over.load(Ordering::SeqCst) {
                    file.hold_flushes(true);
                    for _ in 0..3000 {
                        bds_io::yield_now().await;
                    }
                    file.hold_flushes(false);
                    run_ready_tasks().await;
                }
                file.hold_flushes(false);
            };
            let all = async {
                join_all((0..16).map(work)).await;
                is_over.store(true, Ordering::SeqCst);
            };
            join(all, slow_flushes).await;
            let peak = image.levels.peak_bytes.load(Ordering::SeqCst);
            assert!(peak <= TIGHT.full + SLACK, "seed {seed}: {peak} of {TIGHT:?}");
            assert!(peak + 512 > TIGHT.full, "seed {seed}: nothing had to wait, {peak}");
            drop(image);
            driver.close().await.unwrap();
            let report = check_image(&file, None, &|_, _| {}).await.unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.messages);
        });
    }
}

#[test]
fn default_and_chosen_dirty_budgets() {
    const KIB: usize = 1 << 10;
    const MIB: usize = 1 << 20;
    let cases = [
        // Four tables; without a choice as if there were 16 MiB of them.
        ("2G", 65536, vec![], 8 * MIB, 16 * MIB + 256 * KIB),
        ("1T", 65536, vec![], 16 * MIB, 32 * MIB + 256 * KIB),
        ("2M", 512, vec![], 8 * MIB, 16 * MIB + 2 * KIB),
        // A choice that holds all tables: they need not be written back early.
        ("2G", 65536, vec![("l2-cache-size", 256 * KIB)], 384 * KIB, 512 * KIB),
        ("1T", 65536, vec![("l2-cache-size", MIB)], 512 * KIB, MIB + 256 * KIB),
        ("1T", 65536, vec![("cache-size", 2 * MIB)], 896 * KIB, 2 * MIB),
    ];
    Sim::new(1, SimConfig::calm()).block_on(async {
        for (size, cluster, chosen, begin, full) in cases {
            let mut options = Options::new();
            for (key, bytes) in &chosen {
                options.set(key, *bytes as u64);
            }
            let driver = open(&make(size, cluster), options).await;
            let dirty = image_of(&*driver).config.load().dirty;
            assert_eq!(dirty, DirtyBudget { begin, full }, "{size} {chosen:?}");
            driver.close().await.unwrap();
        }
    });
}

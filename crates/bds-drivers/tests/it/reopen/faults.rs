//! Reopen, inactivate and activate with a failure at every I/O, a dropped future at every await,
//! and a power cut at every write.

use std::time::Duration;

use bds_core::{ErrorKind, Options, Result};
use bds_io::sim::{CutMode, Fault, OpMask};
use bds_io::{Sim, SimConfig};
use bds_testkit::{Chance, Scratch, pattern, qemu_img};

use super::driver_stack::{Image, read_only, writer};
use crate::kit::{Disk, ImageKind, TestEnv, sim_with_image};
use crate::sweep::{one_seed, seeds};

fn kinds() -> Vec<ImageKind> {
    let q = |name| ImageKind::qcow2(name, 4096).sized(4096 * 24, 4096 * 40);
    vec![
        q("plain"),
        q("lazy").lazy(),
        q("backed").backed(50_000),
        q("data").with_data_file(),
        ImageKind::qcow2("512", 512).sized(512 * 160, 512 * 240),
        ImageKind::qcow2("512-lazy", 512).sized(512 * 160, 512 * 240).lazy(),
    ]
}

/// A change of the mode of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    ToReader,
    ToWriter,
    GiveAway,
    TakeBack,
    /// Other metadata overlap checks are kept: everything is read again.
    Options,
}

const ACTS: [Act; 5] = [Act::ToReader, Act::ToWriter, Act::GiveAway, Act::TakeBack, Act::Options];

impl Act {
    async fn run(self, image: &mut Image) -> Result<()> {
        match self {
            Self::ToReader => image.reopen(read_only(writer()), Options::new()).await,
            Self::ToWriter => image.reopen(writer(), Options::new()).await,
            Self::GiveAway => image.inactivate().await,
            Self::TakeBack => image.activate().await,
            Self::Options => {
                image.reopen(writer(), Options::new().with("overlap-check", "all")).await
            }
        }
    }

    /// May the image be written afterwards, with this result?
    fn can_write(self, is_done: bool) -> bool {
        match self {
            Self::ToReader | Self::GiveAway => !is_done,
            Self::ToWriter | Self::TakeBack => is_done,
            Self::Options => true,
        }
    }
}

const FLUSHED_LEN: usize = 9000;

/// An image ready for `act`, with bytes in it: 9000 that are flushed, and some that are not.
async fn begin(env: &TestEnv, kind: &ImageKind, act: Act) -> (Image, Vec<u8>) {
    let flags = if act == Act::ToWriter { read_only(writer()) } else { writer() };
    let first = Image::open(env, kind, writer()).await.unwrap();
    first.write(0, &pattern(1, 0, FLUSHED_LEN)).await.unwrap();
    first.close().await.unwrap();
    let image = Image::open(env, kind, flags).await.unwrap();
    let mut bytes = image.read(0, usize::try_from(kind.len).unwrap()).await.unwrap();
    if act != Act::ToWriter {
        let later = pattern(2, 0, 20_000);
        image.write(30_000, &later).await.unwrap();
        bytes[30_000..50_000].copy_from_slice(&later);
    }
    if act == Act::TakeBack {
        image.inactivate().await.unwrap();
    }
    (image, bytes)
}

/// Checks an image in use: reads all, writes if it may, flushes, and passes `check`.
async fn check_in_use(image: &Image, bytes: &mut [u8], can_write: bool, what: &str) {
    assert!(image.read(0, bytes.len()).await.unwrap() == bytes, "{what}: other bytes before");
    for at in [100, 35_000, 60_000] {
        let written = image.write(at, &[0x77; 3000]).await;
        assert_eq!(written.is_ok(), can_write, "{what}: {written:?}");
        if can_write {
            let at = usize::try_from(at).unwrap();
            bytes[at..at + 3000].fill(0x77);
        }
    }
    image.flush().await.unwrap();
    assert!(image.read(0, bytes.len()).await.unwrap() == bytes, "{what}: other bytes after");
    assert_eq!(image.check().await, 0, "{what}");
}

/// Closes it; a new open reads the same and `check` passes.
async fn close_and_check(env: &TestEnv, kind: &ImageKind, image: Image, bytes: &[u8], what: &str) {
    image.close().await.unwrap();
    let graph = env.graph();
    let disk = Disk::open_read_only(env, kind, &graph).await.unwrap();
    let read = disk.read(0, bytes.len() as u64).await.unwrap();
    assert!(read == bytes, "{what}: other bytes in the end");
    assert_eq!(disk.check().await.unwrap(), (0, 0), "{what}");
    disk.close().await.unwrap();
}

fn base(kind: &ImageKind) -> Sim {
    sim_with_image(3, SimConfig::calm(), kind)
}

#[test]
fn a_failed_mode_change_changes_nothing_and_can_be_repeated() {
    for kind in kinds() {
        let base = base(&kind);
        let mut failed = 0;
        for act in ACTS {
            for n in 0.. {
                let sim = base.fork(n);
                let env = TestEnv::Sim(sim.clone());
                let what = format!("{} {act:?} fault {n}", kind.name);
                let (mut image, mut bytes) = sim.block_on(begin(&env, &kind, act));
                // Not a sync: a file whose flush failed stays failed, as it must.
                let steps = OpMask::READ | OpMask::WRITE | OpMask::ZERO | OpMask::OPEN;
                let first = sim.ops_of(steps);
                sim.fail_nth(n, Fault::once(libc::EIO).on(steps));
                let done = sim.block_on(act.run(&mut image));
                let is_over = sim.ops_of(steps) - first <= n;
                sim.clear_faults();
                failed += u64::from(done.is_err());
                sim.block_on(async {
                    check_in_use(&image, &mut bytes, act.can_write(done.is_ok()), &what).await;
                    if done.is_err() {
                        act.run(&mut image).await.unwrap();
                        check_in_use(&image, &mut bytes, act.can_write(true), &what).await;
                    }
                    close_and_check(&env, &kind, image, &bytes, &what).await;
                });
                if is_over {
                    assert!(done.is_ok(), "{what}: {done:?}");
                    break;
                }
            }
        }
        assert!(failed > 6, "{}: {failed}", kind.name);
    }
}

#[test]
fn a_failed_flush_keeps_a_writer_a_writer() {
    for kind in kinds() {
        let base = base(&kind);
        for act in [Act::ToReader, Act::GiveAway] {
            for n in 0.. {
                let sim = base.fork(n);
                let env = TestEnv::Sim(sim.clone());
                let (mut image, bytes) = sim.block_on(begin(&env, &kind, act));
                let first = sim.ops_of(OpMask::SYNC);
                sim.fail_nth(n, Fault::once(libc::EIO).on(OpMask::SYNC));
                let done = sim.block_on(act.run(&mut image));
                if sim.ops_of(OpMask::SYNC) - first <= n {
                    break;
                }
                let what = format!("{} {act:?} flush {n}", kind.name);
                assert_eq!(done.unwrap_err().errno(), libc::EIO, "{what}");
                sim.block_on(async {
                    assert!(image.read(0, bytes.len()).await.unwrap() == bytes, "{what}");
                    let flush = image.flush().await;
                    assert_eq!(
                        flush.expect_err("it is not forgotten").errno(),
                        libc::EIO,
                        "{what}"
                    );
                    let again = act.run(&mut image).await;
                    assert_eq!(
                        again.expect_err("it is not forgotten").errno(),
                        libc::EIO,
                        "{what}"
                    );
                });
            }
        }
    }
}

#[test]
fn a_dropped_mode_change_changes_nothing_and_can_be_repeated() {
    for kind in kinds() {
        let base = base(&kind);
        for act in ACTS {
            for k in 0.. {
                let sim = base.fork(k as u64);
                let env = TestEnv::Sim(sim.clone());
                let what = format!("{} {act:?} await {k}", kind.name);
                let (mut image, mut bytes) = sim.block_on(begin(&env, &kind, act));
                let is_dropped = sim.drop_at(act.run(&mut image), k);
                sim.block_on(async {
                    // Inactivate and activate are several steps here: the caller undoes or
                    // completes the rest.
                    match act {
                        Act::GiveAway if is_dropped => image.activate().await.unwrap(),
                        Act::TakeBack if is_dropped => image.inactivate().await.unwrap(),
                        _ => {}
                    }
                    check_in_use(&image, &mut bytes, act.can_write(!is_dropped), &what).await;
                    act.run(&mut image).await.unwrap();
                    check_in_use(&image, &mut bytes, act.can_write(true), &what).await;
                    close_and_check(&env, &kind, image, &bytes, &what).await;
                });
                if !is_dropped {
                    break;
                }
            }
        }
    }
}

/// A reopen is dropped and writes go on while it still writes back the image: the dirty bit is
/// never cleared while refcounts are behind.
#[test]
fn writes_beside_an_abandoned_reopen_stay_sound_after_a_cut() {
    let kind = ImageKind::qcow2("512-lazy", 512).sized(512 * 160, 512 * 240).lazy();
    let base = sim_with_image(7, SimConfig { short_io_rate: 0.0, ..SimConfig::default() }, &kind);
    let mut cut_on_the_way = 0;
    for seed in seeds(700) {
        let sim = base.fork(seed);
        let env = TestEnv::Sim(sim.clone());
        let (image, _) = sim.block_on(begin(&env, &kind, Act::GiveAway));
        let mut chance = Chance::new(seed);
        let mut moment = |below_us: u64| Duration::from_micros(chance.draw() % below_us);
        let (dropped_at, cut_at) = (moment(2500), moment(3000));
        sim.cut_at(sim.now() + dropped_at + cut_at);
        // The image may be inactive by then: a write succeeds or is refused, and fails in no other
        // way.
        let is_fine = |done: Result<()>| match done {
            Ok(()) => true,
            Err(error) => error.kind() == ErrorKind::Inactive,
        };
        let ended = sim.run_until_cut(async {
            drop_after(dropped_at, image.node.inactivate()).await;
            let mut all_fine = true;
            for at in 0..4 {
                all_fine &= is_fine(image.write(512 * 40 * at, &[8; 700]).await);
                all_fine &= is_fine(image.flush().await);
            }
            all_fine
        });
        assert_ne!(ended, Some(false), "seed {seed}");
        cut_on_the_way += u32::from(ended.is_none());
        abandon(&sim, image);
        let mode = if seed % 2 == 0 { CutMode::KeepAll } else { CutMode::Random };
        let after = TestEnv::Sim(sim.after_cut_by(seed, mode));
        check_disk(&after, &kind, None, &format!("seed {seed}"));
    }
    assert!(one_seed().is_some() || cut_on_the_way > 100, "{cut_on_the_way}");
}

/// Polls a future for a while of virtual time and drops it.
async fn drop_after(time: Duration, future: impl Future<Output = Result<()>>) {
    let (future, sleep) = (Box::pin(future), Box::pin(bds_io::sleep(time)));
    futures_util::future::select(future, sleep).await;
}

/// Drops an image on a disk without power.
fn abandon(sim: &Sim, image: Image) {
    sim.power_cut();
    let gone = sim.run_until_cut(async move {
        let _held = image;
        std::future::pending::<()>().await;
    });
    assert!(gone.is_none(), "the power is gone");
}

/// Checks after a cut: sound or leaking (or marked dirty), and flushed bytes are there.
fn check_disk(after: &TestEnv, kind: &ImageKind, flushed: Option<&[u8]>, what: &str) {
    let graph = after.graph();
    after.block_on(async {
        let disk = Disk::open_read_only(after, kind, &graph)
            .await
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let info = disk.backend.info().await.unwrap();
        assert!(!info.is_corrupt, "{what}");
        assert!(!info.is_dirty || kind.is_lazy, "{what}");
        if !info.is_dirty {
            disk.check().await.unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        if let Some(flushed) = flushed {
            let read = disk.read(0, flushed.len() as u64).await.unwrap();
            assert!(read == flushed, "{what}: flushed bytes are lost");
        }
        disk.close().await.unwrap();
    });
}

#[test]
fn a_power_cut_at_any_write_leaves_the_image_sound() {
    let img = qemu_img();
    let scratch = Scratch::new();
    let mut cuts = 0;
    for kind in kinds() {
        // A short write may stop inside a sector; a power cut never does.
        let base =
            sim_with_image(7, SimConfig { short_io_rate: 0.0, ..SimConfig::default() }, &kind);
        for act in ACTS {
            for n in 0.. {
                let sim = base.fork(n);
                let env = TestEnv::Sim(sim.clone());
                let (mut image, _) = sim.block_on(begin(&env, &kind, act));
                let flushed = pattern(1, 0, FLUSHED_LEN);
                sim.cut_after_writes(Some(sim.writes() + n));
                let ended = sim.run_until_cut(async {
                    act.run(&mut image).await.unwrap();
                    // Then the other change, on top of what the first left behind.
                    match act {
                        Act::ToReader => Act::ToWriter.run(&mut image).await.unwrap(),
                        Act::GiveAway => Act::TakeBack.run(&mut image).await.unwrap(),
                        _ => {}
                    }
                    for at in [20_000, 55_000] {
                        image.write(at, &[5; 6000]).await.unwrap();
                        image.flush().await.unwrap();
                    }
                });
                abandon(&sim, image);
                let modes = [CutMode::Random, CutMode::LoseAll, CutMode::Reorder, CutMode::Tear];
                let mode = modes[usize::try_from(n % 4).unwrap()];
                let after = TestEnv::Sim(sim.after_cut_by(n, mode));
                let what = format!("{} {act:?} cut {n} {mode:?}", kind.name);
                check_disk(&after, &kind, Some(&flushed), &what);
                cuts += 1;
                if let Some(img) = img.as_ref().filter(|_| cuts % 60 == 0) {
                    let out = after.qemu_check(img, &kind, &scratch);
                    assert!(out.code == 0 || out.code == 3 || kind.is_lazy, "{what}: {out:?}");
                }
                if ended.is_some() {
                    break;
                }
            }
        }
    }
    assert!(cuts > 100, "{cuts} cuts");
}

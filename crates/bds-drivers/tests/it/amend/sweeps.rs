//! Power cuts, failing I/O and abandoned requests at every point of an amendment.

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::graph::NewImage;
use bds_core::{ErrorKind, Options};
use bds_io::sim::{CutMode, Fault};
use bds_io::{Sim, SimConfig};
use bds_testkit::{Chance, pattern, qemu_img, qemu_io};
use serde_json::Value;

use super::rules::without_extra_data;
use super::{HostImage, amendment, close, contents, format_data, graph, open, with_snapshots};
use crate::kit::filled;
use crate::sweep::is_full;

const MODES: [CutMode; 5] =
    [CutMode::Random, CutMode::Reorder, CutMode::Tear, CutMode::LoseAll, CutMode::KeepAll];

/// An image and what is asked for.
struct Case {
    name: String,
    base: Sim,
    options: &'static str,
    has_snapshots: bool,
}

/// An image with data, zeros with and without a cluster, and a backing file.
fn own_image(create: &str) -> Sim {
    let sim = Sim::new(7, SimConfig::calm());
    sim.put_file("/base.raw", &pattern(9, 0, 20_000));
    sim.block_on(async {
        let graph = graph(&sim);
        let options = format!("{create},size=48k,backing_file=base.raw,backing_fmt=raw");
        let options = Options::parse(&options).unwrap();
        let image = NewImage {
            format: "qcow2".into(),
            path: super::IMAGE.into(),
            options,
            skip_backing: true,
        };
        graph.create_image(image).await.unwrap();
        let disk = open(&graph, false).await.unwrap();
        for (at, len) in [(0, 9000), (30_000, 7000)] {
            disk.write(at, filled(1, len), WriteFlags::empty()).await.unwrap();
        }
        for (at, flags) in [(1024, ZeroFlags::empty()), (12_288, ZeroFlags::MAY_UNMAP)] {
            let _done = disk.write_zeroes(at, 3072, flags).await.unwrap();
        }
        close(&graph, disk).await;
    });
    sim
}

fn cases() -> Vec<Case> {
    let own = [
        ("compat=1.1,cluster_size=512", "compat=0.10"),
        ("compat=0.10,cluster_size=512", "compat=1.1,refcount_bits=1,lazy_refcounts=on"),
        ("compat=1.1,cluster_size=1024,refcount_bits=64", "refcount_bits=4"),
        ("compat=1.1,cluster_size=512,lazy_refcounts=on", "lazy_refcounts=off"),
        (
            "compat=1.1,cluster_size=4096,refcount_bits=8,lazy_refcounts=on",
            "compat=0.10,refcount_bits=16",
        ),
        ("compat=0.10,cluster_size=8192", "compat=1.1"),
    ];
    let mut cases: Vec<Case> = own
        .into_iter()
        .map(|(create, options)| Case {
            name: format!("{create} → {options}"),
            base: own_image(create),
            options,
            has_snapshots: false,
        })
        .collect();
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return cases };
    let backed = "cluster_size=4096,backing_file=base.raw,backing_fmt=raw";
    for (create, options) in [(backed, "compat=0.10"), ("cluster_size=4096", "refcount_bits=2")] {
        let base = with_snapshots(&img, &io, create).sim(7);
        let name = format!("snapshots, {create} → {options}");
        cases.push(Case { name, base, options, has_snapshots: true });
    }
    let base = without_extra_data(&img, &io).sim(7);
    let name = "snapshots of version 2".to_owned();
    cases.push(Case { name, base, options: "compat=1.1", has_snapshots: true });
    cases
}

struct Seen {
    data: Value,
    bytes: Vec<u8>,
}

fn look(sim: &Sim) -> Seen {
    sim.block_on(async {
        let graph = graph(sim);
        let disk = open(&graph, true).await.unwrap();
        let seen = Seen { data: format_data(&disk).await, bytes: contents(&disk).await };
        close(&graph, disk).await;
        seen
    })
}

/// The options after the amendment.
fn amended(case: &Case) -> Value {
    let sim = case.base.fork(1);
    sim.block_on(async {
        let graph = graph(&sim);
        let disk = open(&graph, false).await.unwrap();
        disk.amend(amendment(case.options)).await.unwrap();
        close(&graph, disk).await;
    });
    look(&sim).data
}

/// The image is consistent, has the old options or the new ones, and reads the same; it can be
/// written.
fn check(sim: &Sim, old: &Seen, new: &Value, what: &str) -> Value {
    let found = look(sim);
    assert!(found.data == old.data || found.data == *new, "{what}: {}", found.data);
    assert!(found.bytes == old.bytes, "{what}: contents changed");
    sim.block_on(async {
        let graph = graph(sim);
        let disk = match open(&graph, false).await {
            // A node whose flush failed keeps the dirty bit of its lazy refcounts.
            Err(error) if what.contains("lazy") && what.contains("fault") => {
                assert!(error.to_string().contains("not closed properly"), "{what}: {error}");
                return;
            }
            opened => opened.unwrap(),
        };
        let report = disk.check(&|_, _| {}).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
        for at in [512, 14_336, 40_960] {
            disk.write(at, filled(9, 2048), WriteFlags::empty()).await.unwrap();
        }
        disk.flush().await.unwrap();
        let report = disk.check(&|_, _| {}).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
        let after = contents(&disk).await;
        let mut expected = old.bytes.clone();
        for at in [512, 14_336, 40_960] {
            expected[at..at + 2048].fill(9);
        }
        assert!(after == expected, "{what}: contents after writes");
        close(&graph, disk).await;
    });
    found.data
}

fn snapshots(sim: &Sim) -> Option<Vec<Vec<u8>>> {
    let img = qemu_img()?;
    let host = HostImage::of_sim(sim);
    let (code, report) = host.check(&img);
    assert!(code == 0 || code == 3, "{report}");
    Some(["one", "two"].map(|name| host.read(&img, Some(name))).to_vec())
}

#[test]
fn a_power_cut_leaves_the_old_options_or_the_new() {
    let mut chance = Chance::new(3);
    for case in cases() {
        let (old, new) = (look(&case.base), amended(&case));
        let old_snapshots = case.has_snapshots.then(|| snapshots(&case.base)).flatten();
        let (mut saw_old, mut saw_new) = (false, false);
        for n in 0.. {
            let sim = case.base.fork(n);
            let graph = graph(&sim);
            let disk = sim.block_on(open(&graph, false)).unwrap();
            sim.cut_after_writes(Some(sim.writes() + n));
            let ended = sim.run_until_cut(disk.amend(amendment(case.options)));
            if let Some(result) = &ended {
                result.as_ref().unwrap();
            }
            sim.power_cut();
            let gone = sim.run_until_cut(async move {
                let _held = (disk, graph);
                std::future::pending::<()>().await;
            });
            assert!(gone.is_none());
            let modes = if is_full() { &MODES[..] } else { &[MODES[chance.below(5) as usize]] };
            for mode in modes {
                let what = format!("{} cut {n} {mode:?}", case.name);
                let after = sim.after_cut_by(n << 8, *mode);
                if let Some(old) = old_snapshots.as_ref().filter(|_| n % 7 == 0) {
                    assert!(snapshots(&after).as_ref() == Some(old), "{what}: a snapshot changed");
                }
                let found = check(&after, &old, &new, &what);
                assert!(ended.is_none() || found == new, "{what}");
                saw_old |= found == old.data;
                saw_new |= found == new;
            }
            if ended.is_some() {
                break;
            }
        }
        assert!(saw_old && saw_new, "{}", case.name);
    }
}

#[test]
fn a_failed_request_leaves_the_old_options_or_the_new() {
    let mut failed = 0;
    for case in cases() {
        let (old, new) = (look(&case.base), amended(&case));
        let mut ended_well = 0;
        for n in 0.. {
            let fault = match n % 3 {
                0 => Fault::once(5),
                1 => Fault::once(28),
                _ => Fault::sticky(5),
            };
            let what = format!("{} fault {n}", case.name);
            let sim = case.base.fork(n);
            let graph = graph(&sim);
            let disk = sim.block_on(open(&graph, false)).unwrap();
            sim.fail_nth(n, fault);
            let result = sim.block_on(disk.amend(amendment(case.options)));
            sim.clear_faults();
            let is_usable = sim.block_on(async {
                let written = disk.write(40_960, filled(9, 2048), WriteFlags::empty()).await;
                let is_usable = match written {
                    Ok(()) => disk.flush().await.is_ok(),
                    Err(error) => {
                        let words = error.to_string();
                        assert!(words.contains("open the image anew"), "{what}: {words}");
                        false
                    }
                };
                drop(disk);
                graph.reap().await;
                is_usable
            });
            let mut expected = Seen { data: old.data.clone(), bytes: old.bytes.clone() };
            // A write that failed may be there.
            if is_usable || look(&sim).bytes != old.bytes {
                expected.bytes[40_960..40_960 + 2048].fill(9);
            }
            let found = check(&sim, &expected, &new, &what);
            match result {
                Ok(()) => {
                    assert_eq!(found, new, "{what}");
                    ended_well += 1;
                }
                Err(_) => failed += 1,
            }
            if ended_well == 3 {
                break;
            }
        }
    }
    assert!(failed > 100, "{failed}");
}

#[test]
fn an_abandoned_amendment_ends_before_its_effect_or_after_it() {
    let (mut ended_before, mut ended_after) = (0, 0);
    for case in cases() {
        let (old, new) = (look(&case.base), amended(&case));
        for n in 0.. {
            let mut was_abandoned = false;
            for forgets in [false, true] {
                let sim = case.base.fork(n as u64);
                let graph = graph(&sim);
                let disk = sim.block_on(open(&graph, false)).unwrap();
                let user = disk.clone();
                let work = async move { user.amend(amendment(case.options)).await };
                was_abandoned |= match forgets {
                    false => sim.drop_at(work, n),
                    true => sim.forget_at(work, n),
                };
                sim.run_until_idle();
                let what = format!("{} abandoned at {n}, forgotten: {forgets}", case.name);
                sim.block_on(async {
                    assert!(contents(&disk).await == old.bytes, "{what}");
                    let report = disk.check(&|_, _| {}).await.unwrap();
                    assert!(report.is_clean(), "{what}: {report:?}");
                    drop(disk);
                    graph.shutdown().await;
                });
                let found = check(&sim, &old, &new, &what);
                if found == new { ended_after += 1 } else { ended_before += 1 }
            }
            if !was_abandoned || (n > 60 && !is_full()) {
                break;
            }
        }
    }
    assert!(ended_before > 20 && ended_after > 20, "{ended_before} {ended_after}");
}

#[test]
fn guest_requests_wait_and_go_on() {
    for (seed, options) in [(1, "compat=0.10"), (2, "refcount_bits=1"), (3, "refcount_bits=64")] {
        let sim = own_image("compat=1.1,cluster_size=512").fork(seed);
        sim.block_on(async {
            let graph = graph(&sim);
            let disk = open(&graph, false).await.unwrap();
            let writes = async {
                for at in (0..48 << 10).step_by(3072) {
                    let bytes = bds_io::Buf::from_slice(&pattern(seed, at, 2048)).iov();
                    disk.write(at, bytes, WriteFlags::empty()).await.unwrap();
                    disk.flush().await.unwrap();
                }
            };
            let queries = async {
                let precision = bds_core::driver::Precision::Exact;
                for at in (0..48 << 10).step_by(512) {
                    disk.block_status(at, 48 << 10, precision).await.unwrap();
                }
            };
            let amend = disk.amend(amendment(options));
            let all = futures_util::future::join3(writes, queries, amend);
            all.await.2.unwrap();
            let again = disk.amend(amendment("compat=1.1,refcount_bits=16")).await;
            again.unwrap();
            let bytes = contents(&disk).await;
            for at in (0..48 << 10).step_by(3072) {
                assert_eq!(bytes[at..at + 2048], pattern(seed, at as u64, 2048), "{options} {at}");
            }
            let report = disk.check(&|_, _| {}).await.unwrap();
            assert!(report.is_clean(), "{options}: {report:?}");
            close(&graph, disk).await;
        });
    }
}

#[test]
fn a_cancelled_amendment_says_so() {
    let sim = own_image("compat=1.1,cluster_size=512");
    sim.block_on(async {
        let graph = graph(&sim);
        let disk = open(&graph, false).await.unwrap();
        let before = format_data(&disk).await;
        let amendment = amendment("refcount_bits=64");
        amendment.control.cancel();
        let error = disk.amend(amendment).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert_eq!(format_data(&disk).await, before);
        close(&graph, disk).await;
    });
}

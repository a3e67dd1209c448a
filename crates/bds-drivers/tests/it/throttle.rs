//! Tests of rates on the virtual clock: averages and bursts to the nanosecond, fairness between
//! members, dropped requests.

use std::sync::Arc;
use std::time::Duration;

use bds_core::driver::WriteFlags;
use bds_core::graph::{Graph, GraphConfig};
use bds_core::rate::{Rate, RateLimits};
use bds_core::request::{Backend, BackendOptions};
use bds_core::stats::Operation;
use bds_core::{ErrorKind, Options};
use bds_drivers::filter::throttle::{ThrottleGroups, limits_from_options};
use bds_io::{Buf, Sim, SimConfig, now, sleep};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::kit::Fixture;

/// A simulated disk on which only waiting takes time, and its throttle groups.
fn fixture(seed: u64) -> (Fixture, ThrottleGroups) {
    let sim = Sim::new(seed, SimConfig { overtake_rate: 0.0, ..SimConfig::calm() });
    let groups = ThrottleGroups::new();
    let registry = bds_drivers::registry_with_groups(&groups);
    (Fixture::with_registry(sim, registry), groups)
}

fn limits(options: Value) -> RateLimits {
    limits_from_options(Options::from_json(json!({ "limits": options })).unwrap()).unwrap()
}

fn disk(fixture: &Fixture, name: &str, group: &str) -> Backend {
    let options = json!({
        "driver": "throttle", "node-name": name, "throttle-group": group,
        "file": {"driver": "mem", "size": 1 << 24},
    });
    fixture.backend(options).unwrap()
}

async fn write(disk: &Backend, len: usize) -> u128 {
    disk.write(0, Buf::zeroed(len, 1).iov(), WriteFlags::empty()).await.unwrap();
    now().as_nanos()
}

/// Times at which requests of these lengths go, one after the other, by searching all nanoseconds.
fn curve(rate: Rate, lens: &[usize]) -> Vec<u128> {
    let n = 1_000_000_000_u128;
    let Rate { avg, max, max_secs } = rate;
    let [avg, max, secs] = [avg, max, max_secs].map(u128::from);
    let mut went: Vec<(u128, u128)> = Vec::new();
    let mut at = 0;
    for len in lens {
        let level = |rate: u128, now: u128| {
            let (mut sum, mut level) = (0, 0);
            for (when, len) in went.iter().rev() {
                sum += len * n;
                level = level.max(sum.saturating_sub(rate * (now - when)));
            }
            level
        };
        let goes = |now: u128| {
            let capacity = if max == 0 { avg * n / 10 } else { max * secs * n };
            level(avg, now) <= capacity && (secs == 1 || level(max, now) <= max * n / 10)
        };
        // Levels only fall while no request comes, so a request that may go may go later too.
        let (mut low, mut high) = (at, at + 1_000_000 * n);
        while low < high {
            let middle = low.midpoint(high);
            if goes(middle) { high = middle } else { low = middle + 1 }
        }
        at = low;
        went.push((at, *len as u128));
    }
    went.into_iter().map(|(at, _)| at).collect()
}

#[test]
fn averages_and_bursts_match_the_model() {
    let lens: Vec<usize> = (0..120).map(|n| 1000 + n * 7919 % 90_000).collect();
    for rate in [
        json!({"bps-total": 1_000_000}),
        json!({"bps-total": 333_333}),
        json!({"bps-total": 100_000, "bps-total-max": 700_000}),
        json!({"bps-total": 100_000, "bps-total-max": 700_000, "bps-total-max-length": 4}),
        json!({"bps-total": 1_000_000, "bps-total-max": 1_000_001, "bps-total-max-length": 2}),
    ] {
        let (fixture, groups) = fixture(3);
        let limits = limits(rate);
        groups.create("g", limits).unwrap();
        let disk = disk(&fixture, "a", "g");
        let seen = fixture.sim.block_on(async {
            let mut seen = Vec::new();
            for len in &lens {
                seen.push(write(&disk, *len).await);
            }
            seen
        });
        assert_eq!(seen, curve(limits.bps_total, &lens), "{limits:?}");
        // In the long run only the average counts.
        let sum: u64 = lens.iter().map(|len| *len as u64).sum();
        let Rate { avg, max, max_secs } = limits.bps_total;
        let at_once = if max == 0 { avg / 10 } else { max * max_secs };
        let secs = Duration::from_nanos(u64::try_from(seen[119]).unwrap()).as_secs();
        assert!(sum <= avg * (secs + 1) + at_once + 91_000 && sum >= avg * secs, "{limits:?}");
    }
}

#[test]
fn reads_and_writes_alternate_at_a_total_rate() {
    for seed in 0..10 {
        let (fixture, groups) = fixture(seed);
        groups.create("g", limits(json!({"iops-total": 10}))).unwrap();
        let disk = disk(&fixture, "a", "g");
        fixture.sim.block_on(async {
            let reads = (0..40).map(|_| async {
                disk.read(0, Buf::zeroed(512, 1).iov()).await.unwrap();
                now().as_millis()
            });
            let writes = (0..40).map(|_| async { write(&disk, 512).await / 1_000_000 });
            let (reads, writes) = futures_util::join!(join_all(reads), join_all(writes));
            for moment in (500..4000).step_by(500) {
                let until = |ends: &[u128]| ends.iter().filter(|end| **end <= moment).count();
                let (r, w) = (until(&reads), until(&writes));
                // The two that went at once may both be of one direction.
                assert!(r.abs_diff(w) <= 3, "seed {seed}: at {moment} ms {r} reads, {w} writes");
            }
            assert_eq!(now().as_millis(), 7800);
        });
    }
}

#[test]
fn members_alternate_and_each_is_fifo() {
    for seed in 0..10 {
        let (fixture, groups) = fixture(seed);
        groups.create("g", limits(json!({"iops-write": 100}))).unwrap();
        let disks = ["a", "b", "c"].map(|name| disk(&fixture, name, "g"));
        fixture.sim.block_on(async {
            // One sends many, one sends some, one comes late.
            let (busy, some, late) = futures_util::join!(
                join_all((0..200).map(|_| write(&disks[0], 512))),
                join_all((0..20).map(|_| write(&disks[1], 512))),
                async {
                    sleep(Duration::from_secs(1)).await;
                    let before = now().as_nanos();
                    (before, write(&disks[2], 512).await)
                }
            );
            assert!(busy.is_sorted() && some.is_sorted(), "seed {seed}");
            // The burst of ten belongs to the first ones; afterwards every second request is the
            // other member's.
            assert!(*some.last().unwrap() <= 410_000_000, "seed {seed}: {some:?}");
            let (before, after) = late;
            assert!(after - before <= 20_000_000, "seed {seed}: {}", after - before);
            assert_eq!(now().as_millis(), 2100, "seed {seed}: 11 at once, 210 in line");
        });
    }
}

#[test]
fn dropped_queued_requests_cost_nothing_and_block_no_other() {
    // Which of six requests is dropped, and when: after so many polls, 70 ms apart.
    for victim in 0..6 {
        for polls in 0..12 {
            let (fixture, groups) = fixture(polls);
            groups.create("g", limits(json!({"bps-total": 1000}))).unwrap();
            let (disk, other) = (Arc::new(disk(&fixture, "a", "g")), disk(&fixture, "b", "g"));
            fixture.sim.block_on(async {
                write(&disk, 200).await;
                let mut tasks = Vec::new();
                let mut dropped = Box::pin(write(&disk, 500));
                for number in 0..6 {
                    if number == victim {
                        if polls > 0 {
                            assert!(futures_util::poll!(dropped.as_mut()).is_pending());
                        }
                    } else {
                        let disk = Arc::clone(&disk);
                        tasks.push(bds_io::spawn(async move { write(&disk, 100).await }));
                        bds_io::yield_now().await;
                    }
                }
                let mut was_done = false;
                for _ in 1..polls {
                    sleep(Duration::from_millis(70)).await;
                    was_done = was_done || futures_util::poll!(dropped.as_mut()).is_ready();
                    if was_done {
                        break;
                    }
                }
                drop(dropped);
                let mut ended = join_all(tasks).await;
                ended.sort_unstable();
                // 100 ms until the first, then one after the other; the dropped request's 500 bytes
                // count only if it was granted.
                let last = ended[4] / 1_000_000;
                assert!(last == 500 || last == 1000, "victim {victim} polls {polls}: {last} ms");
                assert!(last == 500 || was_done || polls > 1, "victim {victim} polls {polls}");
                let after = write(&other, 100).await / 1_000_000;
                assert!(after == last + 100 || was_done, "victim {victim} polls {polls}: {after}");
            });
        }
    }
}

#[test]
fn a_flood_dropped_at_every_await_leaves_a_group_that_works() {
    // Polls of the requests' own tasks count.
    for polls in 0..1000 {
        let (fixture, groups) = fixture(polls as u64);
        groups.create("g", limits(json!({"iops-total": 20}))).unwrap();
        let (a, b) = (disk(&fixture, "a", "g"), disk(&fixture, "b", "g"));
        let flood = async {
            join_all((0..10).flat_map(|_| [write(&a, 512), write(&b, 512)])).await;
        };
        let was_dropped = fixture.sim.drop_at(flood, polls);
        let ended = fixture.sim.block_on(async {
            let before = now();
            join_all((0..4).map(|_| write(&a, 512))).await;
            now() - before
        });
        // At worst the buckets are full, and each request takes 50 ms.
        assert!(ended <= Duration::from_millis(200), "polls {polls}: {ended:?}");
        drop((a, b));
        fixture.sim.block_on(fixture.graph.reap());
        groups.remove("g").unwrap();
        if !was_dropped {
            return;
        }
    }
    panic!("a thousand polls are enough for twenty requests");
}

#[test]
fn a_node_may_have_limits_of_its_own() {
    let fixture = Fixture::with(Sim::new(1, SimConfig { overtake_rate: 0.0, ..SimConfig::calm() }));
    let file = json!({"driver": "mem", "size": 1 << 20});
    let options = "driver=throttle,limits.bps-total=1M,limits.iops-size=4k,limits.iops-read=7,file.driver=mem,\
         file.size=1M";
    let disk = fixture.backend(Options::parse(options).unwrap().into_json()).unwrap();
    let times =
        fixture.sim.block_on(async { [write(&disk, 1 << 20).await, write(&disk, 1).await] });
    assert_eq!(times, [0, 900_000_000]);
    for (options, word) in [
        (json!({}), "'throttle-group' is missing"),
        (json!({"throttle-group": "g"}), "no throttle group 'g'"),
        (json!({"throttle-group": "g", "limits": {"bps-read": 1}}), "exclude each other"),
        (json!({"limits": {"bps-read": 5, "bps-read-max": 1}}), "must not be lower"),
        (json!({"limits": {"bps": 5}}), "'bps'"),
        (json!({"limits": "fast"}), "limits"),
    ] {
        let mut options = options;
        options["driver"] = json!("throttle");
        options["file"] = file.clone();
        let text = fixture.node(options).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn groups_list_their_members() {
    let (fixture, groups) = fixture(1);
    let two = limits(json!({"iops-total": 2}));
    groups.create("g", two).unwrap();
    assert_eq!(groups.create("g", two).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(groups.create("", two).unwrap_err().kind(), ErrorKind::InvalidInput);
    let (a, b) = (disk(&fixture, "a", "g"), disk(&fixture, "b", "g"));
    let list = groups.list();
    assert_eq!((list[0].name.as_str(), list[0].limits), ("g", two));
    assert_eq!(list[0].members, ["a", "b"]);
    let error = groups.remove("g").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.to_string().contains("a, b"), "{error}");
    assert_eq!(groups.remove("h").unwrap_err().kind(), ErrorKind::NotFound);
    drop((a, b));
    // Its nodes are dead but not closed yet.
    assert_eq!(groups.remove("g").unwrap_err().kind(), ErrorKind::InUse);
    fixture.sim.block_on(fixture.graph.reap());
    groups.remove("g").unwrap();
    assert_eq!(groups.list(), []);
}

/// Real threads and a real clock, with requests dropped in between: in any order, every request is
/// granted.
#[test]
fn threads_share_a_group_and_every_request_is_granted() {
    let groups = ThrottleGroups::new();
    groups.create("g", limits(json!({"iops-total": 20_000}))).unwrap();
    let registry = Arc::new(bds_drivers::registry_with_groups(&groups));
    let graph = Graph::new(GraphConfig::new(registry));
    let disks = ["a", "b"].map(|name| {
        let options = json!({
            "driver": "throttle", "node-name": name, "throttle-group": "g",
            "file": {"driver": "mem", "size": 65536},
        });
        let node = bds_io::block_on(graph.open(Options::from_json(options).unwrap())).unwrap();
        let options =
            BackendOptions { name: "test".into(), writable: true, ..BackendOptions::default() };
        Backend::new(&node, options).unwrap()
    });
    std::thread::scope(|scope| {
        for number in 0..4 {
            let disk = &disks[number % 2];
            scope.spawn(move || {
                bds_io::block_on(async {
                    for round in 0..30 {
                        let dropped = Box::pin(write(disk, 512));
                        let mut dropped = std::pin::pin!(dropped);
                        let _ended = futures_util::poll!(dropped.as_mut()).is_ready();
                        join_all((0..40).map(|_| write(disk, 512))).await;
                        if round % 3 == number % 3 {
                            bds_io::yield_now().await;
                        }
                    }
                });
            });
        }
    });
    let passed: u64 = disks.iter().map(|disk| disk.stats().totals(Operation::Write).ops).sum();
    assert!(passed >= 4 * 30 * 40, "{passed}");
}

/// A drain does not wait for the rates, and the limits hold again afterwards.
#[test]
fn a_drain_does_not_wait_for_rates() {
    let (fixture, groups) = fixture(1);
    groups.create("g", limits(json!({"bps-total": 1000}))).unwrap();
    let disk = Arc::new(disk(&fixture, "a", "g"));
    fixture.sim.block_on(async {
        write(&disk, 100_000).await;
        let queued: Vec<_> = (0..5)
            .map(|_| {
                let disk = Arc::clone(&disk);
                bds_io::spawn(async move { write(&disk, 1000).await })
            })
            .collect();
        sleep(Duration::from_secs(1)).await;
        let drained = fixture.graph.drain(&disk.node().unwrap()).await;
        assert_eq!(join_all(queued).await, [1_000_000_000; 5]);
        drop(drained);
        // 105,000 bytes went; all but the burst of 100 must leak.
        assert_eq!(write(&disk, 1).await, 104_900_000_000);
    });
}

#[test]
fn reopen_changes_limits_and_mode() {
    let (fixture, groups) = fixture(1);
    let options = json!({
        "driver": "throttle", "node-name": "a", "limits": {"bps-total": 1000},
        "file": {"driver": "mem", "size": 65536},
    });
    let node = fixture.node(options).unwrap();
    let reopen = |node, options| fixture.sim.block_on(fixture.graph.reopen(node, options));
    let read_only = |is_on: bool| Options::new().with("read-only", is_on);
    reopen(&node, read_only(true)).unwrap();
    assert!(!node.is_writable());
    reopen(&node, read_only(false)).unwrap();
    let writable =
        || BackendOptions { name: "test".into(), writable: true, ..BackendOptions::default() };
    let disk = Backend::new(&node, writable()).unwrap();
    let fast = Options::from_json(json!({"limits": {"bps-total": 10_000}})).unwrap();
    let times = fixture.sim.block_on(async {
        write(&disk, 1100).await;
        fixture.graph.reopen(&node, fast.clone()).await.unwrap();
        [write(&disk, 2000).await, write(&disk, 1).await]
    });
    // The new buckets are empty.
    assert_eq!(times, [0, 100_000_000]);
    let wrong = Options::from_json(json!({"limits": {"bps-read-max": 10}})).unwrap();
    assert_eq!(reopen(&node, wrong).unwrap_err().kind(), ErrorKind::InvalidInput);
    groups.create("g", RateLimits::default()).unwrap();
    let member = self::disk(&fixture, "b", "g").node().unwrap();
    assert_eq!(reopen(&member, fast).unwrap_err().kind(), ErrorKind::InvalidInput);
}

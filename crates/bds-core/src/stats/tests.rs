//! Counts, times on the virtual clock, histograms and intervals.

use std::time::Duration;

use bds_io::{Sim, SimConfig};

use super::{Operation, Outcome, Stats};
use crate::error::ErrorKind;

const MS: Duration = Duration::from_millis(1);

fn run<F: Future>(future: F) -> F::Output {
    Sim::new(1, SimConfig::calm()).block_on(future)
}

/// A request that takes this long.
async fn request(stats: &Stats, operation: Operation, took: Duration, outcome: Outcome) {
    let mut pending = stats.begin(operation, 512);
    bds_io::sleep(took).await;
    pending.ended(outcome);
}

#[test]
fn without_measuring_there_are_counts_and_no_times() {
    run(async {
        let stats = Stats::new();
        request(&stats, Operation::Read, 5 * MS, Outcome::Done).await;
        request(&stats, Operation::Read, MS, Outcome::Failed).await;
        request(&stats, Operation::Read, MS, Outcome::Invalid).await;
        drop(stats.begin(Operation::Read, 512));
        let totals = stats.totals(Operation::Read);
        assert_eq!((totals.ops, totals.failed, totals.invalid, totals.done()), (4, 2, 1, 1));
        assert_eq!((totals.bytes, totals.total_time), (512, Duration::ZERO));
        assert_eq!(stats.idle_time(), None);
        assert_eq!(stats.latencies(Operation::Read).iter().sum::<u64>(), 0);
    });
}

#[test]
fn times_add_up_and_idle_time_runs_from_the_last_end() {
    run(async {
        let stats = Stats::new();
        stats.enable_latencies();
        assert_eq!(stats.idle_time(), None);
        request(&stats, Operation::Write, 3 * MS, Outcome::Done).await;
        request(&stats, Operation::Write, 4 * MS, Outcome::Failed).await;
        assert_eq!(stats.totals(Operation::Write).total_time, 7 * MS);
        bds_io::sleep(10 * MS).await;
        assert_eq!(stats.idle_time(), Some(10 * MS));
        request(&stats, Operation::Write, MS, Outcome::Invalid).await;
        assert_eq!(stats.idle_time(), Some(Duration::ZERO), "a refused one ends the idle time");
        assert_eq!(stats.totals(Operation::Write).total_time, 7 * MS, "and has no latency");

        stats.account_failed(false);
        stats.account_invalid(false);
        request(&stats, Operation::Write, 5 * MS, Outcome::Failed).await;
        request(&stats, Operation::Write, MS, Outcome::Invalid).await;
        assert_eq!(stats.idle_time(), Some(6 * MS));
        let totals = stats.totals(Operation::Write);
        assert_eq!(totals.total_time, 7 * MS);
        assert_eq!((totals.failed, totals.invalid), (2, 2), "counted all the same");
    });
}

#[test]
fn histograms_sort_by_their_boundaries_and_start_anew_when_set() {
    run(async {
        let stats = Stats::new();
        assert_eq!(stats.histogram(Operation::Read), None);
        for wrong in [&[0][..], &[5, 5], &[5, 4], &[1; 2000]] {
            let refused = stats.set_histogram(Operation::Read, wrong).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        }
        stats.set_histogram(Operation::Read, &[2_000_000, 4_000_000]).unwrap();
        for ms in [1, 2, 3, 4, 5] {
            request(&stats, Operation::Read, ms * MS, Outcome::Done).await;
        }
        request(&stats, Operation::Write, MS, Outcome::Done).await;
        let histogram = stats.histogram(Operation::Read).unwrap();
        assert_eq!(histogram.bins, [1, 2, 2], "a boundary belongs to the bin above it");
        let json = stats.to_json();
        assert_eq!(json["rd_latency_histogram"]["boundaries"][1], 4_000_000);
        assert_eq!(json["rd_latency_histogram"]["bins"][2], 2);
        assert!(json.get("wr_latency_histogram").is_none());
        stats.set_histogram(Operation::Read, &[1]).unwrap();
        assert_eq!(stats.histogram(Operation::Read).unwrap().bins, [0, 0]);
        stats.set_histogram(Operation::Read, &[]).unwrap();
        assert_eq!(stats.histogram(Operation::Read), None);
    });
}

#[test]
fn intervals_forget_what_is_older_than_they_are() {
    run(async {
        let stats = Stats::new();
        assert_eq!(stats.add_interval(Duration::ZERO).unwrap_err().kind(), ErrorKind::InvalidInput);
        stats.add_interval(100 * MS).unwrap();
        stats.add_interval(100 * MS).unwrap();
        assert_eq!(stats.intervals().len(), 1, "the same length is one interval");
        request(&stats, Operation::Read, 10 * MS, Outcome::Done).await;
        request(&stats, Operation::Read, 30 * MS, Outcome::Done).await;
        let spread = stats.intervals()[0].of(Operation::Read);
        assert_eq!((spread.count, spread.min, spread.max), (2, 10 * MS, 30 * MS));
        assert_eq!(spread.avg, 20 * MS);
        assert!((spread.queue_depth - 1.0).abs() < 1e-9, "one at a time, all the time");
        // At 105 ms the first window is over; the second, from 50 ms on, answers.
        bds_io::sleep(65 * MS).await;
        assert_eq!(stats.intervals()[0].of(Operation::Read).count, 0);
        request(&stats, Operation::Write, MS, Outcome::Done).await;
        let json = stats.to_json();
        assert_eq!(json["timed_stats"][0]["avg_wr_latency_ns"], 1_000_000);
        assert_eq!(json["timed_stats"][0]["avg_rd_latency_ns"], 0);
        bds_io::sleep(1000 * MS).await;
        assert_eq!(stats.intervals()[0].of(Operation::Write).count, 0);
    });
}

#[test]
fn json_has_qemus_names_and_zero_writes_are_writes() {
    run(async {
        let stats = Stats::new();
        stats.enable_latencies();
        request(&stats, Operation::Write, MS, Outcome::Done).await;
        request(&stats, Operation::Zero, 2 * MS, Outcome::Done).await;
        request(&stats, Operation::Discard, MS, Outcome::Failed).await;
        request(&stats, Operation::Flush, MS, Outcome::Done).await;
        stats.merged(Operation::Write, 3);
        let json = stats.to_json();
        for (key, value) in [
            ("wr_operations", 2),
            ("wr_bytes", 1024),
            ("wr_total_time_ns", 3_000_000),
            ("wr_merged", 3),
            ("failed_unmap_operations", 1),
            ("unmap_operations", 0),
            ("flush_operations", 1),
            ("rd_operations", 0),
            ("invalid_rd_operations", 0),
            ("idle_time_ns", 0),
        ] {
            assert_eq!(json[key], value, "{key}");
        }
        assert_eq!(json["account_failed"], true);
        assert!(json.get("flush_bytes").is_none());
    });
}

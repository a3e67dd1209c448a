//! Tests the copier: copied bytes, requests on the way, errors.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::{Just, Strategy, any, prop, prop_oneof, proptest};

use super::{CopyOptions, CopyReport, CopySource, GRAIN, copy};
use crate::driver::{HostMap, Limits, StatusFlags, WriteFlags, ZeroFlags};
use crate::error::{Error, ErrorKind};
use crate::options::Options;
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph, On, Op, State, backend};
use crate::test_kit::run;

const ZERO: StatusFlags = StatusFlags::ZERO;

/// One grain for each value.
fn grains(values: &[u8]) -> Vec<u8> {
    values.iter().flat_map(|value| vec![*value; GRAIN]).collect()
}

struct Pair {
    disks: DiskGraph,
    source: Arc<Backend>,
    source_state: Arc<State>,
    target: Backend,
    target_state: Arc<State>,
}

async fn pair(bytes: Vec<u8>, source: Config, target_len: usize, target: Config) -> Pair {
    let disks = DiskGraph::new();
    let (node, source_state) = disks.node("source", bytes, source).await;
    let source = Arc::new(backend(&node));
    let (node, target_state) = disks.node("target", vec![0xAA; target_len], target).await;
    Pair { disks, source, source_state, target: backend(&node), target_state }
}

impl Pair {
    async fn copy(&self, options: &CopyOptions) -> crate::Result<CopyReport> {
        copy(&[CopySource::from(Arc::clone(&self.source))], &self.target, options).await
    }
}

fn small() -> CopyOptions {
    CopyOptions { buffer_len: 4 * GRAIN, ..CopyOptions::default() }
}

#[test]
fn known_zeros_are_not_read_and_found_zeros_not_written() {
    run(1, async {
        let bytes = grains(&[1, 0, 0, 2, 0, 0, 0, 0]);
        let end = bytes.len() as u64;
        let hole = (4 * GRAIN as u64)..end;
        let source = Config { statuses: vec![(hole.clone(), ZERO, None)], ..Config::default() };
        let target = Config { zero_flags: Some(ZeroFlags::MAY_UNMAP), ..Config::default() };
        let pair = pair(bytes.clone(), source, bytes.len(), target).await;
        let report = pair.copy(&small()).await.unwrap();
        let grain = GRAIN as u64;
        let expected = CopyReport { total: end, written: 2 * grain, zeroed: 6 * grain, ..report };
        assert_eq!(report, expected);
        assert_eq!(pair.target_state.bytes(), bytes);
        assert_eq!(pair.source_state.take_log(), [Op::Read(0..4 * grain)]);
    });
}

#[test]
fn on_a_target_of_zeros_only_data_is_written() {
    run(1, async {
        let bytes = grains(&[0, 3, 0, 0]);
        let pair = pair(bytes.clone(), Config::default(), bytes.len(), Config::default()).await;
        let options = CopyOptions { target_is_zero: true, ..small() };
        let report = pair.copy(&options).await.unwrap();
        assert_eq!((report.skipped, report.written), (3 * GRAIN as u64, GRAIN as u64));
        assert_eq!(pair.target_state.take_log().len(), 1);
    });
}

/// In order means that writes begin in order: the next one does not wait until the last has
/// completed.
#[test]
fn writes_begin_in_order_and_overlap() {
    run(3, async {
        let bytes = grains(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let target = Config { turns: 40, ..Config::default() };
        let pair = pair(bytes.clone(), Config::default(), bytes.len(), target).await;
        let options = CopyOptions { buffer_len: GRAIN, workers: 4, ..CopyOptions::default() };
        pair.copy(&options).await.unwrap();
        assert_eq!(pair.target_state.bytes(), bytes);
        let grain = GRAIN as u64;
        let expected: Vec<Op> =
            (0..8).map(|i| Op::Write(i * grain..(i + 1) * grain, WriteFlags::empty())).collect();
        assert_eq!(pair.target_state.take_log(), expected);
        assert_eq!(pair.target_state.most_writes.load(Ordering::SeqCst), 4, "one a worker");
    });
}

#[test]
fn without_sparse_detection_everything_is_written() {
    run(1, async {
        let bytes = grains(&[0, 0, 0, 0]);
        let statuses = vec![(0..2 * GRAIN as u64, ZERO, None)];
        let source = Config { statuses, ..Config::default() };
        let pair = pair(bytes.clone(), source, bytes.len(), Config::default()).await;
        let options = CopyOptions { sparse_len: 0, target_is_zero: true, ..small() };
        let report = pair.copy(&options).await.unwrap();
        assert_eq!(report.written, bytes.len() as u64);
        assert_eq!(pair.target_state.bytes(), bytes);
    });
}

#[test]
fn above_a_base_the_rest_of_the_target_is_unchanged() {
    run(1, async {
        let disks = DiskGraph::new();
        let ro = || Options::new().with("read-only", true);
        let options = ro();
        let (base, _) =
            disks.node("base", grains(&[9; 4]), Config { options, ..Config::default() }).await;
        let grain = GRAIN as u64;
        let none = StatusFlags::empty();
        let statuses = vec![
            (0..grain, none, None),
            (grain..2 * grain, ZERO, None),
            (3 * grain..4 * grain, none, None),
        ];
        let options = ro().with("backing", "base");
        let config = Config { supports_backing: true, statuses, options, ..Config::default() };
        let (top, _) = disks.node("top", grains(&[1, 0, 2, 3]), config).await;
        let (node, state) = disks.node("target", vec![0xAA; 4 * GRAIN], Config::default()).await;
        let source = CopySource { backend: Arc::new(backend(&top)), above: Some(base.id()) };
        let report = copy(&[source], &backend(&node), &small()).await.unwrap();
        assert_eq!((report.skipped, report.zeroed, report.written), (2 * grain, grain, grain));
        assert_eq!(state.bytes(), grains(&[0xAA, 0, 2, 0xAA]));
    });
}

#[test]
fn compressed_clusters_are_whole_and_zeros_are_left_out() {
    run(1, async {
        let cluster = 2 * GRAIN as u64;
        let mut bytes = grains(&[1, 0, 0, 0, 0, 4, 5, 5]);
        bytes.truncate(7 * GRAIN + 100);
        let statuses = vec![(GRAIN as u64..5 * GRAIN as u64, ZERO, None)];
        let source = Config { statuses, ..Config::default() };
        let pair = pair(bytes.clone(), source, bytes.len(), Config::default()).await;
        *pair.target_state.bytes.lock().unwrap() = vec![0; bytes.len()];
        let options = CopyOptions { compress: Some(cluster), target_is_zero: true, ..small() };
        pair.copy(&options).await.unwrap();
        let mut log = pair.target_state.take_log();
        let end = bytes.len() as u64;
        assert_eq!(log.pop(), Some(Op::Compressed(end..end)));
        let clusters = [0..cluster, 2 * cluster..3 * cluster, 3 * cluster..end];
        assert_eq!(log, clusters.map(Op::Compressed));
        assert_eq!(pair.target_state.bytes(), bytes);
    });
}

#[test]
fn compressed_clusters_lie_across_the_ends_of_sources() {
    run(1, async {
        let disks = DiskGraph::new();
        let cluster = 4 * GRAIN as u64;
        // Ends inside a cluster, a source without bytes, one that lies inside one cluster, zeros
        // across an end.
        let lens = [4 * GRAIN + 700, 0, 100, GRAIN, 9 * GRAIN];
        let mut expected = Vec::new();
        let mut sources = Vec::new();
        for (number, len) in lens.into_iter().enumerate() {
            let mut bytes = vec![u8::try_from(number + 1).unwrap(); len];
            let zeros = len.saturating_sub(2 * GRAIN)..len;
            bytes[zeros.clone()].fill(0);
            expected.extend_from_slice(&bytes);
            let statuses = vec![(zeros.start as u64..zeros.end as u64, ZERO, None)];
            let config = Config { statuses, turns: 1, ..Config::default() };
            let (node, _) = disks.node(&format!("source{number}"), bytes, config).await;
            sources.push(CopySource::from(Arc::new(backend(&node))));
        }
        // The target is longer, and keeps the bytes there.
        let total = expected.len();
        expected.resize(total + 700, 0xAA);
        let fill = vec![0xAA; expected.len()];
        let (node, state) = disks.node("target", fill, Config::default()).await;
        let options = CopyOptions { compress: Some(cluster), ..small() };
        copy(&sources, &backend(&node), &options).await.unwrap();
        assert!(state.bytes() == expected);
        for op in state.take_log() {
            let Op::Compressed(range) = op else { continue };
            // The last, empty one pads the file.
            if range.is_empty() {
                continue;
            }
            let is_whole = range.end.is_multiple_of(cluster) || range.end == expected.len() as u64;
            assert!(range.start.is_multiple_of(cluster) && is_whole, "{range:?}");
        }
    });
}

#[test]
fn equal_data_in_the_target_is_not_written() {
    for compress in [None, Some(2 * GRAIN as u64)] {
        run(1, async {
            let disks = DiskGraph::new();
            let bytes = grains(&[1, 2, 0, 0, 5, 6, 0, 0, 9]);
            let grain = GRAIN as u64;
            let statuses =
                vec![(2 * grain..4 * grain, ZERO, None), (6 * grain..8 * grain, ZERO, None)];
            let config = Config { statuses, ..Config::default() };
            let (source, _) = disks.node("source", bytes.clone(), config).await;
            // Equal, different, zeros above data, zeros above zeros; and it is shorter than the
            // source.
            let shown = grains(&[1, 7, 0, 3, 5, 6, 0, 0]);
            let statuses = vec![(6 * grain..8 * grain, ZERO, None)];
            let config = Config { statuses, ..Config::default() };
            let (shows, _) = disks.node("shows", shown.clone(), config).await;
            let mut old = shown;
            old.resize(bytes.len(), 0);
            let (node, state) = disks.node("target", old, Config::default()).await;
            let options =
                CopyOptions { compress, target_shows: Some(Arc::new(backend(&shows))), ..small() };
            let sources = [CopySource::from(Arc::new(backend(&source)))];
            copy(&sources, &backend(&node), &options).await.unwrap();
            assert!(state.bytes() == bytes, "{compress:?}");
            for op in state.take_log() {
                let (Op::Write(range, _) | Op::Compressed(range)) = op else { continue };
                let equal = 4 * grain..8 * grain;
                assert!(range.end <= equal.start || range.start >= equal.end, "{range:?}");
            }
        });
    }
}

#[test]
fn errors_say_which_side_failed_and_where() {
    let grain = GRAIN as u64;
    for (on, words) in [
        (On::Status, "cannot tell what the source holds"),
        (On::Read, "cannot read the source"),
        (On::Write, "cannot write the target"),
    ] {
        run(1, async {
            let bytes = grains(&[1; 16]);
            let turns = 3;
            let config = || Config { turns, ..Config::default() };
            let pair = pair(bytes.clone(), config(), bytes.len(), config()).await;
            let side = if on == On::Write { &pair.target_state } else { &pair.source_state };
            let place = if on == On::Status { 0..1 } else { 4 * grain..4 * grain + 1 };
            side.fail_always(on, Some(place.clone()));
            let error = pair.copy(&small()).await.unwrap_err();
            assert!(error.message().starts_with(words), "{error}");
            assert_eq!(error.offset(), Some(place.start));
            assert_eq!(error.kind(), ErrorKind::Io);
        });
    }
}

#[test]
fn salvage_writes_zeros_for_unreadable_ranges() {
    run(1, async {
        let bytes = grains(&[1; 8]);
        let pair = pair(bytes.clone(), Config::default(), bytes.len(), Config::default()).await;
        pair.source_state.fail_always(On::Read, Some(5000..5600));
        pair.source_state.fail_once(On::Status, None);
        let reported: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
        let list = Arc::clone(&reported);
        let salvage = Arc::new(move |offset: u64, len: u64, error: &Error| {
            assert_eq!(error.kind(), ErrorKind::Io);
            list.lock().unwrap().push((offset, len));
        });
        let options = CopyOptions { salvage: Some(salvage), ..small() };
        let report = pair.copy(&options).await.unwrap();
        assert_eq!(*reported.lock().unwrap(), [(4608, 1024)], "reported once, as one piece");
        assert_eq!(report.salvaged, 1024);
        let mut expected = bytes;
        expected[4608..5632].fill(0);
        assert_eq!(pair.target_state.bytes(), expected);
    });
}

#[test]
fn a_copy_is_cancelled_and_reports_progress() {
    run(1, async {
        let bytes = grains(&[1; 64]);
        let config = || Config { turns: 2, ..Config::default() };
        let pair = pair(bytes.clone(), config(), bytes.len(), config()).await;
        let cancel = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancel);
        let total = bytes.len() as u64;
        let progress = Arc::new(move |done: u64, all: u64| {
            assert!(done <= all && all == total);
            flag.store(done >= all / 2, Ordering::Relaxed);
        });
        let options = CopyOptions { progress: Some(progress), cancel: Some(cancel), ..small() };
        let error = pair.copy(&options).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        let paused = std::sync::atomic::AtomicU64::new(0);
        let rate_limit = Arc::new(move |len: u64| {
            paused.fetch_add(len, Ordering::Relaxed);
            std::time::Duration::from_millis(len)
        });
        let before = bds_io::now();
        let options = CopyOptions { rate_limit: Some(rate_limit), workers: 1, ..small() };
        pair.copy(&options).await.unwrap();
        assert!((bds_io::now() - before).as_millis() >= u128::from(total));
    });
}

#[test]
fn copy_offload_is_used_between_raw_files() {
    run(1, async {
        let disks = DiskGraph::new();
        let bytes = grains(&[1, 2, 3, 4]);
        let len = bytes.len() as u64;
        let raw = |to: &'static str| {
            let map = Some(HostMap { child: "file", offset: 0 });
            Config {
                statuses: vec![(0..len, StatusFlags::RAW, map)],
                forwards: true,
                options: Options::new().with("file", to),
                ..Config::default()
            }
        };
        let (_a, _) = disks.node("a", bytes.clone(), Config::default()).await;
        let (_b, b_state) = disks.node("b", vec![0; bytes.len()], Config::default()).await;
        let (source, _) = disks.node("raw-a", vec![], raw("a")).await;
        let (target, _) = disks.node("raw-b", vec![], raw("b")).await;
        let options = CopyOptions { offload: true, ..small() };
        let source = [CopySource::from(Arc::new(backend(&source)))];
        let target = backend(&target);
        copy(&source, &target, &options).await.unwrap();
        assert_eq!(b_state.bytes(), bytes);
        assert_eq!(b_state.take_log(), [Op::CopyRange(0..len)]);
        target.flush().await.unwrap();
        assert_eq!(b_state.take_log(), [Op::FlushToOs, Op::FlushToDisk], "the copy is flushed");
    });
}

#[test]
fn options_and_lengths_are_checked() {
    run(1, async {
        let pair = pair(grains(&[1, 2]), Config::default(), GRAIN, Config::default()).await;
        let table = [
            small(),
            CopyOptions { workers: 0, ..small() },
            CopyOptions { workers: 17, ..small() },
            CopyOptions { buffer_len: 100, ..small() },
            CopyOptions { compress: Some(3000), ..small() },
        ];
        for options in table {
            let error = pair.copy(&options).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{options:?}");
        }
        assert_eq!(pair.target_state.take_log(), []);
        let _disks = &pair.disks;
    });
}

#[derive(Clone, Debug)]
struct Case {
    /// Per source, per grain: the byte, and whether the status says zero (only for zeros).
    sources: Vec<(Vec<(u8, bool)>, usize)>,
    options: CopyOptions,
    request_alignment: u32,
    can_zero: bool,
}

fn case() -> impl Strategy<Value = Case> {
    let grain = prop_oneof![Just((0, true)), Just((0, false)), (1..5u8).prop_map(|v| (v, false))];
    let source = (prop::collection::vec(grain, 1..24), 0..GRAIN);
    let compress = prop_oneof![Just(None), Just(Some(4096)), Just(Some(16384))];
    (
        prop::collection::vec(source, 1..5),
        (1..6usize, 1..9usize, any::<bool>(), 0..3u64, compress),
        prop_oneof![Just(1u32), Just(512), Just(4096)],
        any::<bool>(),
    )
        .prop_map(
            |(sources, (workers, grains, out_of_order, sparse, compress), align, can_zero)| {
                let options = CopyOptions {
                    workers,
                    buffer_len: grains * GRAIN,
                    out_of_order,
                    sparse_len: sparse * 4096,
                    compress,
                    ..CopyOptions::default()
                };
                Case { sources, options, request_alignment: align, can_zero }
            },
        )
}

proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(200))]

    #[test]
    fn the_target_equals_the_sources(case in case(), seed in any::<u64>()) {
        run(seed, async {
            let disks = DiskGraph::new();
            let mut expected = Vec::new();
            let mut sources = Vec::new();
            for (i, (values, cut)) in case.sources.iter().enumerate() {
                let mut bytes = grains(&values.iter().map(|(value, _)| *value).collect::<Vec<_>>());
                bytes.truncate(bytes.len() - cut);
                expected.extend_from_slice(&bytes);
                let statuses = values
                    .iter()
                    .enumerate()
                    .filter(|(_, (_, known))| *known)
                    .map(|(at, _)| {
                        let start = (at * GRAIN) as u64;
                        (start..start + GRAIN as u64, ZERO, None)
                    })
                    .collect();
                let config = Config { statuses, turns: 1, ..Config::default() };
                let (node, _) = disks.node(&format!("source{i}"), bytes, config).await;
                sources.push(CopySource::from(Arc::new(backend(&node))));
            }
            let limits = Limits { request_alignment: case.request_alignment, ..Limits::default() };
            let zero_flags = case.can_zero.then_some(ZeroFlags::MAY_UNMAP);
            let config = Config { limits, zero_flags, turns: 1, ..Config::default() };
            let fill = vec![0xAA; expected.len()];
            let (node, state) = disks.node("target", fill, config).await;
            copy(&sources, &backend(&node), &case.options).await.unwrap();
            assert_eq!(state.bytes()[..expected.len()], expected);
        });
    }
}

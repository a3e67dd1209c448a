//! Tests block status of layers and chains, by table.

use std::ops::Range;

use crate::driver::{HostMap, Limits, Precision, StatusFlags};
use crate::error::ErrorKind;
use crate::options::Options;
use crate::test_kit::disk::{Answer, Config, DiskGraph, On, backend};
use crate::test_kit::run;

const DATA: StatusFlags = StatusFlags::DATA;
const ZERO: StatusFlags = StatusFlags::ZERO;
const ALLOCATED: StatusFlags = StatusFlags::ALLOCATED;
const EOF: StatusFlags = StatusFlags::EOF;
const VALID: StatusFlags = StatusFlags::OFFSET_VALID;
const RAW: StatusFlags = StatusFlags::RAW;
const RECURSE: StatusFlags = StatusFlags::RECURSE;
const NONE: StatusFlags = StatusFlags::empty();

fn at(child: &'static str, offset: u64) -> Option<HostMap> {
    Some(HostMap { child, offset })
}

/// base (1000 bytes) <- mid (600 bytes) <- top (2000 bytes), all of them can have a backing node.
async fn chain(
    disks: &DiskGraph,
    top: Vec<Answer>,
    mid: Vec<Answer>,
    base: Vec<Answer>,
) -> crate::request::Backend {
    let ro = |options: Options| options.with("read-only", true);
    let backs = |statuses, options| Config {
        supports_backing: true,
        statuses,
        options,
        ..Config::default()
    };
    let (_b, _) = disks.node("base", vec![1; 1000], backs(base, ro(Options::new()))).await;
    let options = ro(Options::new().with("backing", "base"));
    let (_m, _) = disks.node("mid", vec![2; 600], backs(mid, options)).await;
    let options = ro(Options::new().with("backing", "mid"));
    let (t, _) = disks.node("top", vec![3; 2000], backs(top, options)).await;
    backend(&t)
}

#[test]
fn chain_status_by_table() {
    let unallocated = |range: Range<u64>| vec![(range, NONE, None)];
    // (top, mid, base), query: length, flags, depth
    type Case = (Vec<Answer>, Vec<Answer>, Vec<Answer>, Range<u64>, u64, StatusFlags, usize);
    let table: Vec<Case> = vec![
        // The top decides.
        (vec![], vec![], vec![], 0..2000, 2000, DATA | ALLOCATED | EOF, 0),
        (vec![], vec![], vec![], 10..20, 10, DATA | ALLOCATED, 0),
        (vec![(0..100, ZERO, None)], vec![], vec![], 0..2000, 100, ZERO | ALLOCATED, 0),
        // The one below decides, and the run is cut there.
        (unallocated(0..2000), vec![], vec![], 0..2000, 600, DATA | ALLOCATED, 1),
        (unallocated(0..300), vec![], vec![], 0..2000, 300, DATA | ALLOCATED, 1),
        (unallocated(0..2000), vec![(0..50, ZERO, None)], vec![], 0..2000, 50, ZERO | ALLOCATED, 1),
        // Two below.
        (unallocated(0..2000), unallocated(0..600), vec![], 100..2000, 500, DATA | ALLOCATED, 2),
        // No layer decides, and there is no more backing: zeros.
        (unallocated(0..2000), unallocated(0..600), unallocated(0..1000), 100..2000, 500, ZERO, 2),
        // Past the end of the middle one, which is shorter: zeros, decided there.
        (unallocated(0..2000), vec![], vec![], 700..2000, 1300, ZERO | ALLOCATED | EOF, 1),
        // At and past the end of the top.
        (vec![], vec![], vec![], 2000..2100, 0, EOF, 0),
    ];
    for (top, mid, base, query, len, flags, depth) in table {
        run(1, async {
            let text = format!("{top:?} {mid:?} {base:?} {query:?}");
            let disks = DiskGraph::new();
            let disk = chain(&disks, top, mid, base).await;
            let query_len = query.end - query.start;
            let run = disk.block_status(query.start, query_len, Precision::Exact).await.unwrap();
            assert_eq!((run.len, run.flags, run.depth), (len, flags, depth), "{text}");
        });
    }
}

#[test]
fn above_a_base_only_the_layers_above_decide() {
    run(1, async {
        let disks = DiskGraph::new();
        let disk =
            chain(&disks, vec![(0..100, NONE, None), (100..2000, ZERO, None)], vec![], vec![])
                .await;
        let mid = disks.find("mid").id();
        let run = disk.status_above(mid, 0, 2000, Precision::Exact).await.unwrap();
        assert_eq!((run.len, run.flags), (100, NONE));
        let run = disk.status_above(mid, 100, 50, Precision::Exact).await.unwrap();
        assert_eq!((run.len, run.flags), (50, ZERO | ALLOCATED));
        let own = disk.node().unwrap().id();
        let run = disk.status_above(own, 0, 70, Precision::Exact).await.unwrap();
        assert_eq!((run.len, run.flags), (70, NONE));
    });
}

/// Filters above the base would answer for its bytes.
#[test]
fn filters_above_a_base_do_not_decide() {
    run(1, async {
        let disks = DiskGraph::new();
        let config = |options: Options| Config { options, ..Config::default() };
        let (base, _) = disks.node("base", vec![1; 1000], config(Options::new())).await;
        let mut filters = Vec::new();
        let mut below = "base";
        for name in ["low", "high"] {
            let options = Options::new().with("file", below);
            let filter = Config { is_filter: true, ..config(options) };
            filters.push(disks.node(name, vec![1; 1000], filter).await.0);
            below = name;
        }
        let top = Config {
            supports_backing: true,
            statuses: vec![(0..100, NONE, None)],
            options: Options::new().with("backing", below),
            ..Config::default()
        };
        let (top, _) = disks.node("top", vec![3; 2000], top).await;
        let top = backend(&top);
        for stop in ["base", "low", "high"] {
            let id = disks.find(stop).id();
            let run = top.status_above(id, 0, 2000, Precision::Exact).await.unwrap();
            assert_eq!((run.len, run.flags), (100, NONE), "{stop}");
        }
        let high = backend(&filters[1]);
        let run = high.status_above(base.id(), 0, 10, Precision::Exact).await.unwrap();
        assert_eq!((run.len, run.flags), (10, NONE));
    });
}

#[test]
fn is_zero_looks_through_the_chain() {
    run(1, async {
        let disks = DiskGraph::new();
        let disk = chain(
            &disks,
            vec![(0..2000, NONE, None)],
            vec![(0..50, ZERO, None), (100..600, NONE, None)],
            vec![(100..200, ZERO, None)],
        )
        .await;
        let table = [
            (0..50, true),
            (0..51, false),
            (100..200, true),
            (150..250, false),
            (600..2000, true),
            (2000..5000, true),
        ];
        for (range, expected) in table {
            let found = disk.is_zero(range.start, range.end - range.start).await.unwrap();
            assert_eq!(found, expected, "{range:?}");
        }
    });
}

#[test]
fn raw_and_recurse_mappings_are_followed() {
    // the format's answer, the file's (4096 bytes, data but for 1024..2048): length, flags, host
    // offset
    let zeros = vec![(1024..2048, ZERO, None)];
    let file_of = |answer: Answer| {
        let zeros = zeros.clone();
        run(1, async move {
            let disks = DiskGraph::new();
            let config = Config { statuses: zeros, ..Config::default() };
            let (_file, _) = disks.node("file", vec![1; 4096], config).await;
            let options = Options::new().with("file", "file");
            let config = Config { statuses: vec![answer], options, ..Config::default() };
            let (node, _) = disks.node("format", vec![1; 8192], config).await;
            let disk = backend(&node);
            let run = disk.block_status(0, 1000, Precision::Exact).await.unwrap();
            (run.len, run.flags, run.host.map(|host| host.offset))
        })
    };
    let mapped = DATA | VALID;
    let table = [
        ((0..8192, RAW, at("file", 500)), (524, DATA | ALLOCATED, None)),
        ((0..8192, RAW, at("file", 1024)), (1000, ZERO | ALLOCATED, None)),
        ((0..8192, mapped, at("file", 1024)), (1000, mapped | ALLOCATED, Some(1024))),
        (
            (0..8192, mapped | RECURSE, at("file", 1024)),
            (1000, mapped | ZERO | ALLOCATED, Some(1024)),
        ),
        ((0..8192, mapped | RECURSE, at("file", 900)), (124, mapped | ALLOCATED, Some(900))),
        (
            (0..8192, mapped | RECURSE, at("file", 5000)),
            (1000, mapped | ZERO | ALLOCATED, Some(5000)),
        ),
        ((0..8192, ZERO | VALID, at("file", 0)), (1000, ZERO | VALID | ALLOCATED, Some(0))),
    ];
    for (answer, expected) in table {
        assert_eq!(file_of(answer.clone()), expected, "{answer:?}");
    }
}

#[test]
fn status_queries_are_aligned_and_answers_trimmed() {
    run(1, async {
        let limits = Limits { request_alignment: 512, ..Limits::default() };
        let statuses = vec![(0..1024, ZERO, None), (1024..4096, DATA | VALID, at("self", 10240))];
        let config = Config { limits, statuses, ..Config::default() };
        let (disk, _) = DiskGraph::new().disk(vec![0; 4096], config).await;
        let run = disk.block_status(700, 2000, Precision::Exact).await.unwrap();
        assert_eq!((run.len, run.flags), (324, ZERO | ALLOCATED));
        let run = disk.layer_status(1100, 20, Precision::Exact).await.unwrap();
        assert_eq!((run.len, run.map.unwrap().offset), (20, 10240 + 76));
    });
}

#[test]
fn a_failed_status_query_is_an_error() {
    run(1, async {
        let (disk, state) = DiskGraph::new().disk(vec![0; 4096], Config::default()).await;
        state.fail_always(On::Status, None);
        assert_eq!(
            disk.block_status(0, 10, Precision::Exact).await.unwrap_err().kind(),
            ErrorKind::Io
        );
        assert_eq!(disk.is_zero(0, 10).await.unwrap_err().kind(), ErrorKind::Io);
    });
}

//! Defines the benchmark cases: commands, contestants and targets.

use super::images::{CHAINS, Prepare};
use super::stage::Stage;

/// How the cost is read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Measured {
    /// So many requests in the reported time.
    Requests(u32),
    /// Seconds from start to end.
    Seconds,
}

/// One program under measurement.
#[derive(Debug)]
pub(crate) struct Contestant {
    pub(crate) name: String,
    pub(crate) before: Vec<Prepare>,
    pub(crate) command: Vec<String>,
}

/// One comparison: a row of the table.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) target: &'static str,
    pub(crate) measured: Measured,
    pub(crate) rounds: usize,
    pub(crate) contestants: Vec<Contestant>,
    /// Flushes are counted, in one more run each.
    pub(crate) counts_syncs: bool,
}

/// All cases, in the order of the report.
pub(crate) fn all(stage: &Stage) -> Vec<Case> {
    let mut cases = Vec::new();
    cached_reads(stage, &mut cases);
    direct_reads(stage, &mut cases);
    writes(stage, &mut cases);
    scattered_writes(stage, &mut cases);
    compressed_reads(stage, &mut cases);
    chains(stage, &mut cases);
    converts(stage, &mut cases);
    inspection(stage, &mut cases);
    cases
}

/// A `bench` command line of either tool.
struct Bench<'a> {
    count: u32,
    depth: u32,
    cache: &'a str,
    format: &'a str,
    extra: &'a [&'a str],
    image: &'a str,
}

impl Bench<'_> {
    fn arguments(&self, tool: &str, more: &[&str]) -> Vec<String> {
        let (count, depth) = (self.count.to_string(), self.depth.to_string());
        let mut arguments = vec![
            tool,
            "bench",
            "-c",
            &count,
            "-d",
            &depth,
            "-s",
            "4096",
            "-t",
            self.cache,
            "-f",
            self.format,
        ];
        arguments.extend(more);
        arguments.extend(self.extra);
        arguments.push(self.image);
        arguments.into_iter().map(str::to_owned).collect()
    }

    fn bds(&self, stage: &Stage, name: &str, more: &[&str]) -> Contestant {
        Contestant {
            name: name.to_owned(),
            before: Vec::new(),
            command: self.arguments(&stage.bds, more),
        }
    }

    /// qemu-img in each aio mode the cache mode allows.
    fn qemu(&self) -> Vec<Contestant> {
        let modes: &[&str] = if self.cache == "none" {
            &["threads", "native", "io_uring"]
        } else {
            &["threads", "io_uring"]
        };
        let contestant = |mode: &&str| Contestant {
            name: (*mode).to_owned(),
            before: Vec::new(),
            command: self.arguments("qemu-img", &["-i", mode]),
        };
        modes.iter().map(contestant).collect()
    }

    fn case(&self, stage: &Stage, name: String, target: &'static str) -> Case {
        let mut contestants = vec![self.bds(stage, "bds", &[])];
        contestants.extend(self.qemu());
        let measured = Measured::Requests(self.count);
        Case { name, target, measured, rounds: 5, contestants, counts_syncs: false }
    }
}

/// The same command for both tools, ours first.
fn both(stage: &Stage, args: &[&str], before: &[Prepare]) -> Vec<Contestant> {
    let contestant = |name: &str, tool: &str| Contestant {
        name: name.to_owned(),
        before: before.to_vec(),
        command: std::iter::once(tool).chain(args.iter().copied()).map(str::to_owned).collect(),
    };
    vec![contestant("bds", &stage.bds), contestant("", "qemu-img")]
}

fn scaled(stage: &Stage, count: u32) -> u32 {
    if stage.quick { count / 5 } else { count }
}

fn cached_reads(stage: &Stage, cases: &mut Vec<Case>) {
    for depth in [1, 32] {
        let bench = Bench {
            count: scaled(stage, 1_000_000),
            depth,
            cache: "writeback",
            format: "qcow2",
            extra: &[],
            image: "dense.qcow2",
        };
        let mut case = bench.case(
            stage,
            format!("read 4k cached depth {depth}"),
            "speed >= 2.5; >= 0.85 of the bare file",
        );
        let bare = Bench { format: "raw", image: "dense.raw", ..bench };
        case.contestants.push(bare.bds(stage, "bds bare file", &[]));
        cases.push(case);
    }
    let bench = Bench {
        count: scaled(stage, 1_000_000),
        depth: 32,
        cache: "writeback",
        format: "qcow2",
        extra: &[],
        image: "dense.qcow2",
    };
    let mut case = bench.case(stage, "read 4k cached depth 32, two threads".into(), "speed >= 2.5");
    case.contestants.insert(0, bench.bds(stage, "bds", &["--threads", "2"]));
    case.contestants[1].name = "bds one thread".into();
    cases.push(case);
}

fn direct_reads(stage: &Stage, cases: &mut Vec<Case>) {
    for (depth, count) in [(1, 40_000), (32, 200_000)] {
        let bench = Bench {
            count: scaled(stage, count),
            depth,
            cache: "none",
            format: "qcow2",
            extra: &["-S", "1052672"],
            image: "dense.qcow2",
        };
        cases.push(bench.case(
            stage,
            format!("read 4k O_DIRECT depth {depth}"),
            "not behind at <= 0.8 of the CPU",
        ));
    }
    let bench = Bench {
        count: scaled(stage, 200_000),
        depth: 32,
        cache: "none",
        format: "qcow2",
        extra: &["-S", "1052672"],
        image: "dense.qcow2",
    };
    let mut case = bench.case(stage, "read 4k O_DIRECT depth 32, two threads".into(), "not behind");
    case.contestants.insert(0, bench.bds(stage, "bds", &["--threads", "2"]));
    case.contestants[1].name = "bds one thread".into();
    cases.push(case);
}

/// A fresh "w.qcow2".
fn create(stage: &Stage, more: &[&str], size: &str) -> Vec<Prepare> {
    let mut arguments = vec![stage.bds.as_str(), "create", "-q", "-f", "qcow2"];
    arguments.extend(more);
    arguments.extend(["w.qcow2", size]);
    vec![
        Prepare::Remove("w.qcow2".into()),
        Prepare::Run(arguments.into_iter().map(str::to_owned).collect()),
    ]
}

fn writes(stage: &Stage, cases: &mut Vec<Case>) {
    let copy = vec![
        Prepare::Remove("w.qcow2".into()),
        Prepare::Run(["cp", "dense.qcow2", "w.qcow2"].map(str::to_owned).to_vec()),
    ];
    let count = scaled(stage, 40_000);
    let mut push = |name: &str, target, extra: &[&str], before: Vec<Prepare>| {
        let bench =
            Bench { count, depth: 8, cache: "writeback", format: "qcow2", extra, image: "w.qcow2" };
        let mut case = bench.case(stage, name.to_owned(), target);
        for contestant in &mut case.contestants {
            contestant.before.clone_from(&before);
        }
        cases.push(case);
    };
    push("write 4k in place", "not behind", &["-w", "-S", "4096"], copy);
    push(
        "write 4k into fresh clusters",
        "speed >= 2",
        &["-w", "-S", "65536"],
        create(stage, &[], "4G"),
    );
    push(
        "write 4k over a backing file",
        "not behind",
        &["-w", "-S", "65536"],
        create(stage, &["-b", "dense.qcow2", "-F", "qcow2"], "4G"),
    );
}

/// Allocating writes all over an image whose tables are few: each changes another table than the
/// one before.
fn scattered_writes(stage: &Stage, cases: &mut Vec<Case>) {
    let mut push = |name: &str, target, before: Vec<Prepare>| {
        // An odd number of clusters, 0.38 of the image: no cluster twice.
        let bench = Bench {
            count: scaled(stage, 30_000),
            depth: 32,
            cache: "writeback",
            format: "qcow2",
            extra: &["-w", "-S", "815988736"],
            image: "w.qcow2",
        };
        let mut case = bench.case(stage, name.to_owned(), target);
        for contestant in &mut case.contestants {
            contestant.before.clone_from(&before);
        }
        case.counts_syncs = true;
        cases.push(case);
    };
    push("write 4k scattered into fresh clusters, 2 GiB", "speed >= 1.5", create(stage, &[], "2G"));
    push(
        "write 4k scattered over a backing file, 2 GiB",
        "speed >= 0.9",
        create(stage, &["-b", "wide.raw", "-F", "raw"], "2G"),
    );
}

fn compressed_reads(stage: &Stage, cases: &mut Vec<Case>) {
    for codec in ["zlib", "zstd"] {
        let image = format!("{codec}.qcow2");
        let sequential = Bench {
            count: scaled(stage, 65_536),
            depth: 1,
            cache: "writeback",
            format: "qcow2",
            extra: &["-S", "4096"],
            image: &image,
        };
        cases.push(sequential.case(stage, format!("read 4k {codec} sequential"), "speed >= 5"));
        // A prime number of clusters and one block further: no cluster is asked twice before all
        // were.
        let random =
            Bench { count: scaled(stage, 20_000), extra: &["-S", "87494656"], ..sequential };
        cases.push(random.case(stage, format!("read 4k {codec} scattered"), "<= 0.65 of the CPU"));
    }
}

fn chains(stage: &Stage, cases: &mut Vec<Case>) {
    for layers in CHAINS {
        let image = format!("layer{layers}.qcow2");
        let count = scaled(stage, if layers < 100 { 200_000 } else { 40_000 });
        let bench = Bench {
            count,
            depth: 1,
            cache: "writeback",
            format: "qcow2",
            extra: &[],
            image: &image,
        };
        cases.push(bench.case(
            stage,
            format!("read 4k through {layers} overlays"),
            "<= 0.1 us a layer",
        ));
    }
}

fn converts(stage: &Stage, cases: &mut Vec<Case>) {
    let fresh = [Prepare::Remove("out".into())];
    let mut push = |name: &str, target, args: &[&str]| {
        let contestants = both(stage, &[&["convert"], args, &["out"]].concat(), &fresh);
        cases.push(Case {
            name: format!("convert {name}"),
            target,
            measured: Measured::Seconds,
            rounds: 5,
            contestants,
            counts_syncs: false,
        });
    };
    let plain = "not behind at <= 0.8 of the CPU";
    push("dense raw to qcow2", plain, &["-f", "raw", "-O", "qcow2", "dense.raw"]);
    push("dense qcow2 to raw", plain, &["-f", "qcow2", "-O", "raw", "dense.qcow2"]);
    let direct = "not behind";
    push(
        "dense raw to qcow2 -t none",
        direct,
        &["-t", "none", "-f", "raw", "-O", "qcow2", "dense.raw"],
    );
    push(
        "dense qcow2 to raw -t none",
        direct,
        &["-t", "none", "-f", "qcow2", "-O", "raw", "dense.qcow2"],
    );
    push("sparse raw to qcow2", plain, &["-f", "raw", "-O", "qcow2", "sparse.raw"]);
    push("sparse qcow2 to raw", plain, &["-f", "qcow2", "-O", "raw", "sparse.qcow2"]);
    push(
        "qcow2 to qcow2 -c zlib",
        "speed >= 2",
        &["-c", "-f", "qcow2", "-O", "qcow2", "text.qcow2"],
    );
    let zstd = ["-c", "-f", "qcow2", "-O", "qcow2", "-o", "compression_type=zstd", "text.qcow2"];
    push("qcow2 to qcow2 -c zstd", "speed >= 1.5", &zstd);
}

fn inspection(stage: &Stage, cases: &mut Vec<Case>) {
    let mut push = |name: &str, target, rounds, args: &[&str]| {
        let contestants = both(stage, args, &[]);
        cases.push(Case {
            name: name.to_owned(),
            target,
            measured: Measured::Seconds,
            rounds,
            contestants,
            counts_syncs: false,
        });
    };
    push(
        "compare dense",
        "not behind",
        5,
        &["compare", "-f", "raw", "-F", "qcow2", "dense.raw", "dense.qcow2"],
    );
    push("map dense", "not behind", 9, &["map", "-f", "qcow2", "--output=json", "dense.qcow2"]);
    push("info", "<= 0.5 of the time", 21, &["info", "-f", "qcow2", "dense.qcow2"]);
}

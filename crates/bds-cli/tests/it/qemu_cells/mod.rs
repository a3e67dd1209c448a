//! Compares qemu-img and `bds` over the matrix {v2, v3} × cluster size × refcount width ×
//! {standard, extended L2} × codec × {backing file or not} × {data file or not}.
//!
//! In every cell two images are made with the same words and get the same requests: one by QEMU's
//! tools, one by ours. Then each tool looks at both, each side goes on writing into the other's
//! image, and both look again. The bytes are compared with a model that neither has seen. By
//! default a sample of the cells in which every pair of values occurs; `BDS_TEST_BUDGET=full` runs
//! all, `BDS_TEST_CELL="v3 65536 rc16 None"` (as a failure names it) those whose name has that
//! part.

pub(crate) mod cell;
mod library;
mod reports;
mod script;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use bds_testkit::{Output, Scratch, Tool};

use crate::programs::{Tools, is_full, outcome_line, text};
use cell::{Cell, Codec};
use reports::{Facts, difference};
use script::{Act, Bytes};

#[test]
fn images_of_either_side_are_read_and_written_by_the_other() {
    let Some(tools) = Tools::find() else { return };
    let valid: Vec<Cell> =
        Cell::all().into_iter().filter(|cell| cell.forbidden_by().is_empty()).collect();
    let mut cells = if is_full() { valid.clone() } else { cell::pairwise(&valid) };
    if let Ok(wanted) = std::env::var("BDS_TEST_CELL") {
        cells = valid.iter().filter(|cell| cell.to_string().contains(&wanted)).copied().collect();
        assert!(!cells.is_empty(), "BDS_TEST_CELL={wanted}: no cell has that in its name");
    }
    println!("{} of {} cells", cells.len(), valid.len());
    assert!(valid.len() > 200, "{} cells", valid.len());
    report(each(&cells, |cell| CellRun::new(&tools, cell).run()));
}

#[test]
fn what_the_format_forbids_is_refused_by_both() {
    let Some(tools) = Tools::find() else { return };
    let forbidden: Vec<Cell> =
        Cell::all().into_iter().filter(|cell| !cell.forbidden_by().is_empty()).collect();
    let cells = if is_full() { forbidden.clone() } else { cell::one_of_each_kind(&forbidden) };
    println!("{} of {} forbidden cells", cells.len(), forbidden.len());
    assert!(cells.len() >= 5, "each reason for itself");
    report(each(&cells, |cell| CellRun::new(&tools, cell).refuse()));
}

#[test]
fn compressed_clusters_in_a_data_file_are_refused_by_both() {
    let Some(tools) = Tools::find() else { return };
    let cells: Vec<Cell> = Cell::all()
        .into_iter()
        .filter(|cell| cell.forbidden_by().is_empty())
        .filter(|cell| cell.data_file && cell.codec != Codec::None)
        .filter(|cell| cell.refcount_bits == 16 && !cell.backing)
        .collect();
    assert!(!cells.is_empty());
    report(each(&cells, |cell| CellRun::new(&tools, cell).refuse_compression()));
}

/// Runs the cells on two threads; what went wrong, by cell.
fn each(cells: &[Cell], run: impl Fn(Cell) -> Vec<String> + Sync) -> Vec<(Cell, Vec<String>)> {
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    let work = || {
        while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
            let problems = run(*cell);
            if !problems.is_empty() {
                found.lock().unwrap_or_else(PoisonError::into_inner).push((*cell, problems));
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn report(found: Vec<(Cell, Vec<String>)>) {
    let lines =
        found.iter().map(|(cell, problems)| format!("{cell}\n    {}", problems.join("\n    ")));
    let text: Vec<String> = lines.collect();
    assert!(text.is_empty(), "{} cells differ:\n{}", text.len(), text.join("\n"));
}

/// Which tool made an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Qemu,
    Bds,
}

/// One cell, its tools and its files.
struct CellRun<'a> {
    tools: &'a Tools,
    cell: Cell,
    scratch: Scratch,
    problems: Vec<String>,
}

impl<'a> CellRun<'a> {
    fn new(tools: &'a Tools, cell: Cell) -> Self {
        Self { tools, cell, scratch: Scratch::in_memory(), problems: Vec::new() }
    }

    fn path(&self, side: Side, what: &str) -> PathBuf {
        self.scratch.path(&format!("{side:?}.{what}").to_lowercase())
    }

    fn add_problems(&mut self, what: &str, problems: impl IntoIterator<Item = String>) {
        self.problems.extend(problems.into_iter().map(|problem| format!("{what}: {problem}")));
    }

    /// The whole cell. An empty list: everything agrees.
    fn run(mut self) -> Vec<String> {
        let Cell { cluster, version, backing, .. } = self.cell;
        let seed = cluster ^ u64::from(self.cell.refcount_bits) << 40;
        let mut model = Bytes::new(self.cell.disk_len());
        if backing {
            match self.make_bases() {
                Ok(base) => model = base.resized(model.len),
                Err(problem) => return vec![problem],
            }
        }
        let discards_zero = version == 3 || !backing;
        let steps = [
            (script::first(&self.cell, seed), [Side::Qemu, Side::Bds]),
            // Now into each other's.
            (script::random(&self.cell, seed + 1, 12), [Side::Bds, Side::Qemu]),
        ];
        for side in [Side::Qemu, Side::Bds] {
            let output = self.create(side);
            if !output.ok() {
                return vec![format!("create by {side:?}: {}", outcome_line(&output))];
            }
        }
        for (round, (acts, writers)) in steps.into_iter().enumerate() {
            model.apply(&acts, cluster, discards_zero);
            for (side, writer) in [Side::Qemu, Side::Bds].into_iter().zip(writers) {
                let image = self.path(side, "qcow2");
                if let Err(e) = self.write(writer, &image, &acts) {
                    self.add_problems(&format!("round {round}, {writer:?} into {side:?}'s"), [e]);
                    return self.problems;
                }
            }
            if let Err(e) = self.look(round, &model) {
                self.add_problems(&format!("round {round}"), [e]);
                return self.problems;
            }
        }
        self.problems
    }

    /// The same base twice, made by either side: shorter than the disk, and not ending with a
    /// cluster.
    fn make_bases(&self) -> Result<Bytes, String> {
        let c = self.cell.cluster;
        let mut model = Bytes::new(7 * c + 1536);
        let acts = [
            Act::Write { at: 10, len: 2 * c, byte: 0x71 },
            Act::Write { at: 3 * c + 99, len: 3 * c, byte: 0x72 },
            Act::Zero { at: 4 * c, len: c / 2, may_unmap: false },
            Act::Write { at: 7 * c, len: 1536, byte: 0x73 },
        ];
        model.apply(&acts, c, true);
        for (side, tool) in [(Side::Qemu, &self.tools.img), (Side::Bds, &self.tools.bds)] {
            let base = self.path(side, "base");
            let options = "cluster_size=4096";
            let size = model.len.to_string();
            let output =
                tool.run(["create", "-q", "-f", "qcow2", "-o", options, text(&base), &size]);
            if !output.ok() {
                return Err(format!("base of {side:?}: {}", outcome_line(&output)));
            }
            self.write(side, &base, &acts)?;
        }
        Ok(model)
    }

    fn tool(&self, side: Side) -> &'a Tool {
        match side {
            Side::Qemu => &self.tools.img,
            Side::Bds => &self.tools.bds,
        }
    }

    /// `create`, in the words both understand.
    fn create(&self, side: Side) -> Output {
        let [image, base, data] = ["qcow2", "base", "data"].map(|what| self.path(side, what));
        let options = self.cell.options(text(&data));
        let len = self.cell.disk_len().to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if self.cell.backing {
            args.extend(["-b", text(&base), "-F", "qcow2"]);
        }
        args.extend([text(&image), &len]);
        self.tool(side).run(&args)
    }

    fn write(&self, writer: Side, image: &Path, acts: &[Act]) -> Result<(), String> {
        match writer {
            Side::Bds => library::apply(image, acts).map_err(|e| e.to_string()),
            Side::Qemu => {
                let commands: Vec<String> = acts.iter().map(Act::command).collect();
                let mut args = vec!["-f", "qcow2", "-d", "unmap"];
                args.extend(commands.iter().flat_map(|command| ["-c", command]));
                args.push(text(image));
                let output = self.tools.io.run(&args);
                let is_done = output.ok() && !outcome_line(&output).contains("failed");
                if is_done { Ok(()) } else { Err(format!("qemu-io: {}", outcome_line(&output))) }
            }
        }
    }

    /// Both tools look at both images.
    fn look(&mut self, round: usize, model: &Bytes) -> Result<(), String> {
        let raw = self.scratch.path("model.raw");
        model.save(&raw).map_err(|e| e.to_string())?;
        let mut seen = Vec::new();
        for side in [Side::Qemu, Side::Bds] {
            let image = self.path(side, "qcow2");
            let what = format!("round {round}, {side:?}'s image");
            let (facts, differences) = Facts::compare(self.tools, &image, model)?;
            self.add_problems(&what, facts.faults());
            self.add_problems(&what, differences);
            for tool in [&self.tools.img, &self.tools.bds] {
                let args = ["compare", "-f", "qcow2", "-F", "raw", text(&image), text(&raw)];
                let output = tool.run(args);
                if !output.ok() {
                    self.add_problems(
                        &what,
                        [format!("compare by {tool:?}: {}", outcome_line(&output))],
                    );
                }
            }
            seen.push(facts);
        }
        let [qemu, bds] = &seen[..] else { return Err("two images were made".to_owned()) };
        let differences = difference("shape", &bds.shape(), &qemu.shape())
            .into_iter()
            .chain(difference("nature", &bds.nature(), &qemu.nature()));
        let differences: Vec<String> = differences.collect();
        self.add_problems(&format!("round {round}, between the images"), differences);
        Ok(())
    }

    /// Neither side makes this image.
    fn refuse(mut self) -> Vec<String> {
        if self.cell.backing
            && let Err(problem) = self.make_bases()
        {
            return vec![problem];
        }
        let reasons = self.cell.forbidden_by();
        for side in [Side::Qemu, Side::Bds] {
            let words = reasons.iter().map(|reason| match side {
                Side::Qemu => reason.qemu,
                Side::Bds => reason.bds,
            });
            let output = self.create(side);
            self.problems.extend(not_refused(side, &output, words));
            let has_left = self.path(side, "qcow2").exists();
            if side == Side::Bds && has_left {
                self.problems.push("Bds refuses it and leaves a file".to_owned());
            }
        }
        self.problems
    }

    /// Neither side converts into it with `-c`.
    fn refuse_compression(mut self) -> Vec<String> {
        let source = self.scratch.path("source.raw");
        if let Err(e) = std::fs::write(&source, [0x5a; 8192]) {
            return vec![e.to_string()];
        }
        for (side, words) in [
            (Side::Qemu, "Operation not supported"),
            (Side::Bds, "Compression not supported for this file format"),
        ] {
            let [image, data] = ["qcow2", "data"].map(|what| self.path(side, what));
            let options = self.cell.options(text(&data));
            let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
            let output = self.tool(side).run(args.iter().chain(&[text(&source), text(&image)]));
            self.problems.extend(not_refused(side, &output, [words]));
        }
        self.problems
    }
}

/// What is wrong with a refusal: exit code 1 and one of these reasons, by name. A panic, a signal
/// or another error is none.
fn not_refused(
    side: Side,
    output: &Output,
    words: impl IntoIterator<Item = &'static str>,
) -> Option<String> {
    let is_refused =
        output.code == 1 && words.into_iter().any(|words| output.stderr.contains(words));
    (!is_refused)
        .then(|| format!("{side:?} does not refuse it for its reason: {}", outcome_line(output)))
}

#[test]
fn a_panic_or_another_error_does_not_count_as_refusal() {
    let output = |code, stderr: &str| Output { code, stdout: String::new(), stderr: stderr.into() };
    let judge = |code, stderr| not_refused(Side::Bds, &output(code, stderr), ["too small", "no"]);
    assert_eq!(judge(1, "bds: x: clusters are too small"), None);
    for (code, stderr) in [(0, ""), (101, "panicked: too small"), (1, "bds: x: disk full"), (1, "")]
    {
        assert!(judge(code, stderr).is_some(), "{code} {stderr}");
    }
}

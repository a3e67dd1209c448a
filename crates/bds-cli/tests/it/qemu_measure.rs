//! Compares `measure` with qemu-img's: the same numbers for every kind of image the matrix has,
//! empty and with data.

use bds_testkit::Scratch;

use crate::programs::{Tools, is_full, outcome_line, text};
use crate::qemu_cells::cell::{Cell, pairwise};

#[test]
fn empty_images_measure_the_same() {
    let Some(tools) = Tools::find() else { return };
    let valid: Vec<Cell> =
        Cell::all().into_iter().filter(|cell| cell.forbidden_by().is_empty()).collect();
    let cells = if is_full() { valid } else { pairwise(&valid) };
    let mut problems = Vec::new();
    for cell in &cells {
        // A data file and a backing file have to be named; neither is looked at.
        let mut options = cell.options("data");
        if cell.backing {
            options += ",backing_file=base,backing_fmt=raw";
        }
        for size in ["0", "1", "1000000", "3G"] {
            // With a backing file only subclusters can be preallocated; what cannot be made, bds
            // does not measure.
            let modes: &[&str] = match cell.backing && !cell.extended {
                true => &[""],
                false => &["", ",preallocation=metadata"],
            };
            for more in modes {
                let options = format!("{options}{more}");
                problems.extend(differ(&tools, &["-o", &options, "--size", size]));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn contents_measure_the_same() {
    let Some(tools) = Tools::find() else { return };
    let scratch = Scratch::in_memory();
    let [base, top] = ["base.qcow2", "top.qcow2"].map(|name| scratch.path(name));
    tools.img.must(["create", "-q", "-f", "qcow2", text(&base), "40M"]);
    let writes = ["write -q -P 1 1M 2M", "write -q -P 2 5000 700", "write -q -c -P 3 8M 128k"];
    let args = writes.iter().flat_map(|write| ["-c", write]);
    tools.io.must(["-f", "qcow2"].into_iter().chain(args).chain([text(&base)]));
    let overlay = ["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "qcow2"];
    tools.img.must(overlay.iter().chain(&[text(&top), "50M"]));
    let writes = ["write -q -P 4 2M 4M", "write -q -z 1M 256k", "write -q -P 5 49M 1M"];
    let args = writes.iter().flat_map(|write| ["-c", write]);
    tools.io.must(["-f", "qcow2"].into_iter().chain(args).chain([text(&top)]));
    let mut problems = Vec::new();
    for image in [&base, &top] {
        for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=2M,extended_l2=on"] {
            problems.extend(differ(&tools, &["-o", options, "-f", "qcow2", text(image)]));
        }
        for format in ["raw", "qcow2"] {
            let arguments = ["measure", "-O", format, "-f", "qcow2", "--output=json", text(image)];
            let (ours, theirs) =
                (tools.bds.must(arguments).json(), tools.img.must(arguments).json());
            for key in ["required", "fully-allocated"] {
                if ours[key] != theirs[key] {
                    problems.push(format!("{arguments:?}: {key} ours {ours}, theirs {theirs}"));
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Where the answers for a qcow2 image differ. Refusals need not use the same words.
fn differ(tools: &Tools, args: &[&str]) -> Option<String> {
    let args: Vec<&str> =
        ["measure", "-O", "qcow2", "--output=json"].iter().chain(args).copied().collect();
    let (ours, theirs) = (tools.bds.run(&args), tools.img.run(&args));
    let numbers = |output: &bds_testkit::Output| {
        let value = if output.ok() { output.json() } else { serde_json::Value::Null };
        ["required", "fully-allocated"].map(|key| value[key].clone())
    };
    let is_same = ours.code == theirs.code && numbers(&ours) == numbers(&theirs);
    (!is_same).then(|| {
        format!(
            "{}:\n    ours {}\n    theirs {}",
            args.join(" "),
            outcome_line(&ours),
            outcome_line(&theirs)
        )
    })
}

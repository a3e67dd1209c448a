//! Compares `convert` with all its options, `resize` and `compare` with qemu-img's: the same
//! contents result.

use std::path::Path;

use bds_testkit::{Scratch, Tool};

use crate::programs::{Tools, outcome_line, text};

/// A chain of two images with data, zeros and unaligned ends, and the same as one raw file.
struct Sources {
    scratch: Scratch,
}

impl Sources {
    fn new(tools: &Tools) -> Self {
        let scratch = Scratch::in_memory();
        let [base, top, raw] = ["base", "top", "raw"].map(|name| scratch.path(name));
        let len = (6 << 20) + 1536;
        tools.img.must(["create", "-q", "-f", "qcow2", text(&base), "5M"]);
        let writes = ["write -q -P 1 0 200k", "write -q -P 2 1M 1M", "write -q -P 3 4500k 600k"];
        write(tools, &base, &writes);
        let overlay = ["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "qcow2"];
        tools.img.must(overlay.iter().chain(&[text(&top), &len.to_string()]));
        let writes = [
            "write -q -P 4 100000 3000",
            "write -q -z 1280k 200k",
            "write -q -P 0 3M 128k",
            "write -q -P 5 6M 1536",
        ];
        write(tools, &top, &writes);
        tools.img.must(["convert", "-f", "qcow2", "-O", "raw", text(&top), text(&raw)]);
        Self { scratch }
    }
}

fn write(tools: &Tools, image: &Path, commands: &[&str]) {
    let args = commands.iter().flat_map(|command| ["-c", command]);
    tools.io.must(["-f", "qcow2"].into_iter().chain(args).chain([text(image)]));
}

/// Format of the output, and switches; BASE is the base image.
const WAYS: [(&str, &str); 20] = [
    ("raw", ""),
    ("raw", "-S 0"),
    ("raw", "-S 64k"),
    ("raw", "-W -m 16"),
    ("raw", "-m 1"),
    ("raw", "-C"),
    ("raw", "-t none -T none"),
    ("raw", "-t writethrough -p"),
    ("raw", "-o preallocation=full"),
    ("qcow2", ""),
    ("qcow2", "-S 0"),
    ("qcow2", "-S 512k"),
    ("qcow2", "-W -m 16"),
    ("qcow2", "-c"),
    ("qcow2", "-c -W -m 5 -o compression_type=zstd"),
    ("qcow2", "-c -o cluster_size=512"),
    ("qcow2", "-B BASE -F qcow2"),
    ("qcow2", "-B BASE -F qcow2 -W -m 4 -o cluster_size=4k"),
    ("qcow2", "-o preallocation=metadata"),
    ("qcow2", "-o preallocation=falloc,cluster_size=2M"),
];

#[test]
fn every_way_to_convert_keeps_the_bytes() {
    let Some(tools) = Tools::find() else { return };
    let sources = Sources::new(&tools);
    let [base, top, raw] = ["base", "top", "raw"].map(|name| sources.scratch.path(name));
    let mut problems = Vec::new();
    for (format, switches) in WAYS {
        for (source, from) in [(&top, "qcow2"), (&raw, "raw")] {
            let out = sources.scratch.path("out");
            let mut args = vec!["convert", "-f", from, "-O", format];
            let switches = switches.replace("BASE", text(&base));
            args.extend(switches.split_whitespace());
            args.extend([text(source), text(&out)]);
            let output = tools.bds.run(&args);
            let problem = if output.ok() {
                judge(&tools, [(&out, format), (&raw, "raw")])
            } else {
                Some(outcome_line(&output))
            };
            problems.extend(problem.map(|p| format!("{}: {p}", args.join(" "))));
            std::fs::remove_file(&out).expect("it was made");
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Output that exists: full of other bytes, or declared to be zero.
#[test]
fn existing_outputs_are_overwritten() {
    let Some(tools) = Tools::find() else { return };
    let sources = Sources::new(&tools);
    let [top, raw, out] = ["top", "raw", "out"].map(|name| sources.scratch.path(name));
    let len = std::fs::metadata(&raw).expect("it was made").len().to_string();
    let mut problems = Vec::new();
    for format in ["raw", "qcow2"] {
        for (is_full, switches) in
            [(true, "-n"), (true, "-n -S 0"), (false, "-n --target-is-zero"), (true, "-n -W -m 8")]
        {
            tools.img.must(["create", "-q", "-f", format, text(&out), &len]);
            if is_full {
                let fill = format!("write -q -P 99 0 {len}");
                tools.io.must(["-f", format, "-c", &fill, text(&out)]);
            }
            let mut args = vec!["convert", "-f", "qcow2", "-O", format];
            args.extend(switches.split_whitespace());
            args.extend([text(&top), text(&out)]);
            let output = tools.bds.run(&args);
            let problem = if output.ok() {
                judge(&tools, [(&out, format), (&raw, "raw")])
            } else {
                Some(outcome_line(&output))
            };
            problems.extend(problem.map(|p| format!("{}: {p}", args.join(" "))));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Do both images hold the same bytes, and is the first one sound?
fn judge(tools: &Tools, [image, other]: [(&Path, &str); 2]) -> Option<String> {
    let names = ["-f", image.1, "-F", other.1, text(image.0), text(other.0)];
    let plain = tools.img.run(["compare"].iter().chain(&names));
    if !plain.ok() {
        return Some(outcome_line(&plain));
    }
    // Strict only about the length: allocation may differ.
    let strict = tools.img.run(["compare", "-s"].iter().chain(&names));
    if strict.stdout.contains("size") {
        return Some(outcome_line(&strict));
    }
    if image.1 == "qcow2" {
        let check = tools.img.run(["check", "-f", "qcow2", text(image.0)]);
        return (!check.ok()).then(|| outcome_line(&check));
    }
    None
}

/// Growing and cutting: the same size, contents and verdict, or both refuse.
#[test]
fn resizing_ends_the_same() {
    let Some(tools) = Tools::find() else { return };
    let scratch = Scratch::in_memory();
    let steps = [
        ("raw", "", "3M"),
        ("raw", "", "+1k"),
        ("raw", "", "1M"),
        ("raw", "--shrink", "-1M"),
        ("raw", "--shrink", "1024"),
        ("raw", "--preallocation=full", "+64k"),
        ("raw", "--shrink --preallocation=full", "-64k"),
        ("qcow2", "", "3M"),
        ("qcow2", "", "+1536"),
        ("qcow2", "", "1M"),
        ("qcow2", "", "-100M"),
        ("qcow2", "--preallocation=metadata", "+1M"),
        ("qcow2", "--preallocation=falloc", "+1M"),
        ("qcow2", "--preallocation=full", "+70k"),
    ];
    let mut problems = Vec::new();
    for format in ["raw", "qcow2"] {
        let images = ["ours", "theirs"].map(|name| scratch.path(&format!("{name}.{format}")));
        for image in &images {
            tools.img.must(["create", "-q", "-f", format, text(image), "2M"]);
            tools.io.must(["-f", format, "-c", "write -q -P 7 1M 1M", text(image)]);
        }
        for (_, switches, size) in steps.iter().filter(|step| step.0 == format) {
            let run = |tool: &Tool, image: &Path| {
                let mut args = vec!["resize", "-q", "-f", format];
                args.extend(switches.split_whitespace());
                args.extend([text(image), size]);
                tool.run(args)
            };
            let (ours, theirs) = (run(&tools.bds, &images[0]), run(&tools.img, &images[1]));
            let what = format!("{format} {switches} {size}");
            if ours.code != theirs.code {
                problems.push(format!(
                    "{what}: ours {}, theirs {}",
                    outcome_line(&ours),
                    outcome_line(&theirs)
                ));
            }
            let problem = judge(&tools, [(&images[0], format), (&images[1], format)]);
            problems.extend(problem.map(|problem| format!("{what}: {problem}")));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The exit code tells identical (0), different (1) and failed (2 and more) apart.
#[test]
fn compare_ends_with_the_same_code() {
    let Some(tools) = Tools::find() else { return };
    let scratch = Scratch::in_memory();
    let path = |name: &str| scratch.path(name);
    let data = bds_testkit::pattern(5, 0, 99_840);
    let mut other = data.clone();
    other[70_000] ^= 1;
    let longer = |extra: u8| [&data[..], &[extra; 5120]].concat();
    for (name, bytes) in [
        ("a", &data),
        ("same", &data),
        ("other", &other),
        ("zeros-behind", &longer(0)),
        ("data-behind", &longer(1)),
        ("empty", &Vec::new()),
        ("junk.qcow2", &b"QFI\xfbjunk".to_vec()),
    ] {
        std::fs::write(path(name), bytes).expect("scratch is writable");
    }
    tools.img.must(["create", "-q", "-f", "qcow2", text(&path("zero.qcow2")), "99840"]);
    tools.img.must(["create", "-q", "-f", "raw", text(&path("zero.raw")), "99840"]);
    let mut problems = Vec::new();
    for (switches, first, second) in [
        ("-f raw -F raw", "a", "same"),
        ("-s -f raw -F raw", "a", "same"),
        ("-f raw -F raw", "a", "other"),
        ("-f raw -F raw", "a", "zeros-behind"),
        ("-f raw -F raw", "zeros-behind", "a"),
        ("-s -f raw -F raw", "a", "zeros-behind"),
        ("-f raw -F raw", "a", "data-behind"),
        ("-f raw -F raw", "data-behind", "a"),
        ("-f raw -F raw", "a", "empty"),
        ("-f raw -F raw", "empty", "empty"),
        ("-f raw -F raw", "a", "missing"),
        ("-f raw -F qcow2", "a", "junk.qcow2"),
        ("-f qcow2 -F raw", "zero.qcow2", "zero.raw"),
        ("-s -f qcow2 -F raw", "zero.qcow2", "zero.raw"),
        ("-f nonsense -F raw", "a", "same"),
        ("-f raw -F raw -T nonsense", "a", "same"),
    ] {
        let [first, second] = [first, second].map(path);
        let args: Vec<&str> = ["compare"]
            .into_iter()
            .chain(switches.split_whitespace())
            .chain([text(&first), text(&second)])
            .collect();
        let (ours, theirs) = (tools.bds.run(&args), tools.img.run(&args));
        let failed = |code: i32| code >= 2;
        let is_same = ours.code == theirs.code || failed(ours.code) && failed(theirs.code);
        if !is_same || !failed(ours.code) && ours.stdout != theirs.stdout {
            let what = args[1..].join(" ");
            problems.push(format!(
                "{what}: ours {}, theirs {}",
                outcome_line(&ours),
                outcome_line(&theirs)
            ));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

//! `commit` beside qemu-img's, and `stream`: the same disks, headers and messages afterwards.

use std::path::PathBuf;

use bds_testkit::{Output, Scratch, Tool};
use serde_json::Value;

use crate::programs::{Tools, text};

/// A chain base ◄ mid ◄ top, with data and zeros in each.
struct Chain {
    scratch: Scratch,
}

impl Chain {
    fn new(tools: &Tools) -> Self {
        let this = Self { scratch: Scratch::new() };
        let path = |name: &str| this.path(name);
        let img = |words: &[&str]| tools.img.must(words);
        let (base, mid, top) = (path("base.qcow2"), path("mid.qcow2"), path("top.qcow2"));
        img(&["create", "-q", "-f", "qcow2", text(&base), "1M"]);
        let write = |image: &PathBuf, commands: &[&str]| {
            let mut words = vec!["-f", "qcow2"];
            commands.iter().for_each(|command| words.extend(["-c", command]));
            words.push(text(image));
            tools.io.must(words);
        };
        write(&base, &["write -P 1 0 512k"]);
        // Longer than the base.
        img(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "qcow2", text(&mid), "3M"]);
        write(&mid, &["write -P 2 64k 100k", "write -z 256k 64k", "write -P 3 2M 64k"]);
        img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", text(&top), "3M"]);
        write(&top, &["write -P 4 70k 1000", "write -z 384k 128k", "write -P 5 2500k 70k"]);
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    /// Runs `commit` or `stream` on the top image.
    fn run(&self, tool: &Tool, verb: &str, options: &[&str]) -> Output {
        let top = self.path("top.qcow2");
        let mut words = vec![verb];
        words.extend(options);
        words.push(text(&top));
        tool.run(words)
    }

    fn recorded(&self, tools: &Tools) -> Option<String> {
        let info = tools.img.must(["info", "--output=json", text(&self.path("top.qcow2"))]).json();
        info.get("backing-filename").and_then(Value::as_str).map(str::to_owned)
    }

    /// Which clusters the image of this name holds itself.
    fn held(&self, tools: &Tools, name: &str) -> Vec<(u64, u64, bool)> {
        let map = tools.img.must(["map", "--output=json", text(&self.path(name))]).json();
        let run = |run: &Value| {
            let number = |key: &str| run[key].as_u64().unwrap_or(0);
            (number("depth") == 0 && run["present"] == true)
                .then(|| (number("start"), number("length"), run["zero"] == true))
        };
        map.as_array().expect("a list").iter().filter_map(run).collect()
    }
}

fn equal(tools: &Tools, ours: &Chain, theirs: &Chain, name: &str) {
    let (a, b) = (ours.path(name), theirs.path(name));
    tools.img.must(["compare", "-f", "qcow2", "-F", "qcow2", text(&a), text(&b)]);
    tools.img.must(["check", "-q", text(&a)]);
}

#[test]
fn commit_does_what_qemu_img_does() {
    let Some(tools) = Tools::find() else { return };
    for words in ["", "-d", "-q", "-f qcow2", "-t writethrough", "-r 100M", "-b base", "-p -d"] {
        let (ours, theirs) = (Chain::new(&tools), Chain::new(&tools));
        let with_base = |chain: &Chain| -> Vec<String> {
            let base = text(&chain.path("base.qcow2")).to_owned();
            let word = |word: &str| if word == "base" { base.clone() } else { word.to_owned() };
            words.split_whitespace().map(word).collect()
        };
        let run = |chain: &Chain, tool: &Tool| {
            let options = with_base(chain);
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            chain.run(tool, "commit", &options)
        };
        let (our, their) = (run(&ours, &tools.bds), run(&theirs, &tools.img));
        assert_eq!((our.code, &our.stderr), (their.code, &their.stderr), "{words}: {our:?}");
        let last = |output: &Output| output.stdout.lines().last().unwrap_or_default().to_owned();
        assert_eq!(last(&our), last(&their), "{words}");
        for name in ["base.qcow2", "mid.qcow2", "top.qcow2"] {
            equal(&tools, &ours, &theirs, name);
        }
        assert_eq!(ours.recorded(&tools), theirs.recorded(&tools), "{words}");
        assert_eq!(
            ours.held(&tools, "top.qcow2").is_empty(),
            theirs.held(&tools, "top.qcow2").is_empty(),
            "{words}"
        );
    }
}

#[test]
fn commit_is_refused_with_qemu_imgs_words() {
    let Some(tools) = Tools::find() else { return };
    let chain = Chain::new(&tools);
    let base = chain.path("base.qcow2");
    for words in [vec!["commit", text(&base)], vec!["commit", "-b", "nosuch", text(&base)]] {
        let (our, their) = (tools.bds.run(&words), tools.img.run(&words));
        assert_eq!(our.code, their.code, "{words:?}");
        let theirs = their.stderr.replace("qemu-img: ", "bds: ");
        assert_eq!(our.stderr, theirs, "{words:?}");
    }
}

#[test]
fn stream_copies_the_chain_into_the_image() {
    let Some(tools) = Tools::find() else { return };
    let (chain, untouched) = (Chain::new(&tools), Chain::new(&tools));
    let base = chain.path("base.qcow2");
    let out = chain.run(&tools.bds, "stream", &["-b", text(&base)]);
    assert_eq!((out.code, out.stdout.as_str()), (0, "Image streamed.\n"), "{out:?}");
    assert_eq!(chain.recorded(&tools).as_deref(), Some(text(&base)));
    equal(&tools, &chain, &untouched, "top.qcow2");

    let out = chain.run(&tools.bds, "stream", &["--output=json"]);
    assert_eq!(out.code, 0, "{out:?}");
    let events: Vec<Value> =
        out.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(events.iter().any(|event| event["event"] == "BLOCK_JOB_COMPLETED"), "{events:?}");
    assert_eq!(chain.recorded(&tools), None);
    equal(&tools, &chain, &untouched, "top.qcow2");
    std::fs::remove_file(&base).unwrap();
    equal(&tools, &chain, &untouched, "top.qcow2");

    let nothing = tools.bds.run(["stream", "-b", "nosuch", text(&chain.path("top.qcow2"))]);
    assert!(nothing.stderr.starts_with("bds: Did not find 'nosuch'"), "{nothing:?}");
}

//! What programs that were compiled earlier rely on: sizes and offsets of all structs, values of
//! all constants, and the types of all functions, as they are committed in `abi/`.
//!
//! `BDS_UPDATE_ABI=1` writes the committed files anew: for additions at any time, for anything else
//! only with a new SONAME. abidiff compares libraries that are made of the header alone, one
//! without code for each function, whose debug information has C's types.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use bds_testkit::Scratch;

use crate::c_suite;
use crate::header::Header;

fn committed(name: &str) -> PathBuf {
    c_suite::manifest_dir().join("abi").join(name)
}

fn is_updating() -> bool {
    env::var_os("BDS_UPDATE_ABI").is_some()
}

/// Prints sizes, offsets and values.
fn layout_program(header: &Header) -> String {
    let mut text = String::from("#include \"bds.h\"\n#include <stdio.h>\nint main(void) {\n");
    for one in &header.structs {
        let name = &one.name;
        writeln!(text, "    printf(\"{name} %zu\\n\", sizeof({name}));").unwrap();
        for field in &one.fields {
            writeln!(
                text,
                "    printf(\"{name}.{field} %zu %zu\\n\", offsetof({name}, {field}), \
                 sizeof((({name} *)0)->{field}));"
            )
            .unwrap();
        }
    }
    for name in &header.constants {
        writeln!(text, "    printf(\"{name} %lld\\n\", (long long){name});").unwrap();
    }
    text + "    return 0;\n}\n"
}

#[test]
fn layouts_and_constants_are_as_committed() {
    if !c_suite::is_installed("gcc") {
        return bds_testkit::skip("gcc is not installed");
    }
    let scratch = Scratch::new();
    let (source, binary) = (scratch.path("layout.c"), scratch.path("layout"));
    fs::write(&source, layout_program(&Header::committed())).unwrap();
    let include = c_suite::manifest_dir().join("include");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c11", "-Werror", "-I"]).arg(include).arg("-o").arg(&binary).arg(&source);
    c_suite::must("gcc", &gcc.output().unwrap());
    let output = Command::new(&binary).output().unwrap();
    c_suite::must("layout", &output);
    let found = String::from_utf8(output.stdout).unwrap();
    assert!(found.contains("bds_request.reserved 96 32\n"), "{found}");
    let path = committed("layout.txt");
    if is_updating() {
        fs::write(&path, &found).unwrap();
    }
    let wanted = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = found.lines().collect();
    let gone: Vec<&str> = wanted.lines().filter(|line| !lines.contains(line)).collect();
    assert!(gone.is_empty(), "changed or gone, which breaks programs: {gone:#?}");
    assert_eq!(found, wanted, "additions: run with BDS_UPDATE_ABI=1");
}

/// A function body for every prototype.
fn stubs(header: &Header) -> String {
    let mut text = String::from("#include \"bds.h\"\n");
    for function in &header.functions {
        let params: Vec<String> =
            function.params.iter().map(|param| format!("{} {}", param.kind, param.name)).collect();
        let params = if params.is_empty() { "void".to_owned() } else { params.join(", ") };
        let body = if function.returns == "void" { "" } else { "return 0;" };
        writeln!(text, "{} {}({params}) {{ {body} }}", function.returns, function.name).unwrap();
    }
    text
}

/// A shared library of stubs, from a header that was edited.
fn stub_library(dir: &Path, name: &str, edit: impl Fn(String) -> String) -> PathBuf {
    let header = fs::read_to_string(c_suite::manifest_dir().join("include/bds.h")).unwrap();
    let header = edit(header);
    let include = dir.join(name);
    fs::create_dir(&include).unwrap();
    fs::write(include.join("bds.h"), &header).unwrap();
    let source = include.join("stubs.c");
    fs::write(&source, stubs(&Header::parse(&header))).unwrap();
    let library = include.join("libstubs.so");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c11", "-g", "-shared", "-fPIC", "-Wl,-soname,libbds.so.0.1", "-I"]);
    gcc.arg(&include).arg("-o").arg(&library).arg(&source);
    c_suite::must(&format!("gcc of {name}"), &gcc.output().unwrap());
    library
}

fn abidiff(old: &Path, new: &Path) -> Output {
    Command::new("abidiff").arg("--no-show-locs").args([old, new]).output().unwrap()
}

/// What abidiff finds beside additions.
fn breaks(output: &Output) -> Option<String> {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let code = output.status.code().unwrap_or(-1);
    assert!(code & 3 == 0, "abidiff: {output:?}");
    let is_clean = |line: &str| {
        let Some((_, counts)) = line.split_once("changes summary: ") else { return true };
        counts.contains("0 Removed, 0 Changed")
    };
    (!said.lines().all(is_clean)).then_some(said)
}

/// Why abidiff cannot run here.
fn missing() -> Option<&'static str> {
    let tools = ["gcc", "abidiff", "abidw"];
    tools.into_iter().find(|tool| !c_suite::is_installed(tool))
}

#[test]
fn functions_have_the_committed_types() {
    if let Some(tool) = missing() {
        return bds_testkit::skip(&format!("{tool} is not installed"));
    }
    let scratch = Scratch::new();
    let library = stub_library(scratch.dir(), "now", |header| header);
    let path = committed("bds-0.1.abi");
    if is_updating() {
        let mut abidw = Command::new("abidw");
        abidw.args(["--no-show-locs", "--no-corpus-path", "--no-comp-dir-path", "--out-file"]);
        c_suite::must("abidw", &abidw.arg(&path).arg(&library).output().unwrap());
    }
    let found = breaks(&abidiff(&path, &library));
    assert!(found.is_none(), "{}", found.unwrap());
}

/// Each planted break is found, and an addition is none: else a clean comparison means nothing.
#[test]
fn abidiff_finds_planted_breaks() {
    if let Some(tool) = missing() {
        return bds_testkit::skip(&format!("{tool} is not installed"));
    }
    let scratch = Scratch::new();
    let plain = stub_library(scratch.dir(), "plain", |header| header);
    let flush = "int bds_flush(struct bds_backend backend);";
    type Edit = (&'static str, bool, fn(String) -> String);
    let edits: [Edit; 5] = [
        ("removed", true, |header| {
            header.replace("int bds_flush(struct bds_backend backend);", "")
        }),
        ("parameter", true, |header| {
            let to = "int bds_flush(struct bds_backend backend, int flags);";
            header.replace("int bds_flush(struct bds_backend backend);", to)
        }),
        ("field", true, |header| header.replace("uint64_t user_data;", "uint32_t user_data;")),
        ("grown", true, |header| {
            header.replace("} bds_extent;", "  uint64_t more;\n} bds_extent;")
        }),
        ("added", false, |header| {
            let more = "int bds_flush(struct bds_backend backend);\nint bds_more(uint32_t flags);";
            header.replace("int bds_flush(struct bds_backend backend);", more)
        }),
    ];
    let header = fs::read_to_string(c_suite::manifest_dir().join("include/bds.h")).unwrap();
    assert!(header.contains(flush) && header.contains("} bds_extent;"));
    for (name, is_break, edit) in edits {
        let edited = stub_library(scratch.dir(), name, edit);
        let found = breaks(&abidiff(&plain, &edited));
        assert_eq!(found.is_some(), is_break, "{name}: {found:?}");
    }
}

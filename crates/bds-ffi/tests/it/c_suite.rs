//! Compiles every file of `tests/c` as C or C++, links it with the library, runs it.
//!
//! A cell is compiler, linking, language, tool. Here: the two cells that differ in everything.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use bds_testkit::Scratch;

/// How a program is built.
pub(crate) struct Cell {
    name: &'static str,
    compiler: &'static str,
    flags: &'static [&'static str],
    is_static: bool,
}

const C11: Cell = Cell {
    name: "gcc-shared-c11",
    compiler: "gcc",
    flags: &["-std=c11", "-D_DEFAULT_SOURCE", "-Wstrict-prototypes"],
    is_static: false,
};
/// For generated programs, which do not use everything they declare.
pub(crate) const SWEEP: Cell = Cell {
    name: "sweep",
    compiler: "gcc",
    flags: &[
        "-std=c11",
        "-D_DEFAULT_SOURCE",
        "-Wno-unused",
        "-Wno-cast-align",
        "-Wno-unused-result",
    ],
    is_static: false,
};
const CXX17: Cell = Cell {
    name: "g++-static-c++17",
    compiler: "g++",
    flags: &["-x", "c++", "-std=c++17", "-Wno-missing-field-initializers"],
    is_static: true,
};

pub(crate) fn manifest_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Programs that are linked statically in the default run, where linking takes most of the time.
const STATIC_SAMPLE: [&str; 4] = ["blocking_io", "change", "handles", "queue"];

/// The directory in which cargo put this test and the libraries.
fn built() -> PathBuf {
    env::current_exe().unwrap().parent().unwrap().to_owned()
}

pub(crate) fn is_installed(compiler: &str) -> bool {
    Command::new(compiler).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// The C files, or those of the examples.
fn sources(dir: &str) -> Vec<PathBuf> {
    let dir = manifest_dir().join(dir);
    let mut files: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "c"));
    files.sort();
    files
}

pub(crate) fn must(what: &str, output: &Output) {
    assert!(output.status.success(), "{}", report(what, output));
}

fn report(what: &str, output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{what}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

pub(crate) fn compile(cell: &Cell, source: &Path, program: &Path, libraries: &Path) {
    let mut compiler = Command::new(cell.compiler);
    compiler.args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-O1", "-pthread"]);
    compiler.args(cell.flags).arg("-I").arg(manifest_dir().join("include"));
    compiler.arg("-I").arg(manifest_dir().join("tests/c"));
    compiler.arg("-o").arg(program).arg(source);
    if cell.is_static {
        // Not C++ any more.
        compiler.args(["-x", "none"]).arg(built().join("libbds_ffi.a"));
        compiler.args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"]);
    } else {
        compiler.arg("-L").arg(libraries).arg("-lbds");
        compiler.arg(format!("-Wl,-rpath,{}", libraries.display()));
    }
    must(&format!("{} of {}", cell.compiler, source.display()), &compiler.output().unwrap());
}

/// The shared library under the names that linker and loader want.
pub(crate) fn libraries(dir: &Path) {
    let shared = built().join("libbds_ffi.so");
    assert!(shared.exists(), "{} is missing", shared.display());
    for name in ["libbds.so", "libbds.so.0.1"] {
        std::os::unix::fs::symlink(&shared, dir.join(name)).unwrap();
    }
}

fn run_all(cell: &Cell, dir: &str) {
    if !is_installed(cell.compiler) {
        return bds_testkit::skip(&format!("{} is not installed", cell.compiler));
    }
    let scratch = Scratch::new();
    libraries(scratch.dir());
    let mut failures = Vec::new();
    for source in sources(dir) {
        let name = source.file_stem().unwrap().to_string_lossy().into_owned();
        let is_full = env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
        if cell.is_static && !is_full && !STATIC_SAMPLE.contains(&name.as_str()) {
            continue;
        }
        let program = scratch.path(&name);
        compile(cell, &source, &program, scratch.dir());
        let work = scratch.path(&format!("{name}.dir"));
        fs::create_dir(&work).unwrap();
        let output = Command::new("timeout")
            .args(["120", &program.display().to_string()])
            .env("BDS_TEST_DIR", &work)
            .current_dir(&work)
            .output()
            .unwrap();
        if !output.status.success() {
            failures.push(report(&format!("{name} ({})", cell.name), &output));
        }
        fs::remove_file(&program).unwrap();
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn c_programs_run_with_the_shared_library() {
    run_all(&C11, "tests/c");
}

#[test]
fn cxx_programs_run_with_the_static_library() {
    run_all(&CXX17, "tests/c");
}

#[test]
fn examples_run() {
    run_all(&C11, "examples");
}

/// The header alone: every standard, both languages, twice, after macros that Windows is known for.
#[test]
fn the_header_compiles_under_every_standard() {
    let scratch = Scratch::new();
    let text = "#define min(a, b) ((a) < (b) ? (a) : (b))\n#include \"bds.h\"\n#include \"bds.h\"\n\
                int main(void) { return (int)BDS_OK; }\n";
    let mut count = 0;
    for (compilers, end, standards) in [
        (["gcc", "clang"], "c", ["c99", "c11", "c17", "gnu11"]),
        (["g++", "clang++"], "cc", ["c++11", "c++14", "c++17", "c++20"]),
    ] {
        let source = scratch.path(&format!("header.{end}"));
        fs::write(&source, text).unwrap();
        for compiler in compilers.into_iter().filter(|compiler| is_installed(compiler)) {
            for standard in standards {
                let mut command = Command::new(compiler);
                command.args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]);
                command.arg(format!("-std={standard}"));
                command.arg("-I").arg(manifest_dir().join("include")).arg(&source);
                must(&format!("{compiler} -std={standard}"), &command.output().unwrap());
                count += 1;
            }
        }
    }
    if count == 0 {
        bds_testkit::skip("no C compiler is installed");
    }
}

/// A handle of the wrong type does not compile.
#[test]
fn kinds_are_types() {
    if !is_installed("gcc") {
        return bds_testkit::skip("gcc is not installed");
    }
    let scratch = Scratch::new();
    let source = scratch.path("kinds.c");
    let text =
        "#include \"bds.h\"\nint main(void) { bds_queue q = {0}; return bds_node_unref(q); }\n";
    fs::write(&source, text).unwrap();
    let output = Command::new("gcc")
        .arg("-fsyntax-only")
        .arg("-I")
        .arg(manifest_dir().join("include"))
        .arg(&source)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("incompatible type for argument 1 of"), "{said}");
}

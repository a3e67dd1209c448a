//! Compiles every file of `tests/c` as C or C++, links it with the library, runs it.
//!
//! A cell is compiler, linking, language, tool. The default run takes one cell in full and samples
//! of others; `--tier full` runs every program in every cell.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use bds_testkit::Scratch;

/// How a program is built and run.
pub(crate) struct Cell {
    name: &'static str,
    compiler: &'static str,
    flags: &'static [&'static str],
    is_static: bool,
    tool: Tool,
    /// Programs of the default run; all of them with `--tier full`.
    sample: Sample,
}

/// What looks at a program while it runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tool {
    None,
    /// AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer, in the C code and the
    /// allocator.
    Sanitizers,
    Valgrind,
    /// ThreadSanitizer, in the C code and in the library, which was built with it.
    Races,
}

/// Which programs of a cell run by default.
#[derive(Clone, Copy)]
enum Sample {
    All,
    These(&'static [&'static str]),
    None,
}

const SANITIZE: &str = "-fsanitize=address,undefined";
const C11_FLAGS: &[&str] = &["-std=c11", "-D_DEFAULT_SOURCE", "-Wstrict-prototypes"];
const CXX17_FLAGS: &[&str] = &["-x", "c++", "-std=c++17", "-Wno-missing-field-initializers"];
const CLANGXX17_FLAGS: &[&str] =
    &["-x", "c++", "-std=c++17", "-Wno-missing-field-initializers", "-Wno-unused-function"];

/// The cell of generated programs, which do not use everything they declare. In a build with a
/// sanitizer (`BDS_TEST_SANITIZER`) they have it, too, and link the static library.
pub(crate) fn generated() -> Cell {
    match env::var("BDS_TEST_SANITIZER").as_deref() {
        Ok("thread") => RACES,
        Ok("address") => cell("asan", "gcc", SANITIZED_FLAGS, true, Tool::Sanitizers, Sample::All),
        _ => cell("generated", "gcc", SWEEP_FLAGS, false, Tool::None, Sample::All),
    }
}
const SANITIZED_FLAGS: &[&str] = &[
    "-std=c11",
    "-D_DEFAULT_SOURCE",
    "-Wno-unused",
    "-Wno-cast-align",
    "-Wno-unused-result",
    "-DNO_BLOCK_COUNT",
];
const SWEEP_FLAGS: &[&str] =
    &["-std=c11", "-D_DEFAULT_SOURCE", "-Wno-unused", "-Wno-cast-align", "-Wno-unused-result"];
/// Threads, in a build with ThreadSanitizer.
const RACES: Cell =
    cell("gcc-static-c11-tsan", "gcc", SANITIZED_FLAGS, true, Tool::Races, Sample::All);
const C11: Cell = cell("gcc-shared-c11", "gcc", C11_FLAGS, false, Tool::None, Sample::All);

/// Programs that the default run takes from cells where each of them takes long.
const FEW: Sample = Sample::These(&["blocking_io", "change", "handles", "queue"]);

/// The cells beside [`C11`]: each value of each axis is in one that runs by default.
const CELLS: [Cell; 9] = [
    cell("g++-static-c++17", "g++", CXX17_FLAGS, true, Tool::None, FEW),
    cell("gcc-shared-c11-asan", "gcc", C11_FLAGS, false, Tool::Sanitizers, FEW),
    cell("gcc-shared-c11-valgrind", "gcc", C11_FLAGS, false, Tool::Valgrind, FEW),
    cell("clang++-shared-c++17", "clang++", CLANGXX17_FLAGS, false, Tool::None, FEW),
    cell("clang-shared-c11-asan", "clang", C11_FLAGS, false, Tool::Sanitizers, Sample::None),
    cell("gcc-static-c11-asan", "gcc", C11_FLAGS, true, Tool::Sanitizers, Sample::None),
    cell("clang-static-c11-valgrind", "clang", C11_FLAGS, true, Tool::Valgrind, Sample::None),
    cell("g++-shared-c++17-asan", "g++", CXX17_FLAGS, false, Tool::Sanitizers, Sample::None),
    cell("clang++-static-c++17", "clang++", CLANGXX17_FLAGS, true, Tool::None, Sample::None),
];

const fn cell(
    name: &'static str,
    compiler: &'static str,
    flags: &'static [&'static str],
    is_static: bool,
    tool: Tool,
    sample: Sample,
) -> Cell {
    Cell { name, compiler, flags, is_static, tool, sample }
}

/// Programs that fork or exec, or look at their own threads: not under Valgrind, which is slow
/// there and follows only one process.
const NOT_UNDER_VALGRIND: [&str; 5] = ["exec", "fork", "fork_image", "limits", "threads"];

pub(crate) fn manifest_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The directory in which cargo put this test and the libraries.
fn built() -> PathBuf {
    env::current_exe().unwrap().parent().unwrap().to_owned()
}

pub(crate) fn is_installed(compiler: &str) -> bool {
    Command::new(compiler).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// The files of a directory with this extension.
fn sources(dir: &str, end: &str) -> Vec<PathBuf> {
    let dir = manifest_dir().join(dir);
    let mut files: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|found| found == end));
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
    compile_with(cell, source, program, libraries, &[]);
}

/// With further arguments, behind all others.
fn compile_with(cell: &Cell, source: &Path, program: &Path, libraries: &Path, more: &[String]) {
    let mut compiler = Command::new(cell.compiler);
    compiler.args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-O1", "-pthread"]);
    compiler.args(cell.flags).arg("-I").arg(manifest_dir().join("include"));
    compiler.arg("-I").arg(manifest_dir().join("tests/c"));
    if cell.tool == Tool::Sanitizers {
        compiler.args([SANITIZE, "-fno-sanitize-recover=all", "-DNO_ADDRESS_LIMIT"]);
    }
    let source =
        if cell.tool == Tool::Races { race_object(cell, source, program) } else { source.into() };
    compiler.arg(&source);
    compiler.arg("-o").arg(program);
    if cell.is_static {
        // Not C++ any more.
        compiler.args(["-x", "none"]).arg(built().join("libbds_ffi.a"));
        compiler.args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"]);
    } else {
        compiler.arg("-L").arg(libraries).arg("-lbds");
        compiler.arg(format!("-Wl,-rpath,{}", libraries.display()));
    }
    if cell.tool == Tool::Races {
        let runtime = race_runtime();
        compiler.arg("-Wl,--whole-archive").arg(runtime).args(["-Wl,--no-whole-archive", "-lm"]);
    }
    compiler.args(more);
    must(&format!("{} of {}", cell.compiler, source.display()), &compiler.output().unwrap());
}

/// Compiles without linking: the linker of gcc would add its own runtime of ThreadSanitizer, which
/// lacks functions that rustc's code calls.
fn race_object(cell: &Cell, source: &Path, program: &Path) -> PathBuf {
    let object = program.with_extension("o");
    let mut compiler = Command::new(cell.compiler);
    compiler.args(["-g", "-O1", "-fsanitize=thread", "-c"]).args(cell.flags);
    compiler.arg("-I").arg(manifest_dir().join("include"));
    compiler.arg("-I").arg(manifest_dir().join("tests/c")).arg(source).arg("-o").arg(&object);
    must(&format!("{} of {}", cell.compiler, source.display()), &compiler.output().unwrap());
    object
}

/// rustc's runtime of ThreadSanitizer.
fn race_runtime() -> PathBuf {
    let output = Command::new("rustc").args(["--print", "target-libdir"]).output().unwrap();
    must("rustc", &output);
    let dir = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    dir.join("librustc-nightly_rt.tsan.a")
}

/// The shared library under the names that linker and loader want.
pub(crate) fn libraries(dir: &Path) {
    let shared = built().join("libbds_ffi.so");
    assert!(shared.exists(), "{} is missing", shared.display());
    for name in ["libbds.so", "libbds.so.0.1"] {
        std::os::unix::fs::symlink(&shared, dir.join(name)).unwrap();
    }
}

fn is_full() -> bool {
    env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full")
}

/// Why the cell cannot run here.
fn missing(cell: &Cell) -> Option<String> {
    let tool = (cell.tool == Tool::Valgrind).then_some("valgrind");
    let missing =
        [Some(cell.compiler), tool].into_iter().flatten().find(|name| !is_installed(name));
    missing.map(|name| format!("{name} is not installed ({})", cell.name))
}

fn is_selected(cell: &Cell, name: &str) -> bool {
    if cell.tool == Tool::Valgrind && NOT_UNDER_VALGRIND.contains(&name) {
        return false;
    }
    match cell.sample {
        _ if is_full() => true,
        Sample::All => true,
        Sample::These(names) => names.contains(&name),
        Sample::None => false,
    }
}

/// Runs a program, in a directory of its own, under the cell's tool.
fn execute(cell: &Cell, program: &Path, work: &Path) -> Output {
    fs::create_dir(work).unwrap();
    let mut command = Command::new("timeout");
    command.arg("300");
    if cell.tool == Tool::Valgrind {
        command.args(["valgrind", "-q", "--error-exitcode=99", "--leak-check=full"]);
        command.args(["--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]);
        // Valgrind does not see what the kernel writes through a ring.
        command.env("BDS_ENGINE", "pool");
    }
    command.arg(program).env("BDS_TEST_DIR", work).current_dir(work).output().unwrap()
}

fn run_all(cell: &Cell, dir: &str) {
    run_files(cell, sources(dir, "c"));
}

fn run_files(cell: &Cell, files: Vec<PathBuf>) {
    if let Some(why) = missing(cell) {
        return bds_testkit::skip(&why);
    }
    let scratch = Scratch::new();
    libraries(scratch.dir());
    let mut failures = Vec::new();
    for source in files {
        let name = source.file_stem().unwrap().to_string_lossy().into_owned();
        if !is_selected(cell, &name) {
            continue;
        }
        let program = scratch.path(&name);
        compile(cell, &source, &program, scratch.dir());
        let output = execute(cell, &program, &scratch.path(&format!("{name}.dir")));
        if !output.status.success() {
            failures.push(report(&format!("{name} ({})", cell.name), &output));
        }
        fs::remove_file(&program).unwrap();
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Each tool finds the mistake that a program makes on purpose: else a clean run means nothing.
fn controls(cell: &Cell) {
    if let Some(why) = missing(cell) {
        return bds_testkit::skip(&why);
    }
    let scratch = Scratch::new();
    libraries(scratch.dir());
    for source in sources("tests/c/controls", "c") {
        let name = source.file_stem().unwrap().to_string_lossy().into_owned();
        let program = scratch.path(&name);
        compile(cell, &source, &program, scratch.dir());
        let output = execute(cell, &program, &scratch.path(&format!("{name}.dir")));
        let said = report(&name, &output);
        assert!(!output.status.success(), "{} does not find {name}", cell.name);
        assert!(output.status.code() != Some(124), "{said}");
        assert!(["Sanitizer", "Invalid", "lost"].iter().any(|w| said.contains(w)), "{said}");
    }
}

#[test]
fn c_programs_run_with_the_shared_library() {
    run_all(&C11, "tests/c");
}

#[test]
fn c_programs_run_in_the_other_cells() {
    for cell in &CELLS {
        run_all(cell, "tests/c");
    }
}

#[test]
fn tools_find_planted_mistakes() {
    for cell in CELLS.iter().filter(|cell| cell.tool != Tool::None) {
        if is_full() || !matches!(cell.sample, Sample::None) {
            controls(cell);
        }
    }
}

/// A planted race is found; programs whose threads share everything have none.
#[test]
fn threads_have_no_data_race() {
    if env::var("BDS_TEST_SANITIZER").as_deref() != Ok("thread") {
        return bds_testkit::skip("races are looked for in a build with ThreadSanitizer (full)");
    }
    let scratch = Scratch::new();
    let (source, program) = (manifest_dir().join("tests/c/races/planted.c"), scratch.path("race"));
    compile(&RACES, &source, &program, scratch.dir());
    let said = report("planted", &execute(&RACES, &program, &scratch.path("planted.dir")));
    assert!(said.contains("data race"), "{said}");
    let files = ["tests/c/threads.c", "tests/c/queue.c", "examples/event_loop.c"];
    run_files(&RACES, files.iter().map(|file| manifest_dir().join(file)).collect());
}

/// The answer of pkg-config; `None`: it does not know the package, or is not installed.
fn pkg_config(package: &str) -> Option<Vec<String>> {
    let output = Command::new("pkg-config").args(["--cflags", "--libs", package]).output().ok()?;
    let said = String::from_utf8(output.stdout).unwrap();
    // Another project's header may do what our warnings forbid.
    let words = said.split_whitespace().map(|word| word.replacen("-I", "-isystem", 1));
    output.status.success().then(|| words.collect())
}

/// Each file of `tests/c/loops` is named after the package of the event loop that it uses.
#[test]
fn event_loops_of_others_serve_a_queue() {
    let scratch = Scratch::new();
    libraries(scratch.dir());
    for source in sources("tests/c/loops", "c") {
        let name = source.file_stem().unwrap().to_string_lossy().into_owned();
        let Some(more) = pkg_config(&name).filter(|_| is_installed("gcc")) else {
            bds_testkit::skip(&format!("pkg-config does not find {name}"));
            continue;
        };
        let program = scratch.path(&name);
        compile_with(&C11, &source, &program, scratch.dir(), &more);
        must(&name, &execute(&C11, &program, &scratch.path(&format!("{name}.dir"))));
    }
}

/// The program is not linked with the library.
#[test]
fn the_library_is_loaded_and_closed_many_times() {
    if !is_installed("gcc") {
        return bds_testkit::skip("gcc is not installed");
    }
    let scratch = Scratch::new();
    let source = manifest_dir().join("tests/c/loaded/dlopen.c");
    let program = scratch.path("dlopen");
    let mut gcc = Command::new("gcc");
    gcc.args(["-Wall", "-Wextra", "-Werror", "-pedantic"]).args(C11_FLAGS);
    gcc.arg("-I").arg(manifest_dir().join("include")).arg("-o").arg(&program).arg(&source);
    must("gcc of dlopen", &gcc.arg("-ldl").output().unwrap());
    let mut command = Command::new("timeout");
    command.arg("300").arg(&program).arg(built().join("libbds_ffi.so"));
    must("dlopen", &command.output().unwrap());
}

#[test]
fn examples_run() {
    run_all(&C11, "examples");
}

/// `bds.hpp`, with both compilers; under the sanitizers where that is gcc.
#[test]
fn the_cxx_wrapper_releases_what_it_holds() {
    for (name, compiler, tool) in
        [("g++-hpp-asan", "g++", Tool::Sanitizers), ("clang++-hpp", "clang++", Tool::None)]
    {
        let cell = cell(name, compiler, &["-std=c++17"], false, tool, Sample::All);
        let examples = sources("examples", "cc");
        assert!(!examples.is_empty());
        run_files(&cell, examples);
    }
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

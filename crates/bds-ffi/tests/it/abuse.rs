//! Random programs over all functions of the header, in which any handle ever seen is used again.
//!
//! The calls are generated from the header, so a function that is added takes part; model and
//! arguments are in `tests/c/abuse*.h`. Whatever is called: a handle that was released never works
//! again, one that was not never is stale, no number is given out twice, every accepted request has
//! exactly one completion, and at the end no node has a holder, and no descriptor, thread or block
//! of memory is left. With several threads the same holds while they share every handle.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::resume_unwind;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, fs, thread};

use bds_testkit::Scratch;

use crate::c_suite;
use crate::header::{Function, Header, Param};

/// Calls of one program, over all its threads.
const STEPS: u32 = 60;
/// Functions whose call is written by hand.
const BY_HAND: [&str; 4] =
    ["bds_queue_submit", "bds_queue_poll", "bds_queue_wait", "bds_job_start_group"];
/// Functions that free memory, which the generated calls use themselves, and the one whose result
/// is another call's.
const NOT_CALLED: [&str; 3] = ["bds_free", "bds_buffer_free", "bds_error_status"];
/// Functions that also name things by other means than handles, which may have ended.
const WEAK: [&str; 2] = ["bds_node_acquire", "bds_change_commit"];
/// How often a function is called, where that is not once in the sum.
const WEIGHTS: [(&str, u32); 16] = [
    ("bds_bitmap_add", 6),
    ("bds_job_dismiss", 3),
    ("bds_job_finalize", 3),
    ("bds_job_resume", 3),
    ("bds_node_open", 16),
    ("bds_node_ref", 4),
    ("bds_node_unref", 4),
    ("bds_node_acquire", 2),
    ("bds_backend_create_on", 12),
    ("bds_backend_unref", 2),
    ("bds_queue_submit", 12),
    ("bds_queue_poll", 3),
    ("bds_pwrite", 3),
    ("bds_change_commit", 8),
    ("bds_job_start", 6),
    ("bds_graph_drain_begin", 2),
];
/// Functions that end too much, or take too long, to be called each time they are drawn.
const RARE: [(&str, u32); 8] = [
    ("bds_context_create", 4),
    ("bds_context_unref", 4),
    ("bds_context_shutdown", 16),
    ("bds_iothread_create", 6),
    ("bds_node_poison", 8),
    ("bds_image_create", 6),
    ("bds_image_convert", 4),
    ("bds_node_open_path", 4),
];

/// The list of texts for a parameter, as `abuse_words.h` names it.
fn words(function: &str, param: &str) -> &'static str {
    match (function, param) {
        ("bds_node_open" | "bds_options_merge" | "bds_monitor_add", _) => "W_node",
        ("bds_job_change", _) => "W_mode",
        ("bds_image_set_backing_file", "format") => "W_driver",
        ("bds_image_set_backing_file", "file") => "W_path",
        ("bds_node_reopen" | "bds_change_reopen", _) => "W_reopen",
        ("bds_image_convert", "options") => "W_convert",
        ("bds_job_start", "options") => "W_job",
        (name, "options") if name.starts_with("bds_image_") => "W_image",
        (name, "name" | "source_name") if name.contains("bitmap") => "W_bitmap",
        ("bds_graph_child", _) | (_, "child") => "W_child",
        (_, "name") => "W_name",
        (_, "path") => "W_path",
        (_, "driver") => "W_driver",
        (_, "type") => "W_type",
        (_, "id") => "W_id",
        (_, "state") => "W_state",
        (_, "what") => "W_what",
        (_, "key") => "W_key",
        (_, "value") => "W_value",
        (_, "preallocation") => "W_preallocation",
        (_, "feature") => "W_feature",
        _ => "W_any",
    }
}

/// How a parameter is declared, passed, and looked at after a call that worked, or after any.
#[derive(Default)]
struct Argument {
    declared: String,
    passed: String,
    if_worked: String,
    after: String,
}

fn argument(header: &Header, function: &Function, at: usize) -> Argument {
    let param = &function.params[at];
    let var = format!("a{at}");
    if let Some(kind) = header.handle(param) {
        let optional = u8::from(header.is_optional_handle(&function.name, &param.name));
        return Argument {
            declared: format!("bds_{kind} {var} = {{use_any(t, K_{kind}, {optional})}};"),
            passed: var,
            ..Argument::default()
        };
    }
    if let Some(kind) = header.handle_out(param) {
        let section = if kind == "section" {
            format!(" began_section(t, {var}.raw);")
        } else {
            String::new()
        };
        return Argument {
            declared: format!("bds_{kind} {var} = {{0}};"),
            passed: format!("&{var}"),
            if_worked: format!("made(t, K_{kind}, {var}.raw);{section}"),
            ..Argument::default()
        };
    }
    match param.is_pointer() {
        true => pointer(header, function, param, var),
        false => Argument { passed: number(function, param), ..Argument::default() },
    }
}

fn pointer(header: &Header, function: &Function, param: &Param, var: String) -> Argument {
    let place =
        |declared: String| Argument { declared, passed: format!("&{var}"), ..Argument::default() };
    let value = |passed: &str| Argument { passed: passed.to_owned(), ..Argument::default() };
    match param.kind.as_str() {
        "const char *" => {
            let list = words(&function.name, &param.name);
            value(&format!("words(t, {list}, LEN({list}))"))
        }
        "char **" => {
            Argument { after: format!("bds_free({var});"), ..place(format!("char *{var} = NULL;")) }
        }
        "void **" => Argument {
            after: format!("bds_buffer_free({var});"),
            ..place(format!("void *{var} = NULL;"))
        },
        "uint64_t *" if param.name == "id_out" => Argument {
            if_worked: format!("add_id(t, {var});"),
            ..place(format!("uint64_t {var} = 0;"))
        },
        "void *" if param.name == "start" => value("memory"),
        "void *" | "const void *" => value("t->buffer"),
        "const struct iovec *" => value("any_segments(t)"),
        "struct bds_extent *" => Argument {
            declared: format!("bds_extent {var}[8];"),
            passed: var,
            ..Argument::default()
        },
        kind => match (param.struct_read(), param.struct_written()) {
            (Some(name), _) => options(header, name, &var),
            (None, Some(name)) if header.initial.iter().any(|known| known == name) => {
                place(format!("bds_{name} {var} = BDS_{}_INIT;", name.to_uppercase()))
            }
            _ => {
                let pointee = kind.strip_suffix(" *").unwrap_or("char");
                Argument {
                    declared: format!("{pointee} {var};"),
                    passed: format!("&{var}"),
                    ..Argument::default()
                }
            }
        },
    }
}

/// A struct of options: NULL, or its initial value with random fields.
fn options(header: &Header, name: &str, var: &str) -> Argument {
    assert!(header.initial.iter().any(|known| known == name), "bds_{name} has no initial value");
    let fill = match name {
        "context_options" | "backend_options" | "queue_options" => {
            format!(
                " int is_null_{var} = one_in(t, 6); if (!is_null_{var}) fill_{name}(t, &{var});"
            )
        }
        _ => format!(" int is_null_{var} = one_in(t, 3);"),
    };
    Argument {
        declared: format!("bds_{name} {var} = BDS_{}_INIT;{fill}", name.to_uppercase()),
        passed: format!("is_null_{var} ? NULL : &{var}"),
        ..Argument::default()
    }
}

fn number(function: &Function, param: &Param) -> String {
    let text = match (function.name.as_str(), param.name.as_str()) {
        (_, "flags") => "any_flags(t)",
        (_, "timeout_ns") if function.name.starts_with("bds_graph_drain") => "section_timeout(t)",
        (_, "timeout_ns") => "any_timeout(t)",
        (_, "offset" | "source_offset" | "target_offset" | "from") => "any_offset(t)",
        ("bds_resize", "bytes") => "65536 * below(t, 4)",
        (_, "bytes") => "512 * below(t, 9)",
        (_, "granularity") => "one_in(t, 3) ? 0 : (uint32_t)512 << below(t, 4)",
        (_, "capacity") => "below(t, 9)",
        (_, "iovcnt") => "below(t, 3)",
        (_, "alignment") => "(size_t)4 << below(t, 10)",
        (_, "request_id") => "below(t, 6)",
        (_, "id") => "any_id(t)",
        (_, "operations") => "one_in(t, 8) ? ~0u : 1 + below(t, 8191)",
        (_, "uses" | "shares") => "below(t, 17)",
        // Not the policy that keeps requests until they are resumed.
        (_, "on_read_error" | "on_write_error") => "(uint32_t)below(t, 3)",
        (_, "bytes_per_second") => "one_in(t, 2) ? 0 : (uint64_t)1 << below(t, 30)",
        (_, "is_on" | "active" | "force") => "(int32_t)below(t, 3)",
        (_, "status") => "-(int32_t)below(t, 12000)",
        _ => "one_in(t, 8) ? draw(&t->chance) : below(t, 4)",
    };
    format!("({})({text})", param.kind)
}

/// One function's call.
fn call(header: &Header, function: &Function) -> String {
    let arguments: Vec<Argument> =
        (0..function.params.len()).map(|at| argument(header, function, at)).collect();
    let part = |of: fn(&Argument) -> &String| {
        arguments
            .iter()
            .map(of)
            .filter(|text| !text.is_empty())
            .fold(String::new(), |sum, one| sum + "    " + one + "\n")
    };
    let passed: Vec<&str> = arguments.iter().map(|one| one.passed.as_str()).collect();
    let name = &function.name;
    let call = format!("{name}({})", passed.join(", "));
    let mut text = format!("static void call_{name}(struct thread *t, int function) {{\n");
    writeln!(text, "    int code;\n    begin(t, \"{name}\");").unwrap();
    text.push_str(&part(|one| &one.declared));
    if is_release(header, function) {
        text.push_str("    begin_release(t);\n");
    }
    match function.returns.as_str() {
        "int" => writeln!(text, "    code = {call};").unwrap(),
        _ => writeln!(text, "    (void){call};\n    code = 0;").unwrap(),
    }
    let is_weak = u8::from(WEAK.contains(&name.as_str()));
    writeln!(text, "    if (end(t, function, code, {is_weak})) {{").unwrap();
    if is_release(header, function) {
        text.push_str("    end_release(t, code);\n");
    }
    text.push_str(&part(|one| &one.if_worked));
    text.push_str("    }\n");
    text.push_str(&part(|one| &one.after));
    text.push_str("}\n");
    text
}

/// Whether the function ends the handle that is its only parameter.
fn is_release(header: &Header, function: &Function) -> bool {
    let is_named = function.name.ends_with("_unref") || function.name == "bds_graph_drain_end";
    is_named && header.handle(&function.params[0]).is_some()
}

/// The table of calls, and who releases which kind.
fn tables(header: &Header, functions: &[&Function]) -> String {
    let find = |list: &[(&str, u32)], name: &str| {
        list.iter().find(|(known, _)| *known == name).map_or(1, |(_, value)| *value)
    };
    let mut text = String::from(
        "struct call { const char *name; void (*call)(struct thread *, int); int waits, \
         has_timeout, makes_section, one_in; };\nstatic const struct call calls[] = {\n",
    );
    for function in functions {
        let name = &function.name;
        let has_timeout = function.params.iter().any(|param| param.name == "timeout_ns");
        let makes_section = function.params.iter().any(|p| header.handle_out(p) == Some("section"));
        writeln!(
            text,
            "    {{\"{name}\", call_{name}, {}, {}, {}, {}}},",
            u8::from(function.tag != "any"),
            u8::from(has_timeout),
            u8::from(makes_section),
            find(&RARE, name)
        )
        .unwrap();
    }
    text.push_str("};\n");
    let makes =
        |function: &Function| function.params.iter().any(|p| header.handle_out(p).is_some());
    for (table, only_makers) in [("table", false), ("makers", true)] {
        write!(text, "static const int {table}[] = {{").unwrap();
        for (at, function) in functions.iter().enumerate() {
            for _ in 0..find(&WEIGHTS, &function.name) {
                if !only_makers || makes(function) {
                    write!(text, "{at}, ").unwrap();
                }
            }
        }
        text.push_str("};\n");
    }
    text.push_str("static const int release_of[K_COUNT] = {\n");
    let mut releases =
        String::from("static int release_raw(int kind, uint64_t raw) {\n    switch (kind) {\n");
    for (at, function) in functions.iter().enumerate().filter(|(_, f)| is_release(header, f)) {
        let kind = header.handle(&function.params[0]).unwrap();
        writeln!(text, "    [K_{kind}] = {at},").unwrap();
        writeln!(releases, "    case K_{kind}: return {}((bds_{kind}){{raw}});", function.name)
            .unwrap();
    }
    text.push_str("};\n");
    text + &releases + "    default: abort();\n    }\n}\n"
}

/// The whole program.
fn program(header: &Header) -> String {
    let kinds: Vec<String> = header.kinds.iter().map(|kind| format!("K_{kind}")).collect();
    let mut text = format!(
        "#include \"abuse.h\"\nenum kind {{ {}, K_COUNT }};\n#define STEPS {STEPS}\n\
         static int64_t section_timeout(struct thread *t) {{\n    return holds_section(t) || \
         one_in(t, 3) ? any_timeout(t) : -1;\n}}\n#include \"abuse_words.h\"\n",
        kinds.join(", ")
    );
    let is_called = |f: &&Function| !NOT_CALLED.contains(&f.name.as_str());
    let functions: Vec<&Function> = header.functions.iter().filter(is_called).collect();
    for function in &functions {
        if !BY_HAND.contains(&function.name.as_str()) {
            text.push_str(&call(header, function));
        }
    }
    text.push_str(&tables(header, &functions));
    text + "#include \"abuse_main.h\"\n"
}

/// Runs programs in one process.
fn run(binary: &Path, dir: &Path, first: u64, count: u64, threads: u32) -> Counts {
    let output = Command::new(binary)
        .args([first.to_string(), count.to_string(), threads.to_string()])
        .current_dir(dir)
        .output()
        .unwrap();
    c_suite::must(&format!("programs {first} and {count} more, {threads} threads"), &output);
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        (words[0].to_owned(), (words[1].parse().unwrap(), words[2].parse().unwrap()))
    };
    text.lines().map(line).collect()
}

fn build(scratch: &Scratch) -> std::path::PathBuf {
    let (source, binary) = (scratch.path("abuse.c"), scratch.path("abuse"));
    fs::write(&source, program(&Header::committed())).unwrap();
    if env::var_os("BDS_KEEP").is_some() {
        fs::copy(&source, "/tmp/abuse.c").unwrap();
    }
    c_suite::libraries(scratch.dir());
    c_suite::compile(&c_suite::generated(), &source, &binary, scratch.dir());
    binary
}

/// How many programs run: `default`, or `full` where `cargo xtask test --tier full` asks for it or
/// AddressSanitizer looks, or what `BDS_ABUSE_PROGRAMS` says.
fn programs(default: u64, full: u64) -> u64 {
    let is = |name, wanted| env::var(name).is_ok_and(|value| value == wanted);
    let is_full = is("BDS_TEST_BUDGET", "full") || is("BDS_TEST_SANITIZER", "address");
    let asked = env::var("BDS_ABUSE_PROGRAMS").ok().map(|words| words.parse().unwrap());
    asked.unwrap_or(if is_full { full } else { default })
}

/// Programs of one process at most: then its memory of handles is given back.
const BATCH: u64 = 5_000;
/// Programs of one process for which its start, which uses every arena once, is worth while.
const SMALL_BATCH: u64 = 2_000;

/// Of each function, how many calls worked and how many were refused.
type Counts = BTreeMap<String, (u64, u64)>;

/// Runs programs in as many processes at a time as there are processors, each in a directory of
/// its own. On a disk they would do little but wait for it (an image is flushed when it is closed);
/// one of several processes works there all the same, where O_DIRECT is known to work.
fn abuse(total: u64, threads: u32) -> Counts {
    let (scratch, memory) = (Scratch::new(), Scratch::in_memory());
    let binary = build(&scratch);
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let batch = total.div_ceil(cores).clamp(SMALL_BATCH, BATCH);
    let next = AtomicU64::new(1);
    let work = |dir: &Path| {
        let (_end, mut sum) = (EndOnPanic(&next), Counts::new());
        loop {
            let first = next.fetch_add(batch, Ordering::Relaxed);
            if first > total {
                return sum;
            }
            let count = batch.min(total + 1 - first);
            add(&mut sum, run(&binary, dir, first, count, threads));
        }
    };
    let mut sum = Counts::new();
    thread::scope(|scope| {
        let work = &work;
        let processes: Vec<_> = (0..cores.min(total.div_ceil(batch)))
            .map(|number| {
                let place = if number == 1 { &scratch } else { &memory };
                let dir = place.path(&format!("process{number}"));
                fs::create_dir(&dir).unwrap();
                scope.spawn(move || work(&dir))
            })
            .collect();
        for process in processes {
            match process.join() {
                Ok(counts) => add(&mut sum, counts),
                Err(panic) => resume_unwind(panic),
            }
        }
    });
    sum
}

/// No process begins anew when one has failed.
struct EndOnPanic<'a>(&'a AtomicU64);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(u64::MAX / 2, Ordering::Relaxed);
        }
    }
}

fn add(sum: &mut Counts, counts: Counts) {
    for (name, (worked, refused)) in counts {
        let place = sum.entry(name).or_default();
        *place = (place.0 + worked, place.1 + refused);
    }
}

#[test]
fn any_handle_ever_seen_may_be_used_again() {
    if !c_suite::is_installed("gcc") {
        return bds_testkit::skip("gcc is not installed");
    }
    let counts = abuse(programs(2_000, 1_000_000), 1);
    // The programs do what they are for: every function is called, most work, all are refused.
    let never: Vec<&String> =
        counts.iter().filter(|(_, c)| c.0 == 0).map(|(name, _)| name).collect();
    assert!(never.len() * 10 < counts.len(), "never worked: {never:?}");
    for (name, (worked, refused)) in &counts {
        assert!(worked + refused > 4, "{name}: {worked} worked, {refused} refused");
    }
}

#[test]
fn threads_share_every_handle() {
    if !c_suite::is_installed("gcc") {
        return bds_testkit::skip("gcc is not installed");
    }
    abuse(programs(500, 100_000), 4);
}

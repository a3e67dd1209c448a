//! Generates a C program out of the header: every function with every handle in every state, every
//! pointer NULL, every flags word full, every struct without a size.
//!
//! What is expected follows from the header's rules, so a function that is added is swept as well.

use std::fmt::Write as _;
use std::process::Command;
use std::{env, fs};

use bds_testkit::Scratch;

use crate::c_suite;

/// Kinds of handles.
const KINDS: [&str; 10] = [
    "context", "options", "iothread", "node", "backend", "change", "section", "queue", "memory",
    "job",
];
/// Handles that may be 0.
const OPTIONAL_HANDLES: [(&str, &str); 3] = [
    ("bds_change_set_backing", "backing"),
    ("bds_block_status", "base"),
    ("bds_image_measure", "source"),
];
/// Pointers that may be NULL.
const OPTIONAL_POINTERS: [(&str, &str); 15] = [
    ("bds_job_wait", "state"),
    ("bds_context_create", "options"),
    ("bds_context_shutdown", "report_json_out"),
    ("bds_context_next_event", "json_out"),
    ("bds_node_close", "report_json_out"),
    ("bds_change_commit", "report_json_out"),
    ("bds_backend_create", "options"),
    ("bds_backend_create_on", "options"),
    ("bds_resize", "preallocation"),
    ("bds_graph_child", "name"),
    ("bds_queue_create", "options"),
    ("bds_image_create", "options"),
    ("bds_image_measure", "options"),
    ("bds_image_convert", "options"),
    ("bds_image_convert", "report_json_out"),
];
/// Functions with a second handle that may be of another context: options name nodes as text only.
const NO_CONTEXT: [&str; 1] = ["bds_options_set_node"];

#[derive(Debug)]
struct Param {
    kind: String,
    name: String,
}

#[derive(Debug)]
struct Function {
    returns: String,
    name: String,
    params: Vec<Param>,
}

impl Param {
    /// "node" of `struct bds_node`.
    fn handle(&self) -> Option<&str> {
        let kind = self.kind.strip_prefix("struct bds_")?;
        KINDS.contains(&kind).then_some(kind)
    }

    fn is_pointer(&self) -> bool {
        self.kind.ends_with('*')
    }
}

/// Prototypes of the header.
fn functions() -> Vec<Function> {
    let path = c_suite::manifest_dir().join("include/bds.h");
    let text = fs::read_to_string(path).unwrap();
    let starts = ["int bds_", "uint32_t bds_", "void bds_", "const char *bds_"];
    let mut functions = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let line = line.strip_prefix("BDS_MUST_CHECK ").unwrap_or(line);
        if !starts.iter().any(|start| line.starts_with(start)) {
            continue;
        }
        let mut prototype = line.to_owned();
        while !prototype.ends_with(");") {
            prototype.push_str(lines.next().unwrap());
        }
        let (head, params) = prototype.trim_end_matches(");").split_once('(').unwrap();
        let at = head.find("bds_").unwrap();
        let params = params.split(',').map(str::trim).filter(|param| *param != "void");
        functions.push(Function {
            returns: head[..at].trim().to_owned(),
            name: head[at..].to_owned(),
            params: params.map(param).collect(),
        });
    }
    functions
}

fn param(text: &str) -> Param {
    let at = text.rfind([' ', '*']).unwrap() + 1;
    Param { kind: text[..at].trim().to_owned(), name: text[at..].to_owned() }
}

/// A value with which the function might succeed.
fn valid(function: &Function, param: &Param) -> String {
    if let Some(kind) = param.handle() {
        // A section on the node would hold up every request.
        return format!("w.{kind}");
    }
    let in_order = |name: &str| param.name == name;
    match param.kind.as_str() {
        "const char *" => match (function.name.as_str(), param.name.as_str()) {
            ("bds_query", _) => "\"nodes\"".into(),
            ("bds_resize", _) => "\"off\"".into(),
            ("bds_image_convert", _) => "\"workers=1\"".into(),
            ("bds_image_measure", "options") => "\"size=1M\"".into(),
            (_, "driver") => "\"raw\"".into(),
            _ => "\"a=b\"".into(),
        },
        "void *" if in_order("buffer") || in_order("text") => "NULL".into(),
        "void *" | "const void *" => "bytes".into(),
        "const struct iovec *" => "&segment".into(),
        "struct bds_request *" => "&w.request".into(),
        "const struct bds_context_options *" => "&context_options".into(),
        "const struct bds_backend_options *" => "&backend_options".into(),
        "const struct bds_queue_options *" => "&queue_options".into(),
        "struct bds_limits *" => "&limits".into(),
        kind if kind.ends_with('*') => format!("({kind})out"),
        "size_t" if in_order("alignment") => "4096".into(),
        "size_t" if in_order("min") => "0".into(),
        "size_t" if in_order("bytes") => "512".into(),
        "size_t" => "1".into(),
        "int32_t" | "int64_t" => "0".into(),
        "uint64_t" if in_order("bytes") => "512".into(),
        "uint32_t" if param.name.ends_with("_error") => "1".into(),
        _ => "0".into(),
    }
}

fn call(function: &Function, replaced: usize, value: &str) -> String {
    let args: Vec<String> = function
        .params
        .iter()
        .enumerate()
        .map(|(at, param)| if at == replaced { value.to_owned() } else { valid(function, param) })
        .collect();
    format!("{}({})", function.name, args.join(", "))
}

/// The cases of one function.
fn cases(function: &Function) -> String {
    let mut text = String::new();
    if function.returns != "int" {
        return text;
    }
    let name = function.name.as_str();
    for (at, param) in function.params.iter().enumerate() {
        let mut expect = |code: &str, value: &str| {
            let call = call(function, at, value);
            writeln!(text, "    EXPECT({code}, {call});").unwrap();
        };
        let is_in = |list: &[(&str, &str)]| list.contains(&(name, param.name.as_str()));
        if let Some(kind) = param.handle() {
            if !is_in(&OPTIONAL_HANDLES) {
                expect("BDS_ERR_STALE", &format!("none_{kind}"));
            }
            expect("BDS_ERR_STALE", &format!("stale_{kind}"));
            expect("BDS_ERR_STALE", &format!("forged_{kind}"));
            for other in KINDS.into_iter().filter(|other| *other != kind) {
                expect("BDS_ERR_KIND", &format!("as_{kind}(w.{other}.raw)"));
            }
            let has_context = !matches!(kind, "options" | "memory" | "iothread" | "queue" | "job");
            if at > 0 && has_context && !NO_CONTEXT.contains(&name) {
                expect("BDS_ERR_ARGUMENT", &format!("foreign_{kind}"));
            }
        } else if param.is_pointer() && param.kind != "void *" || param.name == "buf" {
            let kind = &param.kind;
            let code =
                if is_in(&OPTIONAL_POINTERS) { "ANY_BUT_ARGUMENT" } else { "BDS_ERR_ARGUMENT" };
            expect(code, "NULL");
            let is_sized = kind.starts_with("const struct bds_") || kind.contains("bds_limits");
            if is_sized {
                expect("BDS_ERR_VERSION", &format!("({kind})zeros"));
            }
            if param.name != "buf" && kind != "const char *" {
                expect("BDS_ERR_ARGUMENT", &format!("({kind})(out + 1)"));
            }
        } else if param.name == "flags" {
            expect("BDS_ERR_VERSION", "~0u");
        } else if matches!(param.name.as_str(), "active" | "is_on" | "force") {
            expect("BDS_ERR_ARGUMENT", "-1");
        }
    }
    text
}

fn program() -> String {
    let mut text = String::from(
        r#"#include "check.h"
#define ANY_BUT_ARGUMENT 1000000
static int wrong;
static _Alignas(4096) char bytes[4096], out[4096], zeros[4096];
static struct iovec segment = {bytes, 512};
static bds_context_options context_options = BDS_CONTEXT_OPTIONS_INIT;
static bds_backend_options backend_options = BDS_BACKEND_OPTIONS_INIT;
static bds_queue_options queue_options = BDS_QUEUE_OPTIONS_INIT;
static bds_limits limits = BDS_LIMITS_INIT;
struct world {
    bds_context context;
    bds_options options;
    bds_iothread iothread;
    bds_node node, third, from, to;
    bds_job job;
    bds_backend backend;
    bds_change change;
    bds_section section;
    bds_queue queue;
    bds_memory memory;
    bds_request request;
};
static struct world w;
static void make(struct world *one) {
    bds_node other;
    one->context = new_context();
    OK(bds_options_create(&one->options));
    OK(bds_iothread_create(one->context, "sweep", &one->iothread));
    one->node = new_disk(one->context, "driver=mem,size=1M");
    one->third = new_disk(one->context, "driver=mem,size=1M");
    OK(bds_graph_drain_begin(one->third, 0, -1, &one->section));
    other = new_disk(one->context, "driver=mem,size=1M");
    one->backend = new_writer(other);
    (void)bds_node_unref(other);
    OK(bds_change_create(one->context, &one->change));
    OK(bds_queue_create(one->context, NULL, &one->queue));
    OK(bds_memory_register(bytes, sizeof bytes, &one->memory));
    one->from = new_disk(one->context, "driver=mem,size=64k,node-name=from");
    one->to = new_disk(one->context, "driver=mem,size=64k,node-name=to");
    OK(bds_job_start(one->context, "mirror", "job-id=m,device=from,target=to", &one->job));
    memset(&one->request, 0, sizeof one->request);
    one->request.opcode = BDS_OP_FLUSH;
    one->request.backend = one->backend;
}
static void end(struct world *one) {
    (void)bds_graph_drain_end(one->section);
    (void)bds_job_cancel(one->job, 1);
    (void)bds_job_wait(one->job, NULL, -1);
    (void)bds_job_unref(one->job);
    (void)bds_node_unref(one->from);
    (void)bds_node_unref(one->to);
    (void)bds_options_unref(one->options);
    (void)bds_iothread_unref(one->iothread);
    (void)bds_change_unref(one->change);
    (void)bds_queue_unref(one->queue);
    (void)bds_memory_unref(one->memory);
    (void)bds_backend_unref(one->backend);
    (void)bds_node_unref(one->node);
    (void)bds_node_unref(one->third);
    (void)bds_context_unref(one->context);
}
static int any_but_argument(int found) {
    return found == BDS_ERR_ARGUMENT || found == BDS_ERR_PANIC;
}
/* A case that may succeed changes the world: each has its own. */
#define EXPECT(wanted, call)                                                              \
    do {                                                                                  \
        if ((wanted) == ANY_BUT_ARGUMENT || (wanted) == BDS_ERR_ARGUMENT) {               \
            end(&w);                                                                      \
            make(&w);                                                                     \
        }                                                                                 \
        int found_ = (call);                                                              \
        cases++;                                                                          \
        if ((wanted) == ANY_BUT_ARGUMENT ? any_but_argument(found_) : found_ != (wanted)) { \
            fprintf(stderr, "%s: %d (%s), not %s\n", #call, found_, bds_status_name(found_), \
                    #wanted);                                                             \
            wrong++;                                                                      \
        }                                                                                 \
        limits.struct_size = sizeof limits;                                               \
    } while (0)
static int cases;
"#,
    );
    for kind in KINDS {
        writeln!(
            text,
            "static bds_{kind} none_{kind}, stale_{kind}, forged_{kind}, foreign_{kind};"
        )
        .unwrap();
        writeln!(
            text,
            "static bds_{kind} as_{kind}(uint64_t raw) {{ bds_{kind} h; h.raw = raw; return h; }}"
        )
        .unwrap();
    }
    let functions = functions();
    assert!(functions.len() > 100, "{}", functions.len());
    for function in &functions {
        writeln!(text, "static void sweep_{}(void) {{\n{}}}", function.name, cases(function))
            .unwrap();
    }
    text.push_str(
        "int main(void) {\n    struct world gone, foreign;\n    make(&gone);\n    end(&gone);\n",
    );
    text.push_str("    make(&foreign);\n    make(&w);\n");
    for kind in KINDS {
        writeln!(text, "    stale_{kind} = gone.{kind};\n    foreign_{kind} = foreign.{kind};")
            .unwrap();
        // A generation that was not given out yet.
        writeln!(text, "    forged_{kind}.raw = w.{kind}.raw ^ ((uint64_t)1 << 46);").unwrap();
        writeln!(text, "    (void)none_{kind}; (void)as_{kind}; (void)foreign_{kind};").unwrap();
    }
    for function in &functions {
        writeln!(text, "    sweep_{}();", function.name).unwrap();
    }
    text.push_str("    end(&w);\n    end(&foreign);\n    printf(\"%d cases\\n\", cases);\n");
    text.push_str("    return wrong != 0;\n}\n");
    text
}

#[test]
fn every_function_refuses_wrong_handles_pointers_and_flags() {
    if !c_suite::is_installed("gcc") {
        return bds_testkit::skip("gcc is not installed");
    }
    let scratch = Scratch::new();
    c_suite::libraries(scratch.dir());
    let (source, binary) = (scratch.path("sweep.c"), scratch.path("sweep"));
    fs::write(&source, program()).unwrap();
    c_suite::compile(&c_suite::SWEEP, &source, &binary, scratch.dir());
    let output = Command::new("timeout")
        .args(["300", &binary.display().to_string()])
        .env("BDS_TEST_DIR", scratch.dir())
        .current_dir(scratch.dir())
        .output()
        .unwrap();
    if env::var_os("BDS_KEEP").is_some() {
        fs::copy(&source, "/tmp/sweep.c").unwrap();
    }
    c_suite::must("sweep", &output);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let count: usize = said.split_whitespace().next().unwrap().parse().unwrap();
    assert!(count > 1000, "{said}");
}

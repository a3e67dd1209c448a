//! Generates a C program out of the header: every function with every handle in every state, every
//! pointer NULL and misaligned, every flags word full, every struct with every size.
//!
//! What is expected follows from the header's rules, so a function that is added is swept as well.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::Command;
use std::{env, fs};

use bds_testkit::Scratch;

use crate::c_suite;
use crate::header::{Function, Header, Param};

/// Pointers that may be NULL.
const OPTIONAL_POINTERS: [(&str, &str); 18] = [
    ("bds_monitor_add", "id_out"),
    ("bds_monitor_del", "report_json_out"),
    // A format without a file is refused.
    ("bds_image_set_backing_file", "format"),
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
/// Kinds whose handles as a second parameter are looked up before their context is compared.
const OWN_CONTEXT: [&str; 5] = ["options", "memory", "iothread", "queue", "job"];

/// A group of one job, as C text.
const GROUP: &str = r#"[{\"type\":\"backup\",\"job-id\":\"g\",\"device\":\"node\",\"target\":\"disk\",\"sync\":\"none\"}]"#;

/// A text with which the function might succeed.
fn text_for(function: &str, param: &str) -> &'static str {
    match (function, param) {
        ("bds_query", _) => "nodes",
        ("bds_monitor_add", _) => "driver=mem,size=64k,node-name=added",
        ("bds_job_change", _) => "copy-mode=background",
        ("bds_job_start_group", _) => GROUP,
        ("bds_image_set_backing_file", "format") => "raw",
        ("bds_resize", _) => "off",
        ("bds_node_open", _) | ("bds_options_merge", _) => "driver=mem,size=64k",
        ("bds_node_reopen" | "bds_change_reopen", _) => "read-only=off",
        ("bds_image_convert", _) => "workers=1",
        ("bds_image_create" | "bds_image_measure", "options") => "size=1M",
        ("bds_job_start", "type") => "mirror",
        ("bds_job_start", "options") => "job-id=other,device=node,target=to",
        ("bds_job_find", _) => "job",
        ("bds_job_wait", _) => "ready",
        ("bds_node_find", _) => "node",
        (name, "name" | "source_name") if name.contains("bitmap_add") => "new",
        (name, "name" | "source_name") if name.contains("bitmap") => "bitmap",
        (_, "driver") => "raw",
        (_, "path") => "swept.raw",
        (_, "key") => "node-name",
        (_, "feature") => "queue",
        _ => "name",
    }
}

/// A value with which the function might succeed.
fn valid(header: &Header, function: &Function, param: &Param) -> String {
    if let Some(kind) = header.handle(param) {
        // A copy onto itself, or a filter above itself, is refused.
        let is_second = param.name == "overlay" || param.name == "to" || param.name == "backing";
        return if kind == "node" && is_second { "w.to".into() } else { format!("w.{kind}") };
    }
    let is_called = |name: &str| param.name == name;
    match param.kind.as_str() {
        "const char *" => format!("\"{}\"", text_for(&function.name, &param.name)),
        "void *" | "const void *" => "bytes".into(),
        "const struct iovec *" => "&segment".into(),
        "struct bds_request *" => "&w.request".into(),
        kind if kind.ends_with('*') => match sized(header, param) {
            Some(name) => format!("bds_{name}_fit()"),
            None => format!("({kind})out"),
        },
        "size_t" if is_called("alignment") => "4096".into(),
        "size_t" if is_called("min") => "0".into(),
        "size_t" if is_called("bytes") => "512".into(),
        "size_t" => "1".into(),
        "int32_t" | "int64_t" => "0".into(),
        "uint64_t" if function.name == "bds_resize" => "2 << 20".into(),
        "uint64_t" if is_called("bytes") => "512".into(),
        "uint64_t" if is_called("id") => "w.node_id".into(),
        "uint64_t" if is_called("target_offset") => "4096".into(),
        "uint32_t" if param.name.ends_with("_error") => "1".into(),
        _ => "0".into(),
    }
}

/// "queue_options" of a pointer to a struct that begins with its size.
fn sized<'a>(header: &Header, param: &'a Param) -> Option<&'a str> {
    let name = param.struct_read().or_else(|| param.struct_written())?;
    header.initial.iter().any(|known| known == name).then_some(name)
}

fn call(header: &Header, function: &Function, replaced: usize, value: &str) -> String {
    let args: Vec<String> = function
        .params
        .iter()
        .enumerate()
        .map(
            |(at, param)| {
                if at == replaced { value.to_owned() } else { valid(header, function, param) }
            },
        )
        .collect();
    format!("{}({})", function.name, args.join(", "))
}

/// Status codes that the documentation of a function names, also by "as bds_other".
fn documented(header: &Header, function: &Function) -> BTreeSet<String> {
    let mut codes = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut open = vec![function.name.clone()];
    while let Some(name) = open.pop() {
        let Some(function) = header.functions.iter().find(|f| f.name == name) else { continue };
        if !seen.insert(name) {
            continue;
        }
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words: Vec<&str> =
            function.docs.split(|c| !is_word(c)).filter(|w| !w.is_empty()).collect();
        codes.extend(words.iter().filter(|w| w.starts_with("BDS_ERR_")).map(|w| (*w).to_owned()));
        let named = words.windows(2).filter(|pair| matches!(pair[0], "as" | "As"));
        open.extend(named.map(|pair| pair[1].to_owned()));
    }
    codes
}

/// Collects the cases of one function.
struct Cases<'a> {
    header: &'a Header,
    function: &'a Function,
    text: String,
}

impl Cases<'_> {
    fn expect(&mut self, code: &str, at: usize, value: &str) {
        let call = call(self.header, self.function, at, value);
        writeln!(self.text, "    EXPECT({code}, {call});").unwrap();
    }

    fn expect_not(&mut self, code: &str, at: usize, value: &str) {
        let call = call(self.header, self.function, at, value);
        writeln!(self.text, "    EXPECT_NOT({code}, {call});").unwrap();
    }

    fn is_in(&self, list: &[(&str, &str)], param: &Param) -> bool {
        list.contains(&(self.function.name.as_str(), param.name.as_str()))
    }

    /// {none, stale, forged, another kind, another context}; the live one is in `live`.
    fn handle(&mut self, at: usize, param: &Param, kind: &str) {
        let is_optional = self.header.is_optional_handle(&self.function.name, &param.name);
        match is_optional {
            true => self.expect_not("BDS_ERR_STALE", at, &format!("none_{kind}")),
            false => self.expect("BDS_ERR_STALE", at, &format!("none_{kind}")),
        }
        self.expect("BDS_ERR_STALE", at, &format!("stale_{kind}"));
        self.expect("BDS_ERR_STALE", at, &format!("forged_{kind}"));
        for other in self.header.kinds.iter().filter(|other| *other != kind) {
            self.expect("BDS_ERR_KIND", at, &format!("as_{kind}(w.{other}.raw)"));
        }
        let has_context = !OWN_CONTEXT.contains(&kind);
        if at > 0 && has_context && !NO_CONTEXT.contains(&self.function.name.as_str()) {
            self.text.push_str("    anew();\n");
            self.expect("BDS_ERR_ARGUMENT", at, &format!("foreign_{kind}"));
        }
    }

    fn pointer(&mut self, at: usize, param: &Param) {
        let kind = &param.kind;
        if self.is_in(&OPTIONAL_POINTERS, param) {
            self.expect_not("BDS_ERR_ARGUMENT", at, "NULL");
        } else {
            self.text.push_str("    anew();\n");
            self.expect("BDS_ERR_ARGUMENT", at, "NULL");
        }
        if let Some(name) = sized(self.header, param) {
            self.sizes(at, param, name);
        }
        if !kind.ends_with("void *") && kind != "const char *" {
            self.expect("BDS_ERR_ARGUMENT", at, &format!("({kind})(out + 1)"));
        }
    }

    /// Sizes of a struct: {0, short, long and zero, long and not zero, SIZE_MAX}; its flags and
    /// reserved words.
    fn sizes(&mut self, at: usize, param: &Param, name: &str) {
        let with = |size: &str, tail: u32| format!("bds_{name}_with({size}, {tail})");
        let (long, whole) = (format!("sizeof bds_{name}_later"), format!("sizeof(bds_{name})"));
        for size in ["0", "1", "7", "SIZE_MAX", "(size_t)1 << 31"] {
            self.expect("BDS_ERR_VERSION", at, &with(size, 0));
        }
        self.expect("BDS_ERR_VERSION", at, &with(&format!("{whole} - 1"), 0));
        for size in ["16", &whole, &long] {
            self.expect_not("BDS_ERR_VERSION", at, &with(size, 0));
        }
        if param.struct_read().is_none() {
            // The library fills it; the tail becomes zero.
            self.expect_not("BDS_ERR_VERSION", at, &with(&long, 1));
            return;
        }
        self.expect("BDS_ERR_VERSION", at, &with(&long, 1));
        let one = self.header.structs.iter().find(|one| one.name == format!("bds_{name}")).unwrap();
        for field in one.fields.iter().filter(|f| *f == "flags" || f.starts_with("reserved")) {
            let full = format!(
                "({}, bds_{name}_later.known.{field} = ~0u, &bds_{name}_later.known)",
                with(&whole, 0)
            );
            self.expect("BDS_ERR_VERSION", at, &full);
        }
    }

    /// Reserved words, opcodes and flags of a request.
    fn request(&mut self, at: usize) {
        for (field, value) in
            [("opcode", "~0u"), ("opcode", "0"), ("reserved[0]", "1"), ("reserved[2]", "1")]
        {
            let request = format!("(anew(), w.request.{field} = {value}, &w.request)");
            self.expect("BDS_ERR_VERSION", at, &request);
        }
        let opcodes =
            ["READ", "WRITE", "FLUSH", "DISCARD", "WRITE_ZEROES", "BLOCK_STATUS", "COPY_RANGE"];
        for opcode in opcodes {
            let request = format!(
                "(anew(), w.request.opcode = BDS_OP_{opcode}, w.request.flags = ~0u, \
                 w.request.target.raw = BDS_OP_{opcode} == BDS_OP_COPY_RANGE ? w.backend.raw : 0, \
                 &w.request)"
            );
            self.expect("BDS_ERR_VERSION", at, &request);
        }
        for (field, kind) in [("backend", "backend"), ("memory", "memory")] {
            for state in ["stale", "forged"] {
                let request = format!(
                    "(anew(), w.request.opcode = BDS_OP_READ, w.request.{field} = {state}_{kind}, \
                     w.request.buffer = bytes, w.request.bytes = 512, &w.request)"
                );
                self.expect("BDS_ERR_STALE", at, &request);
            }
        }
        for target in ["none", "stale", "forged"] {
            let request = format!(
                "(anew(), w.request.opcode = BDS_OP_COPY_RANGE, w.request.bytes = 512, \
                 w.request.target = {target}_backend, &w.request)"
            );
            self.expect("BDS_ERR_STALE", at, &request);
        }
        for base in ["stale", "forged"] {
            let request = format!(
                "(anew(), w.request.opcode = BDS_OP_BLOCK_STATUS, w.request.base = {base}_node, \
                 w.request.buffer = out, w.request.iovcnt = 1, &w.request)"
            );
            self.expect("BDS_ERR_STALE", at, &request);
        }
        let elsewhere = "(anew(), w.request.opcode = BDS_OP_BLOCK_STATUS, \
                         w.request.base = foreign_node, &w.request)";
        self.expect("BDS_ERR_ARGUMENT", at, elsewhere);
    }

    /// Live handles and arguments that fit.
    fn live(&mut self) {
        // Its result is another call's.
        if self.function.name == "bds_error_status" {
            return;
        }
        let call = call(self.header, self.function, usize::MAX, "");
        let codes: Vec<String> = documented(self.header, self.function).into_iter().collect();
        let codes = if codes.is_empty() { "0".into() } else { codes.join(", ") };
        writeln!(self.text, "    EXPECT_DOCUMENTED({call}, {codes});").unwrap();
        self.panics(&call);
    }

    /// Panics at the beginning, with each handle looked up, and before a new handle is made.
    fn panics(&mut self, call: &str) {
        let params = &self.function.params;
        let handles = params.iter().filter(|param| self.header.handle(param).is_some()).count();
        let makes = params.iter().any(|param| self.header.handle_out(param).is_some());
        writeln!(self.text, "    EXPECT_PANIC(\"entry\", 0, {call});").unwrap();
        for skip in 0..handles {
            writeln!(self.text, "    EXPECT_PANIC(\"lookup\", {skip}, {call});").unwrap();
        }
        if makes {
            writeln!(self.text, "    EXPECT_PANIC(\"insert\", 0, {call});").unwrap();
        }
    }
}

/// The cases of one function.
fn cases(header: &Header, function: &Function) -> String {
    let mut cases = Cases { header, function, text: String::new() };
    if function.returns != "int" {
        // Nothing happens for NULL.
        if function.returns == "void" {
            writeln!(cases.text, "    {}(NULL);\n    cases++;", function.name).unwrap();
        }
        return cases.text;
    }
    cases.live();
    for (at, param) in function.params.iter().enumerate() {
        if let Some(kind) = header.handle(param) {
            cases.handle(at, param, kind);
        } else if param.is_pointer() {
            cases.pointer(at, param);
            if param.struct_written() == Some("request") {
                cases.request(at);
            }
        } else if param.name == "flags" {
            cases.text.push_str("    anew();\n");
            cases.expect("BDS_ERR_VERSION", at, "~0u");
        } else if matches!(param.name.as_str(), "active" | "is_on" | "force") {
            cases.expect("BDS_ERR_ARGUMENT", at, "-1");
            cases.expect("BDS_ERR_ARGUMENT", at, "2");
        }
    }
    cases.text
}

fn program(header: &Header) -> String {
    let mut text = String::from("#include \"sweep.h\"\n");
    for name in &header.initial {
        writeln!(text, "SIZED(bds_{name}, BDS_{}_INIT)", name.to_uppercase()).unwrap();
    }
    for kind in &header.kinds {
        writeln!(
            text,
            "static bds_{kind} none_{kind}, stale_{kind}, forged_{kind}, foreign_{kind};\n\
             static bds_{kind} as_{kind}(uint64_t raw) {{ bds_{kind} h; h.raw = raw; return h; }}"
        )
        .unwrap();
    }
    for function in &header.functions {
        let cases = cases(header, function);
        writeln!(text, "static void sweep_{}(void) {{\n{cases}}}", function.name).unwrap();
    }
    text.push_str("static void forge(void) {\n");
    for kind in &header.kinds {
        // A generation that was not given out yet.
        writeln!(text, "    forged_{kind}.raw = w.{kind}.raw ^ ((uint64_t)1 << 46);").unwrap();
    }
    text.push_str("}\nint main(void) {\n    struct world gone, foreign;\n    make(&gone);\n");
    text.push_str("    end(&gone);\n    make(&foreign);\n    make(&w);\n    forge();\n");
    for kind in &header.kinds {
        writeln!(text, "    stale_{kind} = gone.{kind};\n    foreign_{kind} = foreign.{kind};")
            .unwrap();
    }
    for function in &header.functions {
        writeln!(text, "    sweep_{}();", function.name).unwrap();
    }
    text.push_str("    end(&w);\n    end(&foreign);\n");
    text.push_str("    printf(\"%d %d %d %d %d\\n\", cases, live_calls, live_successes, panics, poisonings);\n");
    text.push_str("    return wrong != 0;\n}\n");
    text
}

#[test]
fn every_function_refuses_wrong_handles_pointers_and_flags() {
    if !c_suite::is_installed("gcc") {
        return bds_testkit::skip("gcc is not installed");
    }
    let header = Header::committed();
    let scratch = Scratch::new();
    c_suite::libraries(scratch.dir());
    let (source, binary) = (scratch.path("sweep.c"), scratch.path("sweep"));
    fs::write(&source, program(&header)).unwrap();
    if env::var_os("BDS_KEEP").is_some() {
        fs::copy(&source, "/tmp/sweep.c").unwrap();
    }
    c_suite::compile(&c_suite::generated(), &source, &binary, scratch.dir());
    let output = Command::new("timeout")
        .args(["300", &binary.display().to_string()])
        .env("BDS_TEST_DIR", scratch.dir())
        // The program keeps what calls return; the random programs look for leaks.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .current_dir(scratch.dir())
        .output()
        .unwrap();
    c_suite::must("sweep", &output);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let counts: Vec<usize> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [cases, live, worked, panics, poisonings] = counts[..] else { panic!("{said}") };
    assert!(cases > 1500 && live > 100, "{said}");
    assert!(worked * 4 > live * 3, "only {worked} of {live} calls with live handles work");
    // In builds without debug assertions nothing panics.
    let can_panic = cfg!(debug_assertions);
    assert_eq!(panics > 250 && poisonings > 80, can_panic, "{said}");
}

//! `cargo xtask header [--check]`: makes `crates/bds-ffi/include/bds.h` out of bds-ffi's sources.
//!
//! The sources are joined in the order in which a C reader wants the functions, and the pointer
//! types of `ptr.rs` (`Out<T>`, `Text`) are replaced by the pointers they stand for, because
//! cbindgen would make typedefs of them. Everything else, every comment included, is cbindgen's.

use std::fs;
use std::path::PathBuf;

use crate::run::{root, say, target_dir};

/// Sources with exported functions, in the header's order.
const SOURCES: [&str; 22] = [
    "version",
    "error",
    "context",
    "query",
    "event",
    "options",
    "node",
    "section",
    "guard",
    "monitor",
    "change",
    "change_bitmap",
    "change_commit",
    "backend",
    "io",
    "memory",
    "iothread",
    "queue",
    "image",
    "bitmap",
    "job",
    "job_group",
];

/// Types of `ptr.rs` and the C pointers they stand for. Generic ones come first.
const POINTERS: [(&str, &str); 9] = [
    ("InOut<", "*mut "),
    ("Out<", "*mut "),
    ("Array<", "*mut "),
    ("In<", "*const "),
    ("Text", "*const c_char"),
    ("Source", "*const c_void"),
    ("Sink", "*mut c_void"),
    ("Segments", "*const iovec"),
    ("ptr::Given", "*mut c_void"),
];

/// Where the header lies.
pub(crate) fn path() -> PathBuf {
    root().join("crates/bds-ffi/include/bds.h")
}

/// Writes the header, or says where the committed one differs.
pub(crate) fn header(check: bool) -> Result<(), String> {
    let made = make()?;
    let path = path();
    let committed = fs::read_to_string(&path).unwrap_or_default();
    if made == committed {
        return Ok(());
    }
    if !check {
        fs::write(&path, made).map_err(|e| format!("{}: {e}", path.display()))?;
        say(&format!("{}", path.display()));
        return Ok(());
    }
    let line = made.lines().zip(committed.lines()).position(|(a, b)| a != b);
    let line = line.unwrap_or_else(|| made.lines().count().min(committed.lines().count())) + 1;
    Err(format!("{} is not what `cargo xtask header` makes, from line {line} on", path.display()))
}

/// The header's text.
fn make() -> Result<String, String> {
    let source = target_dir().join("header.rs");
    let dir = root().join("crates/bds-ffi/src");
    let mut text = read(&dir.join("abi.rs"))?;
    for name in SOURCES {
        text.push_str(&exported_functions(&read(&dir.join(name).with_extension("rs"))?));
    }
    text = expand_handles(&text);
    fs::create_dir_all(target_dir()).map_err(|e| e.to_string())?;
    fs::write(&source, &text).map_err(|e| format!("{}: {e}", source.display()))?;
    let bindings = cbindgen::Builder::new()
        .with_config(config())
        .with_src(&source)
        .generate()
        .map_err(|e| format!("cbindgen: {e}"))?;
    let mut header = Vec::new();
    bindings.write(&mut header);
    let header = String::from_utf8(header).map_err(|e| e.to_string())?;
    Ok(finish(&header))
}

fn read(path: &std::path::Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Documentation and signature of each exported function of a file.
fn exported_functions(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut out = String::new();
    for (at, line) in lines.iter().enumerate() {
        if *line != "#[unsafe(no_mangle)]" {
            continue;
        }
        let begin = lines[..at]
            .iter()
            .rposition(|line| !line.starts_with("///") && !line.starts_with("#["))
            .map_or(0, |before| before + 1);
        let is_end = |line: &&str| line.ends_with('{');
        let end = at + 1 + lines[at + 1..].iter().position(is_end).unwrap_or(0);
        for line in &lines[begin..end] {
            out.push_str(line);
            out.push('\n');
        }
        out.push_str(lines[end].trim_end_matches('{').trim_end());
        out.push_str(" { loop {} }\n\n");
    }
    plain_pointers(&out)
}

/// Replaces the types of `ptr.rs` in signatures; documentation is left.
fn plain_pointers(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let mut line = line.to_owned();
        if !line.starts_with("///") {
            line = line.replace("-> i32", "-> c_int");
            for (name, pointer) in POINTERS {
                line = replace_type(&line, name, pointer);
            }
        }
        out.push_str(&line);
        out.push('\n');
    }
    out
}

/// Replaces one type where it stands behind `: `; of a generic one also its closing bracket.
fn replace_type(line: &str, name: &str, pointer: &str) -> String {
    let is_generic = name.ends_with('<');
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find(&format!(": {name}")) {
        let behind = at + 2 + name.len();
        out.push_str(&rest[..at + 2]);
        out.push_str(pointer);
        rest = &rest[behind..];
        if is_generic && let Some(close) = rest.find('>') {
            out.push_str(&rest[..close]);
            rest = &rest[close + 1..];
        }
    }
    out.push_str(rest);
    out
}

/// The handle types, which a macro makes in Rust.
fn expand_handles(text: &str) -> String {
    let Some(begin) = text.find("macro_rules! handles") else { return text.to_owned() };
    let Some(call) = text.find("\nhandles! {\n") else { return text.to_owned() };
    let Some(end) = text[call..].find("\n}\n").map(|at| call + at) else { return text.to_owned() };
    let mut out = text[..begin].to_owned();
    for line in text[call + "\nhandles! {\n".len()..end].lines() {
        let line = line.trim();
        match line.strip_suffix(';') {
            Some(name) if !line.starts_with("///") => {
                out.push_str(&format!(
                    "#[repr(C)]\npub struct {name} {{\n    pub raw: u64,\n}}\n\n"
                ));
            }
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out.push_str(&text[end + "\n}\n".len()..]);
    out
}

const ABOVE: &str = "\
/* bds.h: the block layer of bds from C. Generated by `cargo xtask header` from the sources of
 * bds-ffi; do not edit.
 *
 * Handles. An object of the library is named by a handle, a 64-bit number in a struct of its own
 * type, never by an address. A handle is one reference: the caller that got it releases it, once,
 * with the unref function of its kind. After that, and for ever, it is stale: every function refuses it with
 * BDS_ERR_STALE, and a second release takes nothing from another holder. 0 is no handle. No
 * number is given out twice. Only unref functions (and bds_graph_drain_end) end a handle; no
 * function consumes one, whether it fails or not.
 *
 * Results. 0 and above: success; -4095 to -1: a negative errno; -10000 and below: bds_status. The
 * number alone is enough for a program; bds_error_message and bds_error_json explain the calling
 * thread's last failure. Outputs come last and are written only on success, where the function does
 * not say otherwise. A failed call has changed nothing, where it does not say otherwise.
 *
 * Threads. Every function may be called from any thread, also on one handle at a time.
 *   [any]    does not wait for I/O or for the graph
 *   [io]     may wait for I/O
 *   [graph]  may wait for requests of others: not from an event loop that has to serve them
 * A thread that calls the library needs 128 KiB of stack.
 *
 * Memory. Strings from the library are freed with bds_free. Strings to the library are
 * NUL-terminated and copied; names and options are UTF-8, file names any bytes. Buffers belong to
 * the library from the call to its return, those of queued requests until their completion is taken.
 * Structs that begin with struct_size may be shorter or longer than this header's; the unknown
 * tail of a longer one must be zero.
 *
 * Processes. After fork, without exec, every function returns BDS_ERR_FORKED in the child, and
 * touches nothing. All descriptors are closed on exec. The library installs no signal handlers.
 *
 * Panics. A bug of the library returns BDS_ERR_PANIC and poisons what the call worked on: that can
 * still be queried and released. A library that was built with panic=abort aborts instead.
 */";

const BELOW_INCLUDES: &str = "\
#if !defined(__LP64__)
# error \"libbds supports 64-bit systems only\"
#endif
#define BDS_VERSION_ENCODE(a, b, c) (((uint32_t)(a) << 16) | ((uint32_t)(b) << 8) | (uint32_t)(c))
#define BDS_VERSION_NUMBER \\
    BDS_VERSION_ENCODE(BDS_VERSION_MAJOR, BDS_VERSION_MINOR, BDS_VERSION_PATCH)
#if defined(__GNUC__) || defined(__clang__)
# define BDS_MUST_CHECK __attribute__((warn_unused_result))
#else
# define BDS_MUST_CHECK
#endif

struct iovec; /* sys/uio.h */";

const TRAILER: &str = "\
/* Initial values of structs that begin with their size. */
#define BDS_CONTEXT_OPTIONS_INIT { sizeof(bds_context_options), 0, 0, NULL, 0 }
#define BDS_BACKEND_OPTIONS_INIT { sizeof(bds_backend_options), NULL, 0, 0, 0, 0, 0, 0 }
#define BDS_QUEUE_OPTIONS_INIT { sizeof(bds_queue_options), 128, 0, { 0 } }
#define BDS_JOB_INFO_INIT { sizeof(bds_job_info), 0, 0, 0, 0, 0, 0, 0 }
#define BDS_LIMITS_INIT { sizeof(bds_limits), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* Releases the handle in a variable and clears it: no stale number is left behind. */
#define BDS_DEFINE_UNREF_P(type) \\
    static inline int type##_unref_p(type *handle) { \\
        int result = handle->raw ? type##_unref(*handle) : (int)BDS_OK; \\
        handle->raw = 0; \\
        return result; \\
    }
BDS_DEFINE_UNREF_P(bds_context)
BDS_DEFINE_UNREF_P(bds_options)
BDS_DEFINE_UNREF_P(bds_iothread)
BDS_DEFINE_UNREF_P(bds_node)
BDS_DEFINE_UNREF_P(bds_backend)
BDS_DEFINE_UNREF_P(bds_change)
BDS_DEFINE_UNREF_P(bds_queue)
BDS_DEFINE_UNREF_P(bds_memory)
BDS_DEFINE_UNREF_P(bds_job)
BDS_DEFINE_UNREF_P(bds_guard)
#undef BDS_DEFINE_UNREF_P
";

fn config() -> cbindgen::Config {
    let mut config = cbindgen::Config {
        language: cbindgen::Language::C,
        header: Some(ABOVE.to_owned()),
        include_guard: Some("BDS_H".to_owned()),
        after_includes: Some(BELOW_INCLUDES.to_owned()),
        cpp_compat: true,
        no_includes: true,
        usize_is_size_t: true,
        style: cbindgen::Style::Both,
        documentation_style: cbindgen::DocumentationStyle::Doxy,
        line_length: 100,
        sys_includes: ["stddef.h", "stdint.h"].map(str::to_owned).to_vec(),
        ..cbindgen::Config::default()
    };
    config.function.must_use = Some("BDS_MUST_CHECK".to_owned());
    config.enumeration.rename_variants = cbindgen::RenameRule::None;
    // Their values come back as plain integers, so no signature names them.
    config.export.include =
        ["bds_status", "bds_event_type", "bds_job_state", "bds_opcode"].map(str::to_owned).to_vec();
    config.export.rename.insert("iovec".to_owned(), "struct iovec".to_owned());
    config
}

/// Puts the macros and inline functions in front of the end of `extern "C"`.
fn finish(header: &str) -> String {
    let header = header.replace("  // __cplusplus", " /* __cplusplus */");
    let header = header.replace("  /* BDS_H */", " /* BDS_H */");
    let end = "#ifdef __cplusplus\n}  // extern \"C\"";
    let close = "#ifdef __cplusplus\n} /* extern \"C\" */";
    header
        .replace(end, &format!("{TRAILER}\n{close}"))
        .lines()
        .map(|line| line.trim_end().to_owned() + "\n")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointer_types_become_pointers_in_signatures_only() {
        let text = "/// An Out<T>: see a: Text.\npub extern \"C\" fn f(a: Text, o: Out<*mut c_char>, n: InOut<bds_limits>) -> i32";
        let found = plain_pointers(text);
        assert_eq!(
            found,
            "/// An Out<T>: see a: Text.\npub extern \"C\" fn f(a: *const c_char, o: *mut *mut c_char, n: *mut bds_limits) -> c_int\n"
        );
    }

    #[test]
    fn exported_functions_come_with_their_documentation() {
        let text = "fn inner() {\n}\n\n/// Does.\n#[must_use]\n#[unsafe(no_mangle)]\npub extern \"C\" fn f(\n    a: u32,\n) -> i32 {\n    body()\n}\n";
        assert_eq!(
            exported_functions(text).trim_end(),
            "/// Does.\n#[must_use]\n#[unsafe(no_mangle)]\npub extern \"C\" fn f(\n    a: u32,\n) -> c_int { loop {} }"
        );
    }
}

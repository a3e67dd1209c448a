//! Reads `include/bds.h`: functions with their parameters and blocking tags, structs with their
//! fields. What is generated from it covers every function that is added.

use std::fs;

use crate::c_suite;

/// Handles that may be 0.
const OPTIONAL_HANDLES: [(&str, &str); 3] = [
    ("bds_change_set_backing", "backing"),
    ("bds_block_status", "base"),
    ("bds_image_measure", "source"),
];

/// A parameter: its type as the header spells it, and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Param {
    pub(crate) kind: String,
    pub(crate) name: String,
}

/// A prototype.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) returns: String,
    pub(crate) name: String,
    pub(crate) params: Vec<Param>,
    /// "any", "io" or "graph": what the function may wait for.
    pub(crate) tag: String,
    /// Its documentation.
    pub(crate) docs: String,
}

/// A struct and the names of its fields, in order.
#[derive(Clone, Debug)]
pub(crate) struct Struct {
    pub(crate) name: String,
    pub(crate) fields: Vec<String>,
}

/// The header.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) functions: Vec<Function>,
    pub(crate) structs: Vec<Struct>,
    /// Kinds of handles: "node" of `bds_node`. In the header's order.
    pub(crate) kinds: Vec<String>,
    /// Structs that have an initial value: "limits" of `BDS_LIMITS_INIT`.
    pub(crate) initial: Vec<String>,
    /// Enumerators, and macros that are numbers.
    pub(crate) constants: Vec<String>,
}

impl Param {
    /// Whether it is a pointer.
    pub(crate) fn is_pointer(&self) -> bool {
        self.kind.ends_with('*')
    }

    /// "node" of `struct bds_node *`, of pointers to structs that are written.
    pub(crate) fn struct_written(&self) -> Option<&str> {
        self.kind.strip_prefix("struct bds_")?.strip_suffix(" *")
    }

    /// "queue_options" of `const struct bds_queue_options *`.
    pub(crate) fn struct_read(&self) -> Option<&str> {
        self.kind.strip_prefix("const struct bds_")?.strip_suffix(" *")
    }
}

impl Header {
    /// The committed header.
    pub(crate) fn committed() -> Self {
        let path = c_suite::manifest_dir().join("include/bds.h");
        let header = Self::parse(&fs::read_to_string(path).unwrap());
        assert!(header.functions.len() > 100 && header.kinds.len() >= 10, "{header:?}");
        header
    }

    pub(crate) fn parse(text: &str) -> Self {
        let structs = structs(text);
        let is_handle = |one: &&Struct| one.fields == ["raw"];
        let short = |one: &Struct| one.name.strip_prefix("bds_").unwrap().to_owned();
        let kinds = structs.iter().filter(is_handle).map(short).collect();
        let initial = |line: &str| {
            let name = line.strip_prefix("#define BDS_")?.split_once("_INIT ")?.0;
            Some(name.to_lowercase())
        };
        let initial = text.lines().filter_map(initial).collect();
        let constants = text.lines().filter_map(constant).collect();
        Self { functions: functions(text), structs, kinds, initial, constants }
    }

    /// The kind of a handle that is passed by value.
    pub(crate) fn handle<'a>(&self, param: &'a Param) -> Option<&'a str> {
        let kind = param.kind.strip_prefix("struct bds_")?;
        self.kinds.iter().any(|known| known == kind).then_some(kind)
    }

    /// Whether a handle may be 0.
    pub(crate) fn is_optional_handle(&self, function: &str, param: &str) -> bool {
        OPTIONAL_HANDLES.contains(&(function, param))
    }

    /// The kind of a handle that is returned.
    pub(crate) fn handle_out<'a>(&self, param: &'a Param) -> Option<&'a str> {
        let kind = param.struct_written()?;
        self.kinds.iter().any(|known| known == kind).then_some(kind)
    }
}

/// The name of an enumerator or of a macro that is a number; not of the version, which changes.
fn constant(line: &str) -> Option<String> {
    let is_value = |value: &str| value.trim_end_matches(',').parse::<i64>().is_ok();
    let (name, value) = match line.strip_prefix("#define ") {
        Some(rest) => rest.split_once(' ')?,
        None => line.trim().split_once(" = ")?,
    };
    let is_ours = name.starts_with("BDS_") && !name.starts_with("BDS_VERSION_");
    (is_ours && is_value(value)).then(|| name.to_owned())
}

/// Prototypes of the header.
fn functions(text: &str) -> Vec<Function> {
    let starts = ["int bds_", "uint32_t bds_", "void bds_", "const char *bds_"];
    let mut functions = Vec::new();
    let mut lines = text.lines();
    let mut comment = String::new();
    while let Some(line) = lines.next() {
        if line.starts_with("/**") {
            comment.clear();
        }
        if line.starts_with(" *") {
            comment.push_str(line.trim_start_matches(" *"));
        }
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
        let tag = ["any", "io", "graph"].into_iter().find(|t| comment.contains(&format!("[{t}]")));
        functions.push(Function {
            returns: head[..at].trim().to_owned(),
            name: head[at..].to_owned(),
            params: params.map(param).collect(),
            tag: tag.unwrap_or("").to_owned(),
            docs: comment.clone(),
        });
    }
    functions
}

fn param(text: &str) -> Param {
    let at = text.rfind([' ', '*']).unwrap() + 1;
    Param { kind: text[..at].trim().to_owned(), name: text[at..].to_owned() }
}

/// Structs of the header, with the names of their fields.
fn structs(text: &str) -> Vec<Struct> {
    let mut structs = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(name) =
            line.strip_prefix("typedef struct bds_").and_then(|l| l.strip_suffix(" {"))
        else {
            continue;
        };
        let mut fields = Vec::new();
        for line in lines.by_ref().take_while(|line| !line.starts_with('}')) {
            let line = line.trim();
            if line.starts_with('/') || line.starts_with('*') {
                continue;
            }
            let line = line.trim_end_matches(';').split('[').next().unwrap();
            let at = line.rfind([' ', '*']).unwrap() + 1;
            fields.push(line[at..].to_owned());
        }
        structs.push(Struct { name: format!("bds_{name}"), fields });
    }
    structs
}

#[test]
fn a_header_is_read() {
    let text = "/**\n * Does. [graph]\n */\nBDS_MUST_CHECK\nint bds_a(struct bds_node node,\n          \
                const char *name,\n          struct bds_node *out);\n\ntypedef struct bds_node {\n  \
                /**\n   * The number.\n   */\n  uint64_t raw;\n} bds_node;\n\ntypedef struct bds_b {\n  \
                size_t struct_size;\n  const struct iovec *iov;\n  uint64_t reserved[4];\n} bds_b;\n\
                #define BDS_B_INIT { 0 }\n#define BDS_C 4\n  BDS_D = -5,\n";
    let header = Header::parse(text);
    let [function] = &header.functions[..] else { panic!("{header:?}") };
    assert_eq!((&*function.name, &*function.returns, &*function.tag), ("bds_a", "int", "graph"));
    assert_eq!(header.handle(&function.params[0]), Some("node"));
    assert_eq!(function.params[1], Param { kind: "const char *".into(), name: "name".into() });
    assert_eq!(header.handle_out(&function.params[2]), Some("node"));
    assert_eq!(header.kinds, ["node"]);
    assert_eq!(header.initial, ["b"]);
    assert_eq!(header.constants, ["BDS_C", "BDS_D"]);
    assert_eq!(header.structs[1].fields, ["struct_size", "iov", "reserved"]);
}

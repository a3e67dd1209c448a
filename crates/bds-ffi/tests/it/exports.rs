//! Reads the sources: every exported function has the boundary, documentation and a C test.

use std::fs;
use std::path::PathBuf;

/// Functions whose body cannot panic and touches nothing: no boundary.
const BARE: [&str; 3] = ["bds_version_string", "bds_status_name", "bds_status_to_errno"];

struct Export {
    name: String,
    documentation: String,
    body: String,
}

fn files(dir: &str, end: &str) -> String {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(dir);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|found| found == end));
    paths.sort();
    paths.iter().map(|path| fs::read_to_string(path).unwrap() + "\n").collect()
}

fn exports() -> Vec<Export> {
    let text = files("src", "rs");
    let lines: Vec<&str> = text.lines().collect();
    let mut exports = Vec::new();
    for at in
        lines.iter().enumerate().filter(|(_, l)| **l == "#[unsafe(no_mangle)]").map(|(at, _)| at)
    {
        let docs =
            lines[..at].iter().rev().take_while(|l| l.starts_with("///") || l.starts_with("#["));
        let mut documentation: Vec<&str> = docs.copied().collect();
        documentation.reverse();
        let name = lines[at + 1].split("fn ").nth(1).unwrap().split('(').next().unwrap().to_owned();
        // For tests, in debug builds, and in no header.
        if name.starts_with("bds_test_") {
            continue;
        }
        let body: Vec<&str> =
            lines[at + 1..].iter().take_while(|line| **line != "}").copied().collect();
        exports.push(Export {
            name,
            documentation: documentation.join("\n"),
            body: body.join("\n"),
        });
    }
    exports
}

#[test]
fn every_export_goes_through_the_boundary_under_its_own_name() {
    let exports = exports();
    assert!(exports.len() > 100);
    for Export { name, body, .. } in exports {
        if !BARE.contains(&name.as_str()) {
            let body: String = body.split_whitespace().collect();
            let boundary = [format!("entry(\"{name}\","), format!("entry_or(\"{name}\",")];
            assert!(boundary.iter().any(|call| body.contains(call)), "{name}");
        }
    }
}

#[test]
fn every_export_is_documented_for_c() {
    for Export { name, documentation, body } in exports() {
        let tags = ["[any]", "[io]", "[graph]"];
        let tagged = tags.iter().filter(|tag| documentation.contains(*tag)).count();
        assert_eq!(tagged, 1, "{name} has one blocking tag");
        let returns_status = body.contains("-> i32");
        let is_plain = BARE.contains(&name.as_str()) || name == "bds_error_status";
        if returns_status && !is_plain {
            assert!(documentation.contains("Errors"), "{name} lists its errors");
        }
        let frees = body.contains("Out<*mut c_char>");
        if frees {
            let says = documentation.contains("bds_free") || documentation.contains("freed");
            assert!(says, "{name} says how to free what it returns");
        }
    }
}

#[test]
fn every_export_is_called_by_a_c_test() {
    let tests = files("tests/c", "c") + &files("tests/c", "h") + &files("examples", "c");
    let missing: Vec<String> = exports()
        .into_iter()
        .map(|export| export.name)
        .filter(|name| !tests.contains(&format!("{name}(")))
        .collect();
    assert!(missing.is_empty(), "no C test calls {missing:?}");
}

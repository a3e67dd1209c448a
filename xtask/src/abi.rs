//! `cargo xtask abi check`: reads the shared library as an ELF file and compares what it exports.
//!
//! ```text
//! libbds_ffi.a ──cc, libbds.map──► libbds.so.0.1     SONAME, names and versions, NEEDED: as committed
//! libbds_ffi.so, linked by rustc without the map     the control: the check must refuse it
//! ```
//! `libbds.map` is the list of functions, each under the version that introduced it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{cargo, output, root, run, say, target_dir, which};

/// Libraries that the shared library may need.
const NEEDED: [&str; 4] = ["libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"];
/// System libraries that a program needs beside the static library.
pub(crate) const NATIVE_LIBS: [&str; 6] = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

/// Builds the library for development, links it as it is installed, and checks it.
pub(crate) fn check() -> Result<(), String> {
    if which("cc").is_none() || which("readelf").is_none() {
        say("skipped: abi check needs cc and readelf");
        return Ok(());
    }
    map_is_complete()?;
    run(cargo().args(["build", "--quiet", "--package", "bds-ffi"]))?;
    let built = target_dir().join("debug");
    let shared = link_shared(&built.join("libbds_ffi.a"), &target_dir().join("abi"))?;
    let wrong = differences(&shared)?;
    if !wrong.is_empty() {
        return Err(format!("{}:\n{}", shared.display(), wrong.join("\n")));
    }
    let control = differences(&built.join("libbds_ffi.so"))?;
    if control.is_empty() {
        return Err("the check accepts a library without symbol versions".into());
    }
    Ok(())
}

/// "libbds.so.0.1".
pub(crate) fn soname() -> Result<String, String> {
    let version = version()?;
    let mut parts = version.split('.');
    let (major, minor) = (parts.next().unwrap_or("0"), parts.next().unwrap_or("0"));
    Ok(format!("libbds.so.{major}.{minor}"))
}

/// Version of the workspace.
pub(crate) fn version() -> Result<String, String> {
    let manifest = read(&root().join("Cargo.toml"))?;
    let line = manifest.lines().find_map(|line| line.strip_prefix("version = \""));
    line.and_then(|rest| rest.split('"').next())
        .map(str::to_owned)
        .ok_or_else(|| "Cargo.toml: no version".into())
}

/// Links the shared library out of the static one, with symbol versions. Returns its path, which
/// ends with the SONAME.
pub(crate) fn link_shared(archive: &Path, dir: &Path) -> Result<PathBuf, String> {
    fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let soname = soname()?;
    let shared = dir.join(&soname);
    let map = root().join("crates/bds-ffi/libbds.map");
    let mut cc = Command::new("cc");
    cc.arg("-shared").arg("-o").arg(&shared);
    cc.arg("-Wl,--whole-archive").arg(archive).arg("-Wl,--no-whole-archive");
    cc.arg(format!("-Wl,--version-script={}", map.display()));
    cc.arg(format!("-Wl,-soname,{soname}"));
    cc.args(["-Wl,--gc-sections", "-Wl,-z,nodelete", "-Wl,-z,relro,-z,now", "-Wl,--as-needed"]);
    cc.args(NATIVE_LIBS);
    run(&mut cc)?;
    Ok(shared)
}

/// Every exported function of the sources is in the map, and no other.
fn map_is_complete() -> Result<(), String> {
    let header = read(&crate::header::path())?;
    let listed: BTreeSet<String> = map()?.into_keys().collect();
    let declared: BTreeSet<String> = declared(&header);
    let missing: Vec<_> = declared.difference(&listed).collect();
    let extra: Vec<_> = listed.difference(&declared).collect();
    match missing.is_empty() && extra.is_empty() {
        true => Ok(()),
        false => Err(format!("libbds.map: missing {missing:?}, without a function {extra:?}")),
    }
}

/// Functions that a header declares.
fn declared(header: &str) -> BTreeSet<String> {
    let starts = ["int ", "uint32_t ", "void ", "const char *", "BDS_MUST_CHECK int "];
    let names = header.lines().filter_map(|line| {
        let rest = starts.iter().find_map(|start| line.strip_prefix(start))?;
        let (name, _) = rest.split_once('(')?;
        name.starts_with("bds_").then(|| name.to_owned())
    });
    names.collect()
}

/// Function and version, as `libbds.map` has them.
fn map() -> Result<BTreeMap<String, String>, String> {
    let text = read(&root().join("crates/bds-ffi/libbds.map"))?;
    let (mut version, mut names) = (String::new(), BTreeMap::new());
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_suffix(" {") {
            name.clone_into(&mut version);
        } else if let Some(name) = line.strip_suffix(';')
            && name.starts_with("bds_")
        {
            names.insert(name.to_owned(), version.clone());
        }
    }
    Ok(names)
}

/// What a shared library has that it should not have, or lacks.
fn differences(library: &Path) -> Result<Vec<String>, String> {
    let mut wrong = Vec::new();
    let dynamic = output(Command::new("readelf").args(["-W", "-d"]).arg(library))?;
    let bracketed = |line: &str| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned());
    let soname = soname()?;
    let found: Vec<String> =
        dynamic.lines().filter(|line| line.contains("(SONAME)")).filter_map(bracketed).collect();
    if found != [soname.clone()] {
        wrong.push(format!("SONAME is {found:?}, not {soname}"));
    }
    for needed in dynamic.lines().filter(|line| line.contains("(NEEDED)")).filter_map(bracketed) {
        if !NEEDED.contains(&needed.as_str()) {
            wrong.push(format!("needs {needed}"));
        }
    }
    let symbols = output(Command::new("readelf").args(["-W", "--dyn-syms"]).arg(library))?;
    let exported = exported(&symbols);
    let wanted = map()?;
    for (name, version) in &wanted {
        match exported.get(name) {
            None => wrong.push(format!("does not export {name}")),
            Some(found) if found != version => {
                wrong.push(format!("{name} has version '{found}', not {version}"));
            }
            Some(_) => {}
        }
    }
    for name in exported.keys().filter(|name| !wanted.contains_key(*name)) {
        wrong.push(format!("exports {name}"));
    }
    Ok(wrong)
}

/// Defined global symbols of a table of readelf's, with their versions ("" without one).
fn exported(table: &str) -> BTreeMap<String, String> {
    let mut symbols = BTreeMap::new();
    for line in table.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, _, binding, _, section, name, ..] = fields[..] else { continue };
        // The version nodes themselves are absolute symbols.
        if !matches!(binding, "GLOBAL" | "WEAK") || matches!(section, "UND" | "ABS") {
            continue;
        }
        let (name, version) = name.split_once("@@").unwrap_or((name, ""));
        symbols.insert(name.to_owned(), version.to_owned());
    }
    symbols
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_read_with_their_versions() {
        let table = "   Num:    Value          Size Type    Bind   Vis      Ndx Name\n\
             1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND free@GLIBC_2.2.5 (3)\n\
             2: 0000000000000000     0 OBJECT  GLOBAL DEFAULT  ABS BDS_0.1\n\
             3: 0000000000502b70   102 FUNC    GLOBAL DEFAULT   16 bds_a@@BDS_0.1\n\
             4: 0000000000502b70   102 FUNC    GLOBAL DEFAULT   16 bds_b\n";
        let found = exported(table);
        let wanted = [("bds_a", "BDS_0.1"), ("bds_b", "")];
        assert_eq!(found.len(), 2);
        for (name, version) in wanted {
            assert_eq!(found[name], version);
        }
    }

    #[test]
    fn functions_of_a_header_are_found() {
        let header = " * int bds_no(void);\nint bds_a(int a);\nconst char *bds_b(void);\nBDS_MUST_CHECK int bds_c(\n    static inline int bds_d(void)\n";
        let found: Vec<String> = declared(header).into_iter().collect();
        assert_eq!(found, ["bds_a", "bds_b", "bds_c"]);
    }
}

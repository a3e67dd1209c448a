//! Tests the built-in documentation: drivers and their options, completion scripts, manual pages.

use serde_json::Value;

use crate::workdir::Workdir;

#[test]
fn drivers_are_listed_with_what_they_are_for() {
    let workdir = Workdir::new();
    let text = workdir.must("drivers").stdout;
    let all: Value =
        serde_json::from_str(&workdir.must("drivers --output json").stdout).expect("JSON");
    let all = all.as_array().expect("a list");
    assert!(all.len() >= 12, "{text}");
    for driver in all {
        let (name, help) = (driver["name"].as_str().unwrap(), driver["help"].as_str().unwrap());
        let is_listed = |line: &str| line.trim_start().starts_with(name) && line.ends_with(help);
        assert!(text.lines().any(is_listed), "{name}: {text}");
    }
}

#[test]
fn the_options_of_a_driver_are_shown() {
    let workdir = Workdir::new();
    let text = workdir.must("drivers qcow2").stdout;
    for part in
        ["To open:", "To create:", "Every node takes:", "cluster_size=size", "l2-cache-size=size"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let one: Value =
        serde_json::from_str(&workdir.must("drivers --output json qcow2").stdout).expect("JSON");
    let names: Vec<&str> = one["create-options"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|option| option["name"].as_str().unwrap())
        .collect();
    for name in names {
        assert!(text.contains(&format!("  {name}=")), "{name}: {text}");
    }
    let unknown = workdir.bds("drivers nosuch");
    assert_eq!(unknown.code, 1);
    assert!(unknown.stderr.contains("nosuch") && unknown.stderr.contains("qcow2"), "{unknown:?}");
}

#[test]
fn every_shell_gets_a_completion_script_with_every_verb() {
    let workdir = Workdir::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = workdir.must(&format!("completions {shell}")).stdout;
        for verb in ["create", "convert", "compare", "drivers", "completions"] {
            assert!(script.contains(verb), "{shell}: {verb}");
        }
        assert!(!script.contains("man-pages"), "{shell} shows a hidden verb");
    }
    assert_eq!(workdir.bds("completions tcsh").code, 1);
}

#[test]
fn there_is_a_manual_page_for_every_verb() {
    let workdir = Workdir::new();
    std::fs::create_dir(workdir.dir().join("man")).expect("scratch is writable");
    workdir.must("man-pages man");
    for page in ["bds.1", "bds-convert.1", "bds-graph.1", "bds-drivers.1"] {
        let text = String::from_utf8(workdir.read(&format!("man/{page}"))).expect("text");
        assert!(text.contains(".TH"), "{page}: {text}");
    }
    let missing = workdir.bds("man-pages nowhere");
    assert_eq!(missing.code, 1);
    assert!(missing.stderr.contains("nowhere"), "{missing:?}");
}

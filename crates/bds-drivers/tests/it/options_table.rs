//! Tests that `OPTIONS.md`, which is part of the crate's documentation, lists the options that the
//! drivers declare.

use std::fmt::Write as _;
use std::path::Path;

use bds_core::driver::{Category, DriverType};
use bds_core::graph::COMMON_OPTIONS;
use bds_core::options::OptionSpec;

/// Environment variable: write the file instead of comparing it.
const UPDATE: &str = "BDS_UPDATE_OPTIONS";

#[test]
fn options_md_lists_the_declared_options() {
    let table = table();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("OPTIONS.md");
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, &table).expect("the source tree is writable");
    }
    let stored = std::fs::read_to_string(&path).expect("OPTIONS.md is there");
    assert!(stored == table, "OPTIONS.md is out of date: run this test with {UPDATE}=1");
}

#[test]
fn every_driver_and_option_has_a_help_text() {
    for driver in bds_drivers::registry().iter() {
        assert!(!driver.help().is_empty(), "{}", driver.name());
        for option in driver.open_options().iter().chain(driver.create_options()) {
            assert!(!option.help.is_empty(), "{}: {}", driver.name(), option.name);
        }
    }
}

fn table() -> String {
    let registry = bds_drivers::registry();
    let mut out = String::from("\n# Options\n\nEvery node takes these:\n\n");
    options(&mut out, COMMON_OPTIONS);
    for category in [Category::Protocol, Category::Format, Category::Filter] {
        for driver in registry.iter().filter(|driver| driver.category() == category) {
            of_driver(&mut out, &**driver);
        }
    }
    out
}

fn of_driver(out: &mut String, driver: &dyn DriverType) {
    let _ = write!(out, "\n## `{}`\n\n{}.\n", driver.name(), driver.help());
    if !driver.open_options().is_empty() {
        out.push_str("\nTo open:\n\n");
        options(out, driver.open_options());
    }
    if !driver.create_options().is_empty() {
        out.push_str("\nTo create:\n\n");
        options(out, driver.create_options());
    }
}

fn options(out: &mut String, specs: &[OptionSpec]) {
    out.push_str("| option | value | default | |\n|---|---|---|---|\n");
    for OptionSpec { name, kind, help, default } in specs {
        let kind = kind.to_string().replace('|', "\\|");
        let _ = writeln!(out, "| `{name}` | {kind} | {} | {help} |", default.unwrap_or(""));
    }
}

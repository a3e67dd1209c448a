//! `drivers`: lists the drivers of this build, and the options of one.

use std::fmt::Write as _;

use bds_core::Result;
use bds_core::driver::{Category, DriverType};
use bds_core::graph::COMMON_OPTIONS;
use bds_core::options::OptionSpec;
use serde_json::{Value, json};

use crate::args::{Drivers, Output};
use crate::printer;

pub(crate) fn run(args: &Drivers) -> Result<()> {
    let registry = bds_drivers::registry();
    let text = match (&args.name, args.output) {
        (Some(name), Output::Human) => described(&**registry.driver(name)?),
        (Some(name), Output::Json) => format!("{:#}\n", as_json(&**registry.driver(name)?)),
        (None, Output::Human) => listed(registry.iter().map(|driver| &**driver)),
        (None, Output::Json) => {
            let all: Value = registry.iter().map(|driver| as_json(&**driver)).collect();
            format!("{all:#}\n")
        }
    };
    printer::text(&text)
}

/// Lists all drivers by category, one a line.
fn listed<'a>(drivers: impl Iterator<Item = &'a dyn DriverType>) -> String {
    let drivers: Vec<&dyn DriverType> = drivers.collect();
    let mut out = String::new();
    for category in [Category::Format, Category::Protocol, Category::Filter] {
        let _ = writeln!(out, "{}:", heading(category));
        for driver in drivers.iter().filter(|driver| driver.category() == category) {
            let _ = writeln!(out, "  {:<14} {}", driver.name(), driver.help());
        }
    }
    out.push_str("\n'bds drivers NAME' lists the options of one.\n");
    out
}

fn heading(category: Category) -> &'static str {
    match category {
        Category::Protocol => "Protocols",
        Category::Format => "Formats",
        Category::Filter => "Filters",
    }
}

fn word(category: Category) -> &'static str {
    match category {
        Category::Protocol => "protocol",
        Category::Format => "format",
        Category::Filter => "filter",
    }
}

/// Describes one driver: what it is for, and its options.
fn described(driver: &dyn DriverType) -> String {
    let mut out = format!("{} ({}): {}\n", driver.name(), word(driver.category()), driver.help());
    options(&mut out, "To open:", driver.open_options());
    options(&mut out, "To create:", driver.create_options());
    options(&mut out, "Every node takes:", COMMON_OPTIONS);
    out
}

fn options(out: &mut String, title: &str, specs: &[OptionSpec]) {
    if specs.is_empty() {
        return;
    }
    let left = |spec: &OptionSpec| format!("{}={}", spec.name, spec.kind);
    // A long choice must not push all help texts to the right.
    let width = specs.iter().map(|spec| left(spec).len()).filter(|len| *len <= 34).max();
    let width = width.unwrap_or(0);
    let _ = writeln!(out, "\n{title}");
    for spec in specs {
        let default = spec.default.map_or_else(String::new, |text| format!(" [default: {text}]"));
        let _ = writeln!(out, "  {:<width$}  {}{default}", left(spec), spec.help);
    }
}

fn as_json(driver: &dyn DriverType) -> Value {
    let options = |specs: &[OptionSpec]| -> Value {
        let describe = |spec: &OptionSpec| {
            json!({
                "name": spec.name,
                "value": spec.kind.to_string(),
                "default": spec.default,
                "help": spec.help,
            })
        };
        specs.iter().map(describe).collect()
    };
    json!({
        "name": driver.name(),
        "category": word(driver.category()),
        "help": driver.help(),
        "open-options": options(driver.open_options()),
        "create-options": options(driver.create_options()),
        "common-options": options(COMMON_OPTIONS),
    })
}

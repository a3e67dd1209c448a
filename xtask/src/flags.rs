//! Parses the command line of xtask, without a parser library.

use std::path::PathBuf;

use crate::tidy::Show;

/// What `cargo xtask` without a command prints.
pub(crate) const HELP: &str = "\
cargo xtask COMMAND

  demo                   the main job, end to end, with no input needed
  test [--tier quick|default|full] [-- TEST-ARGS]
                         all tests; quick leaves out the matrix, full adds long budgets, loom, sanitizers, mutants
  matrix [--list] [--only axis=value]...
                         crate x engine x format x cache mode; axes: crate, engine, format, cache
  tidy [--circles] [--words] [--wide]
                         the project's rules that no compiler checks; lists import circles, words, wide comments in full
  bench [--quick] [--only NAME]
                         side by side with qemu-img and qemu-storage-daemon: ratios, medians of interleaved runs;
                         groups: graph, ffi, jobs
  abi check              exports, versions, SONAME of the shared C library, with a control that must fail
  header [--check]       the C header out of the sources of bds-ffi; --check: only says whether it is up to date
  outside                a crate outside the workspace with the single dependency bds runs the README's lines
  dist [--prefix DIR] [--library-only]
                         tool and C library for packagers: binary, header, libraries, bds.pc, manual pages,
                         shell completions, licences; an example is compiled against the result
  doctor                 what is on this machine, what is missing, how to get it
  ci                     what the server runs: fmt, tidy, clippy, features, docs, packages, outside, test";

/// How much is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tier {
    /// Unit and integration tests.
    Quick,
    /// And the matrix.
    Default,
    /// And long budgets, loom, sanitizers.
    Full,
}

/// A parsed command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Help,
    Demo,
    Test {
        tier: Tier,
        rest: Vec<String>,
    },
    Matrix {
        only: Vec<(String, String)>,
        list: bool,
    },
    Tidy(Show),
    Bench {
        quick: bool,
        only: Option<String>,
    },
    /// Not for people: runs one command and writes what it cost.
    Measure {
        report: String,
        command: Vec<String>,
    },
    Abi,
    Header {
        check: bool,
    },
    Outside,
    Dist {
        prefix: Option<PathBuf>,
        library_only: bool,
    },
    Doctor,
    Ci,
}

/// Parses what follows `cargo xtask`.
pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Command, String> {
    let args: Vec<String> = args.collect();
    let Some((name, rest)) = args.split_first() else { return Ok(Command::Help) };
    match name.as_str() {
        "help" | "-h" | "--help" => Ok(Command::Help),
        "test" => parse_test(rest),
        "matrix" => parse_matrix(rest),
        "bench" => parse_bench(rest),
        "measure" => parse_measure(rest),
        "demo" => bare(name, rest, Command::Demo),
        "tidy" => parse_tidy(rest),
        "abi" => match rest {
            [what] if what == "check" => Ok(Command::Abi),
            _ => Err("'abi' takes 'check'".into()),
        },
        "header" => match rest {
            [] => Ok(Command::Header { check: false }),
            [flag] if flag == "--check" => Ok(Command::Header { check: true }),
            _ => Err("'header' takes --check or nothing".into()),
        },
        "outside" => bare(name, rest, Command::Outside),
        "dist" => parse_dist(rest),
        "doctor" => bare(name, rest, Command::Doctor),
        "ci" => bare(name, rest, Command::Ci),
        other => Err(format!("there is no command '{other}'")),
    }
}

fn bare(name: &str, rest: &[String], command: Command) -> Result<Command, String> {
    match rest.first() {
        None => Ok(command),
        Some(extra) => Err(format!("'{name}' takes no '{extra}'")),
    }
}

fn parse_test(args: &[String]) -> Result<Command, String> {
    let mut tier = Tier::Default;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--" => return Ok(Command::Test { tier, rest: args.cloned().collect() }),
            "--tier" => {
                tier = match args.next().map(String::as_str) {
                    Some("quick") => Tier::Quick,
                    Some("default") => Tier::Default,
                    Some("full") => Tier::Full,
                    other => return Err(format!("--tier {other:?}: use quick, default or full")),
                }
            }
            other => return Err(format!("'test' does not know '{other}'")),
        }
    }
    Ok(Command::Test { tier, rest: Vec::new() })
}

fn parse_tidy(args: &[String]) -> Result<Command, String> {
    let mut show = Show::default();
    for arg in args {
        match arg.as_str() {
            "--circles" => show.circles = true,
            "--words" => show.words = true,
            "--wide" => show.wide = true,
            other => return Err(format!("'tidy' does not know '{other}'")),
        }
    }
    Ok(Command::Tidy(show))
}

fn parse_dist(rest: &[String]) -> Result<Command, String> {
    let (mut prefix, mut library_only) = (None, false);
    let mut words = rest.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--prefix" => prefix = Some(words.next().ok_or("--prefix needs a directory")?.into()),
            "--library-only" => library_only = true,
            other => return Err(format!("dist does not know '{other}'")),
        }
    }
    Ok(Command::Dist { prefix, library_only })
}

fn parse_bench(args: &[String]) -> Result<Command, String> {
    let (mut quick, mut only) = (false, None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => quick = true,
            "--only" => only = Some(args.next().ok_or("--only wants a part of a name")?.clone()),
            other => return Err(format!("'bench' does not know '{other}'")),
        }
    }
    Ok(Command::Bench { quick, only })
}

fn parse_measure(args: &[String]) -> Result<Command, String> {
    match args {
        [report, dashes, command @ ..] if dashes == "--" && !command.is_empty() => {
            Ok(Command::Measure { report: report.clone(), command: command.to_vec() })
        }
        _ => Err("measure REPORT -- COMMAND [ARG]...".into()),
    }
}

fn parse_matrix(args: &[String]) -> Result<Command, String> {
    let (mut only, mut list) = (Vec::new(), false);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--list" => list = true,
            "--only" => {
                let pair = args.next().and_then(|p| p.split_once('='));
                let Some((axis, value)) = pair else {
                    return Err("--only wants axis=value".into());
                };
                if !["crate", "engine", "format", "cache"].contains(&axis) {
                    return Err(format!(
                        "there is no axis '{axis}': use crate, engine, format or cache"
                    ));
                }
                only.push((axis.to_owned(), value.to_owned()));
            }
            other => return Err(format!("'matrix' does not know '{other}'")),
        }
    }
    Ok(Command::Matrix { only, list })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn commands_and_their_options() {
        assert_eq!(of(""), Ok(Command::Help));
        assert_eq!(
            of("test --tier full -- a b"),
            Ok(Command::Test { tier: Tier::Full, rest: vec!["a".into(), "b".into()] })
        );
        assert_eq!(
            of("matrix --only engine=sim"),
            Ok(Command::Matrix { only: vec![("engine".into(), "sim".into())], list: false })
        );
        assert_eq!(of("tidy --words"), Ok(Command::Tidy(Show { words: true, ..Show::default() })));
        for wrong in [
            "nonsense",
            "tidy --colours",
            "ci x",
            "test --tier huge",
            "matrix --only colour=red",
            "matrix --only engine",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}

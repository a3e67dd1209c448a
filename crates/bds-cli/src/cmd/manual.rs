//! `completions` and `man-pages`: generate shell completions and manual pages from the command
//! line's definition.

use bds_core::{Error, Result};
use clap::CommandFactory;

use crate::args::{Cli, Completions, ManPages};
use crate::printer;

/// Prints the completion script for a shell.
pub(crate) fn completions(args: &Completions) -> Result<()> {
    let all = Cli::command();
    // The generators list hidden verbs too.
    let shown = all.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned();
    let mut shown = clap::Command::new("bds").version(env!("CARGO_PKG_VERSION")).subcommands(shown);
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut shown, "bds", &mut script);
    printer::text(&String::from_utf8_lossy(&script))
}

/// Writes `bds.1` and one page a verb (`bds-convert.1`) into a directory.
pub(crate) fn man_pages(args: &ManPages) -> Result<()> {
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .map_err(|e| Error::io(e, "cannot write the manual pages").file(&args.dir))
}

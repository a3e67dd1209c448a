//! Arguments of the verb `checkpoint`.

use std::ffi::OsString;

use clap::Args;

use super::source::{Output, Source};

#[derive(Args, Debug)]
#[command(after_help = "\
All images are opened, and so locked, first. One change then makes all edits, on all images or on none, and the command \
says how long it held their writes. Backups of several images are made by 'bds backup run'. \
The images of a running VM are checkpointed by that VM's own process, through the library.")]
pub(crate) struct Checkpoint {
    #[command(flatten)]
    pub(crate) source: Source,
    /// A new overlay, once for each image, in their order: what is written later goes there
    #[arg(long = "overlay", value_name = "FILE")]
    pub(crate) overlays: Vec<OsString>,
    /// Add a persistent bitmap that records what changes later; to the overlays, if they are made
    #[arg(long = "add-bitmap", value_name = "NAME")]
    pub(crate) add: Vec<String>,
    /// Let a bitmap of each image forget what it has recorded
    #[arg(long = "reset-bitmap", value_name = "NAME")]
    pub(crate) reset: Vec<String>,
    /// Let a bitmap of each image record no more
    #[arg(long = "disable-bitmap", value_name = "NAME")]
    pub(crate) disable: Vec<String>,
    /// Remove a bitmap of each image
    #[arg(long = "remove-bitmap", value_name = "NAME")]
    pub(crate) remove: Vec<String>,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The images, which no other process may have open
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<OsString>,
}

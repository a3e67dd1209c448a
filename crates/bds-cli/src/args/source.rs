//! Arguments that many verbs share: the image to open, how to print, what is shown of a job.

use clap::{Args, ValueEnum};

/// How a result is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Human,
    /// For programs
    Json,
}

/// What every command that opens an image takes.
#[derive(Args, Debug)]
pub(crate) struct Source {
    /// Format of the image; guessed if not given
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// The name is a list of options ("driver=qcow2,file.filename=a.qcow2") or JSON
    #[arg(long, conflicts_with = "format")]
    pub(crate) image_opts: bool,
    /// Do not mind other users of the image, and do not lock it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Not supported: there are no user-creatable objects
    #[arg(long, hide = true, value_name = "OBJDEF")]
    pub(crate) object: Vec<String>,
}

/// What is shown while a job runs.
#[derive(Args, Debug)]
pub(crate) struct JobDisplay {
    /// Show progress
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// How to print; json: the job's events, one a line
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
}

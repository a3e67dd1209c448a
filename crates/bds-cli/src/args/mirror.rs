//! Arguments of the verb `mirror`.

use std::ffi::OsString;

use clap::{Args, ValueEnum};

use super::source::JobDisplay;

/// What a mirror copies. Names are QAPI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MirrorSync {
    /// Everything the source shows
    Full,
    /// What the source's own layer holds: the target needs the same backing file
    Top,
    /// Nothing: to try out whether the target could be written
    None,
}

/// How writes during the copy reach the target. Names are QAPI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MirrorCopyMode {
    /// Later
    Background,
    /// At once, before they complete
    WriteBlocking,
}

#[derive(Args, Debug)]
#[command(after_help = "\
The job 'mirror' on a closed image: this process alone opens the source, read-only, so nothing is written to it \
meanwhile, and the target is complete and durable when the command ends. It is meant for moving an image to other \
storage: the copy can be limited in speed, reports its events, and an interrupted one leaves the source untouched. \
A disk that a VM uses is mirrored by that VM's own process, through the library. \
Without these needs 'bds convert' does the same work.")]
pub(crate) struct Mirror {
    /// Format of the source; guessed if not given
    #[arg(short = 'f', long = "source-format", value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// The source's name is a list of options
    #[arg(long, alias = "source-image-opts", conflicts_with = "format")]
    pub(crate) image_opts: bool,
    /// The target's name is a list of options; needs -n
    #[arg(long, requires = "no_create", conflicts_with = "output_format")]
    pub(crate) target_image_opts: bool,
    /// Format of the target
    #[arg(short = 'O', long = "target-format", alias = "output-format", value_name = "FMT")]
    pub(crate) output_format: Option<String>,
    /// Options of the target's format; "help" lists them
    #[arg(short, long = "target-options", alias = "options", value_name = "OPTIONS")]
    pub(crate) options: Vec<OsString>,
    /// Write into an existing target instead of creating it
    #[arg(short = 'n', long, conflicts_with = "options")]
    pub(crate) no_create: bool,
    /// The existing target reads as zeros already; needs -n
    #[arg(long, requires = "no_create")]
    pub(crate) target_is_zero: bool,
    /// Make the target an overlay of this image; for --sync=top
    #[arg(short = 'B', long, value_name = "FILE", conflicts_with = "no_create")]
    pub(crate) backing: Option<OsString>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing")]
    pub(crate) backing_format: Option<String>,
    /// What is copied
    #[arg(long, value_enum, default_value = "full")]
    pub(crate) sync: MirrorSync,
    /// How writes during the copy are treated
    #[arg(long, value_enum, default_value = "background")]
    pub(crate) copy_mode: MirrorCopyMode,
    /// Bytes copied together, a power of two from 512 to 64M; the target's cluster if not given
    #[arg(long, value_name = "SIZE")]
    pub(crate) granularity: Option<String>,
    /// Bytes of buffers; 16M if not given
    #[arg(long, value_name = "SIZE")]
    pub(crate) buffer_size: Option<String>,
    /// Write zeros in full instead of leaving holes
    #[arg(long)]
    pub(crate) no_unmap: bool,
    /// Cache mode of the target
    #[arg(short = 't', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) target_cache: String,
    /// Cache mode of the source
    #[arg(short = 'T', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) source_cache: String,
    /// Do not mind other users of the source
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// At most this many bytes a second
    #[arg(short, long, value_name = "RATE")]
    pub(crate) rate: Option<String>,
    /// Keep an incomplete target that this run created, instead of removing it
    #[arg(long)]
    pub(crate) keep_partial: bool,
    #[command(flatten)]
    pub(crate) display: JobDisplay,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Not supported: there are no user-creatable objects
    #[arg(long, hide = true, value_name = "OBJDEF")]
    pub(crate) object: Vec<String>,
    /// The image to copy
    pub(crate) source: OsString,
    /// The copy
    pub(crate) target: Option<OsString>,
}

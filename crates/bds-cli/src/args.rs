//! Defines and parses the command line: qemu-img's verbs, letters and defaults, and a few of our
//! own.
//!
//! Only the shape is checked here; the verbs check what a value means.

mod backup;
pub(crate) mod checkpoint;
mod mirror;
mod source;

use std::ffi::OsString;
use std::path::PathBuf;

use bds_core::options::parse_number;
use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, Parser, Subcommand, ValueEnum};

pub(crate) use self::backup::{
    Backup, BackupCommand, BackupList, BackupPrune, BackupRestore, BackupRun, BackupVerify,
};
pub(crate) use self::mirror::{Mirror, MirrorCopyMode, MirrorSync};
pub(crate) use self::source::{JobDisplay, Output, Source};

/// Disk images from the shell: qemu-img's verbs and options on the bds block layer.
#[derive(Debug, Parser)]
#[command(
    name = "bds",
    version,
    // As getopt_long: a long option may be cut short, and of an option that is given twice the last
    // one counts.
    infer_long_args = true,
    args_override_self = true,
    after_help = "\
Formats: give -f whenever you know it. Without -f the format is guessed from the first bytes, as qemu-img does; \
an image guessed to be raw is never opened for writing, because the VM that wrote it may have chosen those bytes.
Files named inside an image (backing and data files) are opened, as with qemu-img. Use --image-opts to name them yourself.
Exit codes are qemu-img's: 0 well, 1 failed; compare: 1 different, 2 and more failed; check: 2 corrupt, 3 leaks, 63 no checks."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Creates a new image
    Create(Create),
    /// Shows what is known about an image
    Info(Info),
    /// Copies one or more images into a new one
    Convert(Convert),
    /// Compares the contents of two images
    #[command(mut_arg("format", |arg| arg.alias("a-format")))]
    Compare(Compare),
    /// Shows which ranges hold data, and where
    Map(Map),
    /// Looks for leaks and corruption; changes nothing
    Check(Check),
    /// Proves an image against its manifest of content hashes, or writes that
    Verify(Verify),
    /// Makes, restores and verifies full and incremental backups
    Backup(Backup),
    /// Makes overlays and edits bitmaps of several images at one moment
    Checkpoint(checkpoint::Checkpoint),
    /// Says how large an image would become
    Measure(Measure),
    /// Changes the size of an image
    Resize(Resize),
    /// Changes format options of an image
    Amend(Amend),
    /// Changes persistent dirty bitmaps of an image
    Bitmap(Bitmap),
    /// Writes an image's contents into its backing file
    Commit(Commit),
    /// Copies an image's backing files into it, and cuts them off
    Stream(Stream),
    /// Copies an image as the job 'mirror' does, with its events
    Mirror(Mirror),
    /// Measures how fast an image is read or written
    Bench(Bench),
    /// Copies a range of blocks
    Dd(Dd),
    /// Draws the graph of nodes behind an image
    Graph(Graph),
    /// Lists the drivers, or the options of one
    Drivers(Drivers),
    /// Prints a completion script for a shell
    Completions(Completions),
    /// Writes the manual pages, for packagers
    #[command(hide = true)]
    ManPages(ManPages),
}

#[derive(Args, Debug)]
pub(crate) struct Create {
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Format of the new image
    #[arg(short, long, default_value = "raw", value_name = "FMT")]
    pub(crate) format: String,
    /// Options of the format, "key=value,…"; "help" lists them
    #[arg(short, long, value_name = "OPTIONS")]
    pub(crate) options: Vec<OsString>,
    /// Make the new image an overlay of this one
    #[arg(short, long, value_name = "FILE")]
    pub(crate) backing: Option<OsString>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) backing_format: Option<String>,
    /// Do not open the backing file
    #[arg(short = 'u', long)]
    pub(crate) backing_unsafe: bool,
    /// Not supported: there are no user-creatable objects
    #[arg(long, hide = true, value_name = "OBJDEF")]
    pub(crate) object: Vec<String>,
    /// The file to make; overwritten if it exists
    pub(crate) filename: Option<OsString>,
    /// Size in bytes, with optional suffix k, M, G, T, P, E; that of the backing file if not given
    pub(crate) size: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Info {
    #[command(flatten)]
    pub(crate) source: Source,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Also show the images below
    #[arg(short, long)]
    pub(crate) backing_chain: bool,
    /// The image
    pub(crate) filename: OsString,
}

#[derive(Args, Debug)]
pub(crate) struct Convert {
    /// Format of the input; guessed if not given
    #[arg(short = 'f', long = "source-format", value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// The input names are lists of options
    #[arg(long, alias = "source-image-opts", conflicts_with = "format")]
    pub(crate) image_opts: bool,
    /// The output name is a list of options; needs -n
    #[arg(long, conflicts_with = "output_format")]
    pub(crate) target_image_opts: bool,
    /// Format of the output
    #[arg(short = 'O', long = "target-format", alias = "output-format", value_name = "FMT")]
    pub(crate) output_format: Option<String>,
    /// Options of the output's format; "help" lists them
    #[arg(short, long = "target-options", alias = "options", value_name = "OPTIONS")]
    pub(crate) options: Vec<OsString>,
    /// Compress the output
    #[arg(short, long)]
    pub(crate) compress: bool,
    /// Show progress
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Requests in flight, 1 to 16
    #[arg(short = 'm', long, default_value_t = 8, value_name = "N", value_parser = number::<usize>)]
    pub(crate) parallel: usize,
    /// Allow writes in any order
    #[arg(short = 'W', long)]
    pub(crate) oob_writes: bool,
    /// Write into an existing output instead of creating it
    #[arg(short = 'n', long)]
    pub(crate) no_create: bool,
    /// Bytes of zeros that become a hole; 0 writes everything
    #[arg(short = 'S', long, default_value = "4k", value_name = "SIZE")]
    pub(crate) sparse_size: String,
    /// Make the output an overlay of this image, and copy only what differs
    #[arg(short = 'B', long, value_name = "FILE")]
    pub(crate) backing: Option<OsString>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) backing_format: Option<String>,
    /// Cache mode of the output
    #[arg(short = 't', long, default_value = "unsafe", value_name = "CACHE")]
    pub(crate) target_cache: String,
    /// Cache mode of the input
    #[arg(short = 'T', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) source_cache: String,
    /// The existing output reads as zeros already; needs -n
    #[arg(long)]
    pub(crate) target_is_zero: bool,
    /// Let the file system copy ranges where it can
    #[arg(short = 'C', long = "copy-range-offloading")]
    pub(crate) copy_range: bool,
    /// Go on after errors of the input; unreadable sectors become zeros
    #[arg(long)]
    pub(crate) salvage: bool,
    /// Do not mind other users of the input
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Copy persistent bitmaps, too
    #[arg(long)]
    pub(crate) bitmaps: bool,
    /// Leave out bitmaps that are inconsistent, instead of failing
    #[arg(long)]
    pub(crate) skip_broken_bitmaps: bool,
    /// Not supported: an internal snapshot as input
    #[arg(
        short = 'l',
        long = "source-snapshot",
        alias = "snapshot",
        hide = true,
        value_name = "SNAPSHOT"
    )]
    pub(crate) snapshot: Option<String>,
    /// At most this many bytes a second
    #[arg(short = 'r', long, value_name = "RATE")]
    pub(crate) rate: Option<String>,
    /// Keep an incomplete output that this run created, instead of removing it
    #[arg(long)]
    pub(crate) keep_partial: bool,
    /// Not supported: there are no user-creatable objects
    #[arg(long, hide = true, value_name = "OBJDEF")]
    pub(crate) object: Vec<String>,
    /// The inputs, one after the other, and the output
    #[arg(value_name = "FILE")]
    pub(crate) filenames: Vec<OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct Compare {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Format of the second image
    #[arg(short = 'F', long = "b-format", value_name = "FMT", conflicts_with = "image_opts")]
    pub(crate) second_format: Option<String>,
    /// Different sizes or allocation are a difference
    #[arg(short, long)]
    pub(crate) strict: bool,
    /// Cache mode of both
    #[arg(short = 'T', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) cache: String,
    /// Show progress
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The first image
    pub(crate) first: OsString,
    /// The second image
    pub(crate) second: OsString,
}

#[derive(Args, Debug)]
pub(crate) struct Map {
    #[command(flatten)]
    pub(crate) source: Source,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Begin here
    #[arg(short, long, value_name = "OFFSET")]
    pub(crate) start_offset: Option<String>,
    /// Look at no more than this
    #[arg(short = 'l', long, value_name = "LENGTH")]
    pub(crate) max_length: Option<String>,
    /// The image
    pub(crate) filename: OsString,
}

#[derive(Args, Debug)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) source: Source,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Cache mode
    #[arg(short = 'T', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) cache: String,
    /// Not supported: repair
    #[arg(short = 'r', long, hide = true, value_name = "leaks|all")]
    pub(crate) repair: Option<String>,
    /// The image
    pub(crate) filename: OsString,
}

#[derive(Args, Debug)]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) source: Source,
    /// The manifest; the image's name with ".manifest" if not given
    #[arg(short, long, value_name = "FILE")]
    pub(crate) manifest: Option<PathBuf>,
    /// Write the manifest instead of comparing with it
    #[arg(short, long)]
    pub(crate) write: bool,
    /// With --write: replace an older manifest
    #[arg(long, requires = "write")]
    pub(crate) overwrite: bool,
    /// With --write: a text to keep in the manifest
    #[arg(long, requires = "write", value_name = "TEXT")]
    pub(crate) note: Option<String>,
    /// Manifest of the content that this image continues: noted with --write, checked without
    #[arg(long, value_name = "FILE")]
    pub(crate) parent: Option<PathBuf>,
    /// Show progress
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Cache mode
    #[arg(short = 'T', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) cache: String,
    /// The image
    pub(crate) filename: OsString,
}

#[derive(Args, Debug)]
pub(crate) struct Measure {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Format of the image to be
    #[arg(short = 'O', long = "target-format", default_value = "raw", value_name = "FMT")]
    pub(crate) output_format: String,
    /// Options of that format
    #[arg(short, long, value_name = "OPTIONS")]
    pub(crate) options: Vec<OsString>,
    /// For an empty image of this size
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) size: Option<String>,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Not supported: an internal snapshot as input
    #[arg(short = 'l', long, hide = true, value_name = "SNAPSHOT")]
    pub(crate) snapshot: Option<String>,
    /// For the contents of this image
    #[arg(conflicts_with = "size")]
    pub(crate) filename: Option<OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct Resize {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Allow to cut the image
    #[arg(long)]
    pub(crate) shrink: bool,
    /// How new space is provided: off, metadata, falloc, full
    #[arg(long, default_value = "off", value_name = "MODE")]
    pub(crate) preallocation: String,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    pub(crate) filename: OsString,
    /// The new size, or a change if it begins with + or -
    #[arg(allow_hyphen_values = true)]
    pub(crate) size: String,
}

#[derive(Args, Debug)]
pub(crate) struct Commit {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Commit into this image of the backing chain instead of the next one; implies -d
    #[arg(short, long, value_name = "FILE")]
    pub(crate) base: Option<OsString>,
    /// Do not empty the image afterwards
    #[arg(short, long)]
    pub(crate) drop: bool,
    /// Cache mode
    #[arg(short = 't', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) cache: String,
    /// At most this many bytes a second
    #[arg(short, long, value_name = "RATE")]
    pub(crate) rate: Option<String>,
    #[command(flatten)]
    pub(crate) display: JobDisplay,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    pub(crate) filename: OsString,
}

#[derive(Args, Debug)]
pub(crate) struct Stream {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Keep this image of the backing chain, and those below it
    #[arg(short, long, value_name = "FILE")]
    pub(crate) base: Option<OsString>,
    /// Record this name of the base, instead of its file name
    #[arg(long, value_name = "FILE", requires = "base")]
    pub(crate) backing_file: Option<OsString>,
    /// Cache mode
    #[arg(short = 't', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) cache: String,
    /// At most this many bytes a second
    #[arg(short, long, value_name = "RATE")]
    pub(crate) rate: Option<String>,
    #[command(flatten)]
    pub(crate) display: JobDisplay,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    pub(crate) filename: OsString,
}

#[derive(Args, Debug)]
pub(crate) struct Amend {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Options to change, "key=value,…"; "help" lists them
    #[arg(short, long, value_name = "OPTIONS")]
    pub(crate) options: Vec<OsString>,
    /// Cache mode
    #[arg(short = 't', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) cache: String,
    /// Allow changes that may lose data; the formats of this tool have none
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) display: JobDisplay,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    pub(crate) filename: Option<OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct Bitmap {
    #[command(flatten)]
    pub(crate) actions: BitmapActions,
    /// Bytes that share a bit of a new bitmap; chosen by the format if not given
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) granularity: Option<String>,
    /// Merge from a bitmap of this image
    #[arg(short = 'b', long, value_name = "FILE")]
    pub(crate) source_file: Option<OsString>,
    /// Format of that image
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) source_format: Option<String>,
    #[command(flatten)]
    pub(crate) source: Source,
    /// The image, and the name of the bitmap
    #[arg(value_names = ["FILENAME", "BITMAP"])]
    pub(crate) words: Vec<OsString>,
}

/// What is done to a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BitmapAction {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    /// With the name of the other bitmap.
    Merge(String),
}

impl BitmapAction {
    /// As on the command line.
    pub(crate) fn verb(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// The actions on a bitmap in the order of the command line, each as often as it is given.
#[derive(Debug)]
pub(crate) struct BitmapActions(pub(crate) Vec<BitmapAction>);

/// Actions without a value, with their help.
const PLAIN_ACTIONS: [(BitmapAction, &str); 5] = [
    (BitmapAction::Add, "Add the bitmap; it records what changes from now on"),
    (BitmapAction::Remove, "Remove it"),
    (BitmapAction::Clear, "Forget what it has recorded"),
    (BitmapAction::Enable, "Let it record"),
    (BitmapAction::Disable, "Let it record no more"),
];

impl Args for BitmapActions {
    fn augment_args(command: clap::Command) -> clap::Command {
        let plain = PLAIN_ACTIONS.map(|(action, help)| {
            // A flag whose every occurrence counts.
            let arg = Arg::new(action.verb()).long(action.verb()).help(help);
            arg.action(ArgAction::Append).num_args(0).default_missing_value("true")
        });
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("SOURCE")
            .help("Mark in it what is marked in the bitmap SOURCE")
            .action(ArgAction::Append);
        command.args(plain).arg(merge)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for BitmapActions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found: Vec<(usize, BitmapAction)> = Vec::new();
        for (action, _) in PLAIN_ACTIONS {
            let places = matches.indices_of(action.verb()).into_iter().flatten();
            found.extend(places.map(|place| (place, action.clone())));
        }
        let places = matches.indices_of("merge").into_iter().flatten();
        let sources = matches.get_many::<String>("merge").into_iter().flatten();
        found.extend(places.zip(sources).map(|(at, name)| (at, BitmapAction::Merge(name.clone()))));
        found.sort_by_key(|(place, _)| *place);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[derive(Args, Debug)]
pub(crate) struct Bench {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Requests in all
    #[arg(short, long, default_value_t = 75_000, value_name = "N", value_parser = number::<u64>)]
    pub(crate) count: u64,
    /// Requests in flight
    #[arg(short, long, default_value_t = 64, value_name = "N", value_parser = number::<u32>)]
    pub(crate) depth: u32,
    /// Flush after this many writes
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = number::<u32>)]
    pub(crate) flush_interval: u32,
    /// Accepted for compatibility: threads, native, io_uring
    #[arg(short = 'i', long, value_name = "AIO")]
    pub(crate) aio: Option<String>,
    /// Accepted for compatibility: native AIO
    #[arg(short = 'n', long)]
    pub(crate) native: bool,
    /// Do not wait for requests in flight before a flush
    #[arg(long)]
    pub(crate) no_drain: bool,
    /// Offset of the first request
    #[arg(short, long, default_value = "0")]
    pub(crate) offset: String,
    /// Byte to write
    #[arg(long, default_value_t = 0, value_parser = number::<u8>)]
    pub(crate) pattern: u8,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Bytes a request
    #[arg(short = 's', long, default_value = "4k", value_name = "SIZE")]
    pub(crate) buffer_size: String,
    /// Distance from one request to the next; the buffer size if not given
    #[arg(short = 'S', long, value_name = "SIZE")]
    pub(crate) step_size: Option<String>,
    /// Cache mode
    #[arg(short = 't', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) cache: String,
    /// Write instead of reading
    #[arg(short, long)]
    pub(crate) write: bool,
    /// Threads that share the requests
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) threads: u32,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The image
    pub(crate) filename: OsString,
}

#[derive(Args, Debug)]
pub(crate) struct Dd {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Format of the output
    #[arg(short = 'O', long = "output-format", default_value = "raw", value_name = "FMT")]
    pub(crate) output_format: String,
    /// Keep an incomplete output that this run created, instead of removing it
    #[arg(long)]
    pub(crate) keep_partial: bool,
    /// if=INPUT of=OUTPUT bs=SIZE count=BLOCKS skip=BLOCKS
    #[arg(required = true, value_name = "OPERAND")]
    pub(crate) operands: Vec<OsString>,
}

/// How the graph is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Drawing {
    /// Lines of text
    Text,
    /// Graphviz
    Dot,
    /// A picture
    Svg,
    /// JSON, as QEMU's x-debug-query-block-graph
    Json,
}

#[derive(Args, Debug)]
pub(crate) struct Graph {
    #[command(flatten)]
    pub(crate) source: Source,
    /// How to draw
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) output: Drawing,
    /// Where to draw; standard output if not given
    #[arg(short, long, value_name = "FILE")]
    pub(crate) write_to: Option<PathBuf>,
    /// The images
    #[arg(required = true)]
    pub(crate) filenames: Vec<OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct Drivers {
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Show the options of this driver
    pub(crate) name: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Args, Debug)]
pub(crate) struct ManPages {
    /// An existing directory for them
    pub(crate) dir: PathBuf,
}

/// A number, also a hexadecimal one.
fn number<T: TryFrom<u64>>(text: &str) -> Result<T, &'static str> {
    parse_number(text)
        .and_then(|number| T::try_from(number).ok())
        .ok_or("use digits, or hexadecimal digits behind 0x, and a number in range")
}

/// Inserts `--` before a negative size: the last word of `resize FILE -1G` is a size, never an
/// option.
pub(crate) fn with_last_size_protected(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<_> = words.collect();
    let is_resize = words.get(1).is_some_and(|verb| verb == "resize");
    let looks_negative = |word: &OsString| {
        let bytes = word.as_encoded_bytes();
        bytes.first() == Some(&b'-') && bytes.get(1).is_some_and(u8::is_ascii_digit)
    };
    let is_protected = words.iter().any(|word| word == "--");
    if is_resize && !is_protected && words.last().is_some_and(looks_negative) {
        words.insert(words.len() - 1, "--".into());
    }
    words
}

//! Arguments of the verb `backup`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::mirror::RecordCheck;
use super::source::{Output, Source};

#[derive(Args, Debug)]
pub(crate) struct Backup {
    #[command(subcommand)]
    pub(crate) command: BackupCommand,
}

#[derive(Subcommand, Debug)]
pub(crate) enum BackupCommand {
    /// Adds a point: a full backup first, then increments; goes on with an unfinished one
    Run(BackupRun),
    /// Lists the points
    List(BackupList),
    /// Writes the content of a point to a new image
    Restore(BackupRestore),
    /// Proves points against their manifests
    Verify(BackupVerify),
    /// Removes the oldest points
    Prune(BackupPrune),
}

#[derive(Args, Debug)]
pub(crate) struct BackupRun {
    #[command(flatten)]
    pub(crate) source: Source,
    /// Make a full backup, whatever there is
    #[arg(long)]
    pub(crate) full: bool,
    /// Make a full backup where no increment is possible
    #[arg(long)]
    pub(crate) or_full: bool,
    /// Open the source read-only and keep no bitmap in it: all backups are full
    #[arg(long, requires = "full")]
    pub(crate) no_bitmap: bool,
    /// Remove what an unfinished run has left, instead of going on with it
    #[arg(long)]
    pub(crate) start_over: bool,
    /// What of an unfinished point is read before its record is believed
    #[arg(long, value_enum, default_value = "full")]
    pub(crate) check_target: RecordCheck,
    /// Bring the record of an unfinished point up to date after this many bytes; 1/128 of the
    /// image, from 4M to 256M, if not given
    #[arg(long, value_name = "SIZE")]
    pub(crate) record_interval: Option<String>,
    /// Compress the backup
    #[arg(short, long)]
    pub(crate) compress: bool,
    /// Show progress
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Cache mode of the source
    #[arg(short = 'T', long, default_value = "writeback", value_name = "CACHE")]
    pub(crate) cache: String,
    /// Name of a disk in the directory, once for each image; the file's name up to its last dot if
    /// not given. For several images
    #[arg(long = "name", value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// The images, which no other process may have open, and the directory of backups, made if it
    /// is missing. A point of several images has them all, as they are at one moment
    #[arg(required = true, num_args = 2.., value_name = "IMAGE… DIRECTORY")]
    pub(crate) paths: Vec<OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct BackupList {
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// The directory of backups
    pub(crate) directory: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct BackupRestore {
    /// The point; the newest if not given
    #[arg(long, value_name = "NUMBER")]
    pub(crate) point: Option<u32>,
    /// Format of the new image
    #[arg(short = 'O', long = "target-format", default_value = "qcow2", value_name = "FMT")]
    pub(crate) output_format: String,
    /// Show progress
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Of a directory of several disks: restore this one alone
    #[arg(long, value_name = "NAME")]
    pub(crate) disk: Option<String>,
    /// The directory of backups
    pub(crate) directory: PathBuf,
    /// The new image; for several disks a new directory
    pub(crate) target: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct BackupPrune {
    /// How many points to keep
    #[arg(long, value_name = "NUMBER")]
    pub(crate) keep: usize,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The directory of backups
    pub(crate) directory: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct BackupVerify {
    /// The point; all if not given
    #[arg(long, value_name = "NUMBER")]
    pub(crate) point: Option<u32>,
    /// Show progress
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub(crate) output: Output,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The directory of backups
    pub(crate) directory: PathBuf,
}

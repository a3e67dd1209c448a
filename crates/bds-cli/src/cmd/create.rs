//! `create`: creates an image, and prints its options as qemu-img does.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bds_core::driver::{OpenFlags, ReferenceKind};
use bds_core::graph::{Graph, NewImage, reference_gate};
use bds_core::options::{OptionKind, OptionSpec, parse_number, parse_size};
use bds_core::{Error, ErrorKind, Options, Result};
use serde_json::Value;

use crate::args::Create;
use crate::image;
use crate::image_options;
use crate::image_spec;
use crate::interrupt::Interrupt;
use crate::partial_output::PartialOutput;
use crate::printer;

pub(crate) fn run(args: &Create) -> Result<()> {
    image_spec::refuse_objects(&args.object)?;
    if wants_help(&args.options) {
        return help(&args.format, args.filename.as_deref());
    }
    let Some(filename) = args.filename.as_deref() else {
        return Err(Error::new(ErrorKind::InvalidInput, "Expecting image file name"));
    };
    let path = path(filename)?;
    let mut options = format_options(&args.options)?;
    refuse_backing(&args.format, args.backing.is_some())?;
    set_backing(&mut options, args.backing.as_deref(), args.backing_format.as_deref())?;
    if let Some(text) = &args.size {
        if options.contains("size") {
            let message = "The image size must be specified only once";
            return Err(Error::new(ErrorKind::InvalidInput, message).file(path));
        }
        options.set("size", super::size("image size", text)?);
    }
    if !options.contains("size") && !options.contains("backing_file") {
        return Err(
            Error::new(ErrorKind::InvalidInput, "Image creation needs a size parameter").file(path)
        );
    }
    let graph = image::trusting_graph();
    image::block_on(async {
        // A dropped creation removes what it made.
        let interrupt = Interrupt::watch()?;
        let made = make(&graph, &args.format, path, options, args.backing_unsafe, args.quiet);
        interrupt.run_or_drop(made).await
    })
}

/// Creates an image and prints qemu-img's "Formatting …" line.
async fn make(
    graph: &Graph,
    format: &str,
    path: PathBuf,
    options: Options,
    skip_backing: bool,
    is_quiet: bool,
) -> Result<()> {
    let given = options.clone();
    let shown = path.display().to_string();
    let len = create(graph, format, path, options, skip_backing).await?;
    if is_quiet {
        return Ok(());
    }
    // The requested size: the image's own length may be rounded up.
    let len = given.clone().take_size("size")?.unwrap_or(len);
    printer::line(formatting(graph, format, &shown, &given, len)?)
}

/// Creates an image and returns its virtual size.
pub(crate) async fn create(
    graph: &Graph,
    format: &str,
    path: PathBuf,
    options: Options,
    skip_backing: bool,
) -> Result<u64> {
    let format = stored_format(format).to_owned();
    let overlay = (!skip_backing && options.contains("backing_file")).then(|| path.clone());
    let image = NewImage { format: format.clone(), path, options, skip_backing };
    let len = graph.create_image(image).await?.len;
    if let Some(path) = overlay {
        note_base(graph, &format, &path).await;
    }
    Ok(len)
}

/// Notes in a new overlay what its backing file holds, if no other program writes that. An overlay
/// without the note is as good, but that a wrong base is not refused.
async fn note_base(graph: &Graph, format: &str, path: &Path) {
    let file = image_options::file(path).into_json();
    let options = Options::new().with("driver", format).with("file", file);
    let flags = OpenFlags { refuse_writers: true, ..OpenFlags::default() };
    let noted = async {
        let node = graph.open_with(options, flags).await?;
        let backend = image::backend(&node, true)?;
        let noted = backend.mark_base().await;
        noted.and(image::close(backend, node).await)
    };
    match noted.await {
        // A program that writes the base goes on writing it: nothing can be noted.
        Err(error) if error.kind() != ErrorKind::InUse => warn_of_note(&error),
        _ => {}
    }
}

/// Warns that an overlay does not note what its backing file holds.
pub(crate) fn warn_of_note(error: &Error) {
    let why = crate::report::message(error);
    printer::message(format_args!(
        "bds: warning: the overlay does not note what its backing file holds: {why}"
    ));
}

/// Maps a protocol that is given as a format (`-O file`) to raw: it stores nothing but the bytes.
pub(crate) fn stored_format(format: &str) -> &str {
    if matches!(format, "file" | "host_device") { "raw" } else { format }
}

/// Returns the path of an output; only files and devices can be created.
pub(crate) fn path(name: &OsStr) -> Result<PathBuf> {
    if name.as_bytes().starts_with(b"json:") {
        let message =
            "a new image is made in a file: name the file, and with -n what exists already";
        return Err(Error::new(ErrorKind::NotSupported, message).field("name", name.display()));
    }
    match image_options::protocol(name)?.contains("filename") {
        true => Ok(image_options::path_of(name)),
        false => {
            let message = "nothing can be created there: name a file";
            Err(Error::new(ErrorKind::NotSupported, message).field("name", name.display()))
        }
    }
}

/// Tracks the files that creating an image may make; called before it does.
pub(crate) fn partial(path: PathBuf, options: &Options, keep: bool) -> PartialOutput {
    let data_file = options
        .peek_path("data_file")
        .map(|name| reference_gate::resolve(ReferenceKind::DataFile, name, Some(&path)));
    PartialOutput::before_creation(std::iter::once(path).chain(data_file), keep)
}

/// Joins and parses all `-o` options.
pub(crate) fn format_options(texts: &[OsString]) -> Result<Options> {
    Options::parse_os(&texts.join(OsStr::new(",")))
}

pub(crate) fn wants_help(texts: &[OsString]) -> bool {
    let parts = texts.iter().flat_map(|text| text.as_bytes().split(|byte| *byte == b','));
    parts.into_iter().any(|word| word == b"help" || word == b"?")
}

/// Refuses `-b` for a format without backing files.
fn refuse_backing(format: &str, has_backing: bool) -> Result<()> {
    let registry = bds_drivers::registry();
    let options = registry.format(stored_format(format))?.create_options();
    if !has_backing || options.iter().any(|option| option.name == "backing_file") {
        return Ok(());
    }
    let message = format!("Backing file not supported for file format '{format}'");
    Err(Error::new(ErrorKind::InvalidInput, message))
}

/// Sets the options `backing_file` and `backing_fmt` from `-b` and `-F`.
pub(crate) fn set_backing(
    options: &mut Options,
    file: Option<&OsStr>,
    format: Option<&str>,
) -> Result<()> {
    for (key, value) in [("backing_file", file), ("backing_fmt", format.map(OsStr::new))] {
        if let Some(value) = value {
            if options.contains(key) && options.peek_path(key).is_none_or(|given| given != value) {
                return Err(Error::new(ErrorKind::InvalidInput, "the option is given twice")
                    .field("option", key));
            }
            options.set_path(key, value);
        }
    }
    if let Some(format) = options.peek("backing_fmt").and_then(Value::as_str)
        && !QEMU_FORMATS.contains(&format)
    {
        bds_drivers::registry().format(format).map_err(|e| e.context("backing format"))?;
    }
    if options.contains("backing_file") && !options.contains("backing_fmt") {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Backing file specified without backing format: add -F with its format",
        ));
    }
    Ok(())
}

/// QEMU's formats that are not supported here: an overlay of one can still be created for QEMU,
/// with -u.
const QEMU_FORMATS: [&str; 11] =
    ["bochs", "cloop", "dmg", "luks", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"];

/// qemu-img's order of qcow2's options; others come first.
const ORDER: [&str; 12] = [
    "cluster_size",
    "extended_l2",
    "preallocation",
    "compression_type",
    "size",
    "compat",
    "backing_file",
    "backing_fmt",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
];

/// Returns "Formatting 'x', fmt=qcow2 cluster_size=65536 …": the given options and the defaults, as
/// qemu-img prints them.
fn formatting(
    graph: &Graph,
    format: &str,
    shown: &str,
    given: &Options,
    size: u64,
) -> Result<String> {
    let mut out = format!("Formatting '{shown}', fmt={format}");
    let registry = &graph.config().registry;
    let mut specs: Vec<OptionSpec> =
        registry.format(stored_format(format))?.create_options().to_vec();
    if specs.iter().any(|spec| spec.name == ORDER[0]) {
        specs.sort_by_key(|spec| ORDER.iter().position(|name| *name == spec.name));
    }
    // Options of the protocol alone are shown if they were given.
    let of_file = registry.driver("file")?.create_options();
    let is_new = |spec: &&OptionSpec| !specs.iter().any(|known| known.name == spec.name);
    let of_file: Vec<OptionSpec> = of_file.iter().filter(is_new).copied().collect();
    specs.extend(of_file);
    for spec in &specs {
        let name = spec.name;
        let value = if name == "size" {
            Some(size.to_string())
        } else {
            printed(spec, given).or_else(|| default_of(spec))
        };
        if let Some(value) = value {
            out += &format!(" {name}={value}");
        }
    }
    Ok(out)
}

/// Returns the default, unless qemu-img does not print it.
fn default_of(spec: &OptionSpec) -> Option<String> {
    let is_silent = matches!(spec.name, "compat" | "preallocation" | "nocow" | "extent_size_hint");
    spec.default.filter(|_| !is_silent).map(str::to_owned)
}

fn printed(spec: &OptionSpec, given: &Options) -> Option<String> {
    let text = match given.peek_path(spec.name) {
        Some(name) => name.to_string_lossy().into_owned(),
        None => given.peek(spec.name)?.to_string(),
    };
    Some(match spec.kind {
        OptionKind::Size => parse_size(&text).map_or(text, |n| n.to_string()),
        OptionKind::Number => parse_number(&text).map_or(text, |n| n.to_string()),
        _ => text.replace(',', ",,"),
    })
}

/// Prints the options that `-o` takes.
pub(crate) fn help(format: &str, filename: Option<&OsStr>) -> Result<()> {
    let registry = bds_drivers::registry();
    let driver = registry.format(stored_format(format))?;
    let mut out = match filename {
        None => format!("Supported {format} options:\n"),
        Some(_) => "Supported options:\n".to_owned(),
    };
    let mut specs: Vec<OptionSpec> = driver.create_options().to_vec();
    if let Some(filename) = filename {
        let path = image_options::path_of(filename);
        let protocol = registry.driver(image_options::protocol_of_file(&path))?;
        let is_new =
            |spec: &&OptionSpec| !driver.create_options().iter().any(|s| s.name == spec.name);
        specs.extend(protocol.create_options().iter().filter(is_new));
    }
    specs.sort_by_key(|spec| spec.name);
    for spec in specs {
        let kind = match spec.kind {
            OptionKind::Bool => "bool (on/off)",
            OptionKind::Number => "num",
            OptionKind::Size => "size",
            _ => "str",
        };
        let left = format!("{}=<{kind}>", spec.name);
        out += &format!("  {left:<22} - {}\n", spec.help);
    }
    if filename.is_none() {
        out += "\nThe protocol level may support further options.\n\
                Specify the target filename to include those options.\n";
    }
    printer::text(&out)
}

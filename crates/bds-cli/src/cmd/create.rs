//! `create`: a new image.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use bds_core::driver::ReferenceKind;
use bds_core::graph::{Graph, NewImage, reference_gate};
use bds_core::options::{OptionKind, OptionSpec, parse_number, parse_size};
use bds_core::{Error, ErrorKind, Options, Result};
use serde_json::Value;

use crate::args::Create;
use crate::describe;
use crate::image;
use crate::partial::Partial;
use crate::printer;
use crate::stop::Stop;

pub(crate) fn run(args: &Create) -> Result<()> {
    image::refuse_objects(&args.object)?;
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
            let words = "The image size must be specified only once";
            return Err(Error::new(ErrorKind::InvalidInput, words).file(path));
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
        // What is dropped half-way is removed again.
        let stop = Stop::watch()?;
        let made = make(&graph, &args.format, path, options, args.backing_unsafe, args.quiet);
        stop.or_drop(made).await
    })
}

/// Makes an image and says so as qemu-img does.
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
    // As it was asked for: the image's own length may be rounded up.
    let len = given.clone().take_size("size")?.unwrap_or(len);
    printer::line(formatting(graph, format, &shown, &given, len)?)
}

/// Makes an image; answers its virtual size.
pub(crate) async fn create(
    graph: &Graph,
    format: &str,
    path: PathBuf,
    options: Options,
    skip_backing: bool,
) -> Result<u64> {
    let format = stored_format(format).to_owned();
    let image = NewImage { format, path, options, skip_backing };
    Ok(graph.create_image(image).await?.len)
}

/// A protocol as a format, as in `-O file`, stores nothing but the bytes: that is raw.
pub(crate) fn stored_format(format: &str) -> &str {
    if matches!(format, "file" | "host_device") { "raw" } else { format }
}

/// The file that an output's name stands for: only files and devices are made.
pub(crate) fn path(name: &OsStr) -> Result<PathBuf> {
    if name.as_bytes().starts_with(b"json:") {
        let words = "a new image is made in a file: name the file, and with -n what exists already";
        return Err(Error::new(ErrorKind::NotSupported, words).field("name", name.display()));
    }
    match describe::protocol(name)?.contains("filename") {
        true => Ok(describe::path_of(name)),
        false => {
            let words = "nothing can be created there: name a file";
            Err(Error::new(ErrorKind::NotSupported, words).field("name", name.display()))
        }
    }
}

/// The files that creating an image may make, before it does.
pub(crate) fn partial(path: PathBuf, options: &Options, keeps: bool) -> Partial {
    let data_file = options
        .peek_path("data_file")
        .map(|name| reference_gate::resolve(ReferenceKind::DataFile, name, Some(&path)));
    Partial::before_creation(std::iter::once(path).chain(data_file), keeps)
}

/// All -o together.
pub(crate) fn format_options(texts: &[OsString]) -> Result<Options> {
    Options::parse_os(&texts.join(OsStr::new(",")))
}

pub(crate) fn wants_help(texts: &[OsString]) -> bool {
    let words = texts.iter().flat_map(|text| text.as_bytes().split(|byte| *byte == b','));
    words.into_iter().any(|word| word == b"help" || word == b"?")
}

/// A format without backing files takes no -b, whatever its format.
fn refuse_backing(format: &str, has_backing: bool) -> Result<()> {
    let registry = bds_drivers::registry();
    let options = registry.format(stored_format(format))?.create_options();
    if !has_backing || options.iter().any(|option| option.name == "backing_file") {
        return Ok(());
    }
    let words = format!("Backing file not supported for file format '{format}'");
    Err(Error::new(ErrorKind::InvalidInput, words))
}

/// -b and -F are other words for two options.
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

/// Formats of QEMU that are not read here: an overlay of one can still be made for QEMU, with -u.
const QEMU_FORMATS: [&str; 11] =
    ["bochs", "cloop", "dmg", "luks", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"];

/// qemu-img's order of qcow2's options; what is not here comes first.
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

/// "Formatting 'x', fmt=qcow2 cluster_size=65536 …": what was asked for and the defaults, as qemu-img prints them.
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
    // What only the file takes is shown if it was given.
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

/// The default, unless qemu-img keeps it to itself.
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

/// What -o understands.
pub(crate) fn help(format: &str, filename: Option<&OsStr>) -> Result<()> {
    let registry = bds_drivers::registry();
    let driver = registry.format(stored_format(format))?;
    let mut out = match filename {
        None => format!("Supported {format} options:\n"),
        Some(_) => "Supported options:\n".to_owned(),
    };
    let mut specs: Vec<OptionSpec> = driver.create_options().to_vec();
    if let Some(filename) = filename {
        let path = describe::path_of(filename);
        let protocol = registry.driver(describe::protocol_of_file(&path))?;
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
            OptionKind::String | OptionKind::Choice(_) | OptionKind::Child => "str",
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

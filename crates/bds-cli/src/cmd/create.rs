//! `create`: a new image.

use std::path::Path;

use bds_core::driver::DriverType;
use bds_core::graph::{Graph, NewImage};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::{Error, ErrorKind, Options, Result};

use crate::args::Create;
use crate::image;

pub(crate) fn run(args: &Create) -> Result<()> {
    image::refuse_objects(&args.object)?;
    if wants_help(&args.options) {
        return help(&args.format, args.filename.as_deref());
    }
    let Some(filename) = args.filename.as_deref() else {
        return Err(Error::new(ErrorKind::InvalidInput, "Expecting image file name"));
    };
    let mut options = format_options(&args.options)?;
    set_backing(&mut options, args.backing.as_deref(), args.backing_format.as_deref())?;
    if let Some(text) = &args.size {
        options.set("size", super::size("image size", text)?);
    }
    if !options.contains("size") && !options.contains("backing_file") {
        return Err(Error::new(ErrorKind::InvalidInput, "Image creation needs a size parameter")
            .file(filename));
    }
    let graph = image::trusting_graph();
    image::block_on(make(&graph, &args.format, filename, options, args.backing_unsafe, args.quiet))
}

/// Makes an image and says so as qemu-img does.
async fn make(
    graph: &Graph,
    format: &str,
    filename: &str,
    options: Options,
    skip_backing: bool,
    is_quiet: bool,
) -> Result<()> {
    let given = options.clone();
    let len = create(graph, format, filename, options, skip_backing).await?;
    if is_quiet {
        return Ok(());
    }
    let driver = graph.config().registry.format(format)?;
    println!("{}", formatting(&**driver, filename, &given, len));
    Ok(())
}

/// Makes an image; answers its virtual size.
pub(crate) async fn create(
    graph: &Graph,
    format: &str,
    filename: &str,
    options: Options,
    skip_backing: bool,
) -> Result<u64> {
    let path = path(filename)?.to_owned();
    let image = NewImage { format: format.to_owned(), path, options, skip_backing };
    Ok(graph.create_image(image).await?.len)
}

/// The file that an output's name stands for: only files and devices are made.
pub(crate) fn path(filename: &str) -> Result<&Path> {
    if filename.starts_with("json:") {
        let words = "a new image is made in a file: name the file, and with -n what exists already";
        return Err(Error::new(ErrorKind::NotSupported, words).field("name", filename));
    }
    let file = image::protocol(filename)?;
    match file.get("filename") {
        Some(_) => Ok(Path::new(filename.strip_prefix("file:").unwrap_or(filename))),
        None => {
            let words = "nothing can be created there: name a file";
            Err(Error::new(ErrorKind::NotSupported, words).field("name", filename))
        }
    }
}

/// All -o together.
pub(crate) fn format_options(texts: &[String]) -> Result<Options> {
    Options::parse(&texts.join(","))
}

pub(crate) fn wants_help(texts: &[String]) -> bool {
    texts.iter().flat_map(|text| text.split(',')).any(|word| word == "help" || word == "?")
}

/// -b and -F are other words for two options.
pub(crate) fn set_backing(
    options: &mut Options,
    file: Option<&str>,
    format: Option<&str>,
) -> Result<()> {
    for (key, value) in [("backing_file", file), ("backing_fmt", format)] {
        if let Some(value) = value {
            if options.contains(key) {
                return Err(Error::new(ErrorKind::InvalidInput, "the option is given twice")
                    .field("option", key));
            }
            options.set(key, value);
        }
    }
    if options.contains("backing_file") && !options.contains("backing_fmt") {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Backing file specified without backing format: add -F with its format",
        ));
    }
    Ok(())
}

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
fn formatting(driver: &dyn DriverType, filename: &str, given: &Options, size: u64) -> String {
    let mut out = format!("Formatting '{filename}', fmt={}", driver.name());
    let specs = driver.create_options();
    let mut specs: Vec<&OptionSpec> = specs.iter().collect();
    if specs.iter().any(|spec| spec.name == ORDER[0]) {
        specs.sort_by_key(|spec| ORDER.iter().position(|name| *name == spec.name));
    }
    for spec in specs {
        let name = spec.name;
        let value = if name == "size" {
            Some(size.to_string())
        } else {
            given.peek(name).map(|value| printed(spec, value)).or_else(|| default_of(spec))
        };
        if let Some(value) = value {
            out += &format!(" {name}={value}");
        }
    }
    out
}

/// The default, unless qemu-img keeps it to itself.
fn default_of(spec: &OptionSpec) -> Option<String> {
    let is_silent = matches!(spec.name, "compat" | "preallocation" | "nocow" | "extent_size_hint");
    spec.default.filter(|_| !is_silent).map(str::to_owned)
}

fn printed(spec: &OptionSpec, value: &serde_json::Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match spec.kind {
        OptionKind::Size => bds_core::options::parse_size(&text).map_or(text, |n| n.to_string()),
        _ => text,
    }
}

/// What -o understands.
pub(crate) fn help(format: &str, filename: Option<&str>) -> Result<()> {
    let registry = bds_drivers::registry();
    let driver = registry.format(format)?;
    match filename {
        None => println!("Supported {format} options:"),
        Some(_) => println!("Supported options:"),
    }
    let mut specs: Vec<OptionSpec> = driver.create_options().to_vec();
    if let Some(filename) = filename {
        let protocol = registry.driver(image::protocol_of_file(Path::new(filename)))?;
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
        println!("  {left:<22} - {}", spec.help);
    }
    if filename.is_none() {
        println!("\nThe protocol level may support further options.");
        println!("Specify the target filename to include those options.");
    }
    Ok(())
}

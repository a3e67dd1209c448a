//! Builds the options that open an image from its name on the command line: adds protocols, formats
//! and drivers left out.
//!
//! As with QEMU a tree may leave a driver out where it follows from a file name or from the file
//! itself: `driver=qcow2,file.filename=a` is the usual form on command lines. The library requires
//! every driver, because it must not guess.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use bds_core::driver::Category;
use bds_core::graph::Graph;
use bds_core::{Error, ErrorKind, Options, Result};
use serde_json::{Map, Value};

use crate::image_spec::Spec;

/// Returns the options that open an image, with every driver in them.
pub(crate) async fn options(graph: &Graph, spec: &Spec<'_>) -> Result<Options> {
    let mut options = match is_options(spec) {
        true => Options::parse_os(spec.name)?,
        false => of_name(graph, spec)?,
    };
    if let Some(format) = spec.format {
        options.set("driver", known(graph, format)?);
    }
    let Value::Object(mut tree) = options.into_json() else {
        unreachable!("options are an object");
    };
    for child in tree.values_mut() {
        name_protocols(child)?;
    }
    name_format(graph, &mut tree, !spec.flags.read_only).await?;
    // Layers below are only read.
    let mut at = &mut tree;
    while let Some(Value::Object(backing)) = at.get_mut("backing") {
        name_format(graph, backing, false).await?;
        at = backing;
    }
    Options::from_json(Value::Object(tree))
}

fn is_options(spec: &Spec<'_>) -> bool {
    spec.is_options || spec.name.as_bytes().starts_with(b"json:")
}

/// Returns the options for a file name; without a driver if the format has to be guessed.
fn of_name(graph: &Graph, spec: &Spec<'_>) -> Result<Options> {
    let file = protocol(spec.name)?;
    let registry = &graph.config().registry;
    let is_protocol = spec
        .format
        .and_then(|format| registry.driver(format).ok())
        .is_some_and(|driver| driver.category() == Category::Protocol);
    // `-f file`: the bytes of the file itself, without a format above them.
    if is_protocol { Ok(file) } else { Ok(Options::new().with("file", file.into_json())) }
}

/// Checks that a driver exists. The error lists formats only, because the option names a format.
fn known<'a>(graph: &Graph, name: &'a str) -> Result<&'a str> {
    let registry = &graph.config().registry;
    if registry.driver(name).is_err() {
        registry.format(name)?;
    }
    Ok(name)
}

/// Returns the path that a name on the command line means: the prefix `file:` is removed, and what
/// follows is a path in any case.
pub(crate) fn path_of(name: &OsStr) -> PathBuf {
    let bytes = name.as_bytes();
    PathBuf::from(OsStr::from_bytes(bytes.strip_prefix(b"file:").unwrap_or(bytes)))
}

/// Returns a name that [`path_of`] maps back to `path`, whatever characters it holds.
pub(crate) fn file_name(path: &Path) -> OsString {
    let mut name = OsString::from("file:");
    name.push(path);
    name
}

/// Returns the protocol for a file name, as options.
pub(crate) fn protocol(name: &OsStr) -> Result<Options> {
    if let Some(driver @ ("null-co" | "null-aio")) =
        name.to_str().and_then(|name| name.strip_suffix("://"))
    {
        return Ok(Options::new().with("driver", driver));
    }
    let path = path_of(name);
    // As in QEMU: what looks like a URL is one, unless a slash comes first.
    let scheme = name.as_bytes().split(|byte| *byte == b':').next().filter(|scheme| {
        scheme.len() < name.len() && !scheme.contains(&b'/') && *scheme != b"file"
    });
    if let Some(scheme) = scheme
        && !path.exists()
    {
        let (scheme, name) = (String::from_utf8_lossy(scheme), name.display());
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "unknown protocol '{scheme}' (write ./{name} or file:{name} for a file of this name)"
            ),
        ));
    }
    Ok(file(&path))
}

/// Returns the options that open a file or device.
pub(crate) fn file(path: &Path) -> Options {
    let mut options = Options::new().with("driver", protocol_of_file(path));
    options.set_path("filename", path);
    options
}

/// `host_device` for what is a device, `file` for everything else, also for what is missing.
pub(crate) fn protocol_of_file(path: &Path) -> &'static str {
    match std::fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() || meta.file_type().is_char_device() => {
            "host_device"
        }
        _ => "file",
    }
}

/// Adds the protocol wherever a tree names a file without a driver. Trees are of bounded depth.
fn name_protocols(value: &mut Value) -> Result<()> {
    let Value::Object(tree) = value else { return Ok(()) };
    let options = Options::from_json(Value::Object(tree.clone()))?;
    if let (false, Some(name)) = (tree.contains_key("driver"), options.peek_path("filename")) {
        let Value::Object(found) = protocol(name.as_os_str())?.into_json() else { return Ok(()) };
        tree.shift_remove("filename");
        tree.extend(found);
    }
    tree.values_mut().try_for_each(name_protocols)
}

/// Adds the format of an image if it was left out, guessed from the file.
async fn name_format(graph: &Graph, tree: &mut Map<String, Value>, is_writing: bool) -> Result<()> {
    if tree.contains_key("driver") {
        return Ok(());
    }
    let options = Options::from_json(Value::Object(tree.clone()))?;
    let format = guess(graph, &options, is_writing).await?;
    tree.insert("driver".to_owned(), format.into());
    Ok(())
}

/// Guesses the format of the file that `options` name.
async fn guess(graph: &Graph, options: &Options, is_writing: bool) -> Result<&'static str> {
    let Some(path) = options.peek_path("file.filename") else {
        return match options.peek("file.driver") {
            // A protocol without a file stores nothing that could have a format.
            Some(_) => Ok("raw"),
            None => Err(Error::new(
                ErrorKind::InvalidInput,
                "the format is not given and there is no file to guess it from: add driver=…",
            )),
        };
    };
    let found = graph.guess_file(&path).await?;
    match found.best()? {
        "raw" if is_writing => Err(Error::new(
            ErrorKind::InvalidInput,
            "the format was not given and looks like raw, which is never guessed for writing: \
             the VM that wrote the image may have chosen its first bytes; if it is raw, say -f raw",
        )),
        format => Ok(format),
    }
}

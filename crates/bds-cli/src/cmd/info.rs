//! `info`: prints what is known about an image, without opening the files it names.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use bds_core::driver::{ImageInfo, OpenFlags, ReferenceKind};
use bds_core::graph::{NodeRef, reference_gate, walk};
use bds_core::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};

use crate::args::{Info, Output};
use crate::human_size::human_size;
use crate::image;
use crate::image_options;
use crate::image_spec::Spec;
use crate::printer;

/// Facts about one image.
struct Facts {
    filename: String,
    format: &'static str,
    virtual_len: u64,
    allocated: Option<u64>,
    info: ImageInfo,
    /// The resolved path of the backing file; `info` has it as the image stores it.
    backing_path: Option<PathBuf>,
    file: Option<FileFacts>,
    identity: Option<(u64, u64)>,
}

/// Facts about the file of an image.
struct FileFacts {
    filename: String,
    driver: &'static str,
    len: u64,
    allocated: Option<u64>,
}

pub(crate) fn run(args: &Info) -> Result<()> {
    let mut spec = Spec::read(&args.filename, &args.source)?;
    // Reads the header; takes no locks, so that an image in use can be looked at.
    spec.flags = OpenFlags { info_only: true, ..spec.flags };
    let images = image::block_on(gather(&spec, args.backing_chain))?;
    match (args.output, args.backing_chain) {
        (Output::Json, true) => printer::json(&images.iter().map(Facts::json).collect()),
        (Output::Json, false) => printer::json(&images[0].json()),
        (Output::Human, _) => {
            let texts: Vec<String> = images.iter().map(Facts::human).collect();
            printer::text(&texts.join("\n"))
        }
    }
}

/// Collects the facts of the image, and of its backing chain if `with_chain`. At least one.
async fn gather(top: &Spec<'_>, with_chain: bool) -> Result<Vec<Facts>> {
    let graph = image::trusting_graph();
    let mut images = vec![inspect(image::open(&graph, top).await?, top).await?];
    let mut seen: HashSet<(u64, u64)> = images[0].identity.into_iter().collect();
    if !with_chain {
        return Ok(images);
    }
    while let Some(path) = images.last().and_then(|last| last.backing_path.clone()) {
        // Prefixed, because a stored name is a file name, whatever it looks like.
        let typed = image_options::file_name(&path);
        let format = images.last().and_then(|last| last.info.backing_format.clone());
        let spec =
            Spec { name: &typed, is_options: false, format: format.as_deref(), flags: top.flags };
        let image = inspect(image::open(&graph, &spec).await?, &spec).await?;
        if image.identity.is_some_and(|id| !seen.insert(id)) {
            return Err(Error::new(
                ErrorKind::InvalidImage,
                format!("Backing file '{}' creates an infinite loop.", path.display()),
            ));
        }
        images.push(image);
    }
    Ok(images)
}

/// Collects the facts of an image and closes it.
async fn inspect(node: NodeRef, spec: &Spec<'_>) -> Result<Facts> {
    let facts = facts(&node, spec).await;
    node.close().await?.into_result()?;
    facts
}

async fn facts(node: &NodeRef, spec: &Spec<'_>) -> Result<Facts> {
    let backend = image::backend(node, false)?;
    let info = backend.info().await?;
    let own_path = walk::filename(node);
    let backing_path = info
        .backing_file
        .as_deref()
        .map(|stored| reference_gate::resolve(ReferenceKind::Backing, stored, own_path.as_deref()));
    let file = match walk::child(node, "file") {
        None => None,
        Some((file, _)) => {
            let below = image::backend(&file, false)?;
            Some(FileFacts {
                filename: match walk::filename(&file) {
                    Some(path) => path.to_string_lossy().into_owned(),
                    None => format!("{}://", file.driver_name()),
                },
                driver: file.driver_name(),
                len: file.len(),
                allocated: below.allocated_len().await?,
            })
        }
    };
    Ok(Facts {
        filename: shown_name(own_path.as_deref(), spec),
        format: node.driver_name(),
        virtual_len: node.len(),
        allocated: backend.allocated_len().await?,
        identity: walk::identity(node),
        info,
        backing_path,
        file,
    })
}

/// The name as QEMU shows it: the file's, if it lies in one, with a directory where it would look
/// like a protocol. JSON has no bytes that are not UTF-8, so there they become U+FFFD.
fn shown_name(file: Option<&Path>, spec: &Spec<'_>) -> String {
    let name = file.map_or(spec.name, Path::as_os_str).to_string_lossy();
    let begin = name.split('/').next().unwrap_or_default();
    if file.is_some() && begin.contains(':') { format!("./{name}") } else { name.into_owned() }
}

impl Facts {
    fn human(&self) -> String {
        let Self { info, .. } = self;
        let mut out = format!("image: {}\nfile format: {}\n", self.filename, self.format);
        out += &format!("virtual size: {}\n", size_with_bytes(self.virtual_len));
        out += &format!("disk size: {}\n", size_or_unavailable(self.allocated));
        if info.is_encrypted {
            out += "encrypted: yes\n";
        }
        if let Some(bytes) = info.cluster_size {
            out += &format!("cluster_size: {bytes}\n");
        }
        if info.is_dirty {
            out += "cleanly shut down: no\n";
        }
        if let Some(stored) = &info.backing_file {
            out += &format!("backing file: {}", stored.display());
            match &self.backing_path {
                Some(path) if path.as_path() != Path::new(stored) => {
                    out += &format!(" (actual path: {})", path.display());
                }
                _ => {}
            }
            out += "\n";
        }
        if let Some(format) = &info.backing_format {
            out += &format!("backing file format: {format}\n");
        }
        out += &snapshots(&info.snapshots);
        if let Some(data) = info.format_specific.as_ref().and_then(|s| s["data"].as_object()) {
            out += "Format specific information:\n";
            members(data, 4, &mut out);
        }
        if !info.logged_bitmaps.is_empty() {
            member(
                "Bitmaps in the file beside the image",
                &json!(info.logged_bitmaps),
                0,
                &mut out,
            );
        }
        if let Some(file) = &self.file {
            out += "Child node '/file':\n";
            out += &format!("    filename: {}\n", file.filename);
            out += &format!("    protocol type: {}\n", file.driver);
            out += &format!("    file length: {}\n", size_with_bytes(file.len));
            out += &format!("    disk size: {}\n", size_or_unavailable(file.allocated));
        }
        out
    }

    fn json(&self) -> Value {
        let Self { info, .. } = self;
        let mut out = Map::new();
        let mut set = |key: &str, value: Value| {
            out.insert(key.to_owned(), value);
        };
        set("children", self.file.iter().map(FileFacts::json).collect());
        if let Some(format) = &info.backing_format {
            set("backing-filename-format", json!(format));
        }
        set("virtual-size", json!(self.virtual_len));
        set("filename", json!(self.filename));
        if let Some(bytes) = info.cluster_size {
            set("cluster-size", json!(bytes));
        }
        set("format", json!(self.format));
        if let Some(bytes) = self.allocated {
            set("actual-size", json!(bytes));
        }
        if info.is_encrypted {
            set("encrypted", json!(true));
        }
        if !info.snapshots.is_empty() {
            set("snapshots", json!(info.snapshots));
        }
        if !info.logged_bitmaps.is_empty() {
            set("bitmap-log", json!(info.logged_bitmaps));
        }
        if let Some(specific) = &info.format_specific {
            set("format-specific", specific.clone());
        } else if matches!(self.format, "file" | "host_device") {
            set("format-specific", json!({"type": self.format, "data": {}}));
        }
        if let (Some(stored), Some(path)) = (&info.backing_file, &self.backing_path) {
            set("full-backing-filename", json!(path.to_string_lossy()));
            set("backing-filename", json!(stored.to_string_lossy()));
        }
        set("dirty-flag", json!(info.is_dirty));
        Value::Object(out)
    }
}

impl FileFacts {
    fn json(&self) -> Value {
        let mut info = json!({
            "children": [],
            "virtual-size": self.len,
            "filename": self.filename,
            "format": self.driver,
        });
        if let Some(bytes) = self.allocated {
            info["actual-size"] = json!(bytes);
        }
        info["format-specific"] = json!({"type": "file", "data": {}});
        info["dirty-flag"] = json!(false);
        json!({"name": "file", "info": info})
    }
}

fn size_with_bytes(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human_size(bytes))
}

fn size_or_unavailable(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unavailable".to_owned(), human_size)
}

/// An object's members, one a line, nested ones indented.
fn members(object: &Map<String, Value>, indent: usize, out: &mut String) {
    for (key, value) in object {
        member(&key.replace('-', " "), value, indent, out);
    }
}

fn member(name: &str, value: &Value, indent: usize, out: &mut String) {
    *out += &format!("{:indent$}{name}:", "");
    match value {
        Value::Object(inner) => {
            out.push('\n');
            members(inner, indent + 4, out);
        }
        Value::Array(items) => {
            out.push('\n');
            for (number, item) in items.iter().enumerate() {
                member(&format!("[{number}]"), item, indent + 4, out);
            }
        }
        Value::String(text) => *out += &format!(" {text}\n"),
        other => *out += &format!(" {other}\n"),
    }
}

/// The table of internal snapshots.
fn snapshots(list: &[Value]) -> String {
    if list.is_empty() {
        return String::new();
    }
    let mut out = format!(
        "Snapshot list:\n{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for one in list {
        let number = |key: &str| one[key].as_u64().unwrap_or(0);
        let word = |key: &str| one[key].as_str().unwrap_or_default().to_owned();
        let clock_ms = number("vm-clock-nsec") / 1_000_000;
        let seconds = number("vm-clock-sec");
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            clock_ms
        );
        let icount = one["icount"].as_u64().map_or_else(|| "--".to_owned(), |n| n.to_string());
        out += &format!(
            "{:<7} {:<16} {:>8} {:>19} {clock:>15} {icount:>10}\n",
            word("id"),
            word("name"),
            human_size(number("vm-state-size")),
            utc(number("date-sec")),
        );
    }
    out
}

/// Seconds since 1970 as "2026-11-23 04:00:00" (UTC: the tool reads no time zone files).
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// Year, month and day of a day number since 1970-01-01, counted in years that begin in March, so
/// that the leap day is the last.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_converted_to_dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_700_000_000, "2023-11-14 22:13:20"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}

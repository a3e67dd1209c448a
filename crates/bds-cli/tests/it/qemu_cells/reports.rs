//! Reads the reports of both tools about one image and removes offsets and names from them, to
//! compare the rest.

use std::path::Path;

use bds_testkit::{Output, Tool};
use serde_json::{Value, json};

use super::script::Bytes;
use crate::programs::{Tools, count, outcome_line, text};

/// Answers of one tool about one image.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Facts {
    pub(crate) info: Value,
    pub(crate) map: Value,
    pub(crate) check: Value,
}

impl Facts {
    /// Asks a tool that talks like qemu-img.
    pub(crate) fn read(tool: &Tool, image: &Path) -> Result<Self, String> {
        let run = |verb: &str| {
            let output = tool.run([verb, "-f", "qcow2", "--output=json", text(image)]);
            value(&output).ok_or_else(|| format!("{verb}: {}", outcome_line(&output)))
        };
        Ok(Self { info: rounded(run("info")?), map: run("map")?, check: run("check")? })
    }

    /// Asks both about the same image; the differences, by verb.
    pub(crate) fn compare(
        tools: &Tools,
        image: &Path,
        model: &Bytes,
    ) -> Result<(Self, Vec<String>), String> {
        let theirs = Self::read(&tools.img, image).map_err(|e| format!("qemu-img {e}"))?;
        let ours = Self::read(&tools.bds, image).map_err(|e| format!("bds {e}"))?;
        let lies = [&ours, &theirs].into_iter().flat_map(Self::zeros);
        let lies = lies.filter(|(at, len)| !model.is_zero(*at, *len));
        let lies = lies.map(|(at, len)| format!("map: {len} bytes at {at} are not zeros"));
        let differences = [
            ("info", &ours.info, &theirs.info),
            ("map", &ours.plain_map(), &theirs.plain_map()),
            ("check", &ours.check, &theirs.check),
        ]
        .into_iter()
        .flat_map(|(verb, ours, theirs)| difference(verb, ours, theirs))
        .chain(lies)
        .collect();
        Ok((theirs, differences))
    }

    /// Errors and leaks that the check counts.
    pub(crate) fn faults(&self) -> Vec<String> {
        ["corruptions", "leaks", "check-errors"]
            .into_iter()
            .filter(|key| count(&self.check, key) > 0)
            .map(|key| format!("{key}: {}", self.check[key]))
            .collect()
    }

    /// The map without what each side finds out about holes of the file under allocated clusters.
    /// Both say "zero" of some of them, by estimates of their own; that it is true is checked
    /// against the model.
    fn plain_map(&self) -> Value {
        let mut plain = Vec::new();
        for entry in entries(&self.map) {
            let mut entry = entry.clone();
            if entry["data"] == json!(true) {
                entry["zero"] = json!(false);
            }
            push(&mut plain, entry, true);
        }
        Value::Array(plain)
    }

    /// The same without places (two images of the same history may lay their clusters out
    /// differently) and without the difference between zeros by an entry and zeros because nothing
    /// is there (see docs/differences.md).
    pub(crate) fn shape(&self) -> Value {
        let mut shape = Vec::new();
        for entry in entries(&self.plain_map()) {
            let mut entry = entry.clone();
            let has_offset = entry.as_object_mut().and_then(|e| e.remove("offset")).is_some();
            entry["placed"] = json!(has_offset);
            if entry["zero"] == json!(true) {
                entry["present"] = json!(true);
                // In a raw data file the place of a cluster never changes, whether the entry keeps
                // it or not.
                entry["placed"] = json!(has_offset && !self.has_raw_data_file());
            }
            push(&mut shape, entry, false);
        }
        Value::Array(shape)
    }

    fn has_raw_data_file(&self) -> bool {
        self.info.pointer("/format-specific/data/data-file-raw") == Some(&json!(true))
    }

    /// Ranges that the map calls zero.
    pub(crate) fn zeros(&self) -> Vec<(u64, u64)> {
        entries(&self.map)
            .filter(|entry| entry["zero"] == json!(true))
            .map(|entry| (number(entry, "start"), number(entry, "length")))
            .collect()
    }

    /// What is known of the image apart from its name, its files' names and the space it takes.
    pub(crate) fn nature(&self) -> Value {
        let mut info = self.info.clone();
        if let Some(members) = info.as_object_mut() {
            for key in
                ["children", "filename", "actual-size", "backing-filename", "full-backing-filename"]
            {
                members.remove(key);
            }
        }
        if let Some(name) = info.pointer_mut("/format-specific/data/data-file") {
            *name = json!("its data file");
        }
        info
    }
}

/// Lengths of files: bds tells them exactly, qemu-img in whole sectors.
fn rounded(mut info: Value) -> Value {
    for child in info["children"].as_array_mut().into_iter().flatten() {
        let len = number(&child["info"], "virtual-size").next_multiple_of(512);
        child["info"]["virtual-size"] = json!(len);
    }
    info
}

fn entries(map: &Value) -> impl Iterator<Item = &Value> {
    map.as_array().into_iter().flatten()
}

/// Adds an entry, or lengthens the last one if it only goes on.
fn push(map: &mut Vec<Value>, next: Value, with_places: bool) {
    if let Some(last) = map.last_mut() {
        let is_same = ["depth", "present", "zero", "data", "compressed", "placed"]
            .into_iter()
            .all(|key| last[key] == next[key]);
        let len = number(last, "length");
        let has_place = next.get("offset").is_some();
        let follows = has_place == last.get("offset").is_some()
            && (!has_place || number(last, "offset") + len == number(&next, "offset"));
        if is_same && (follows || !with_places) {
            last["length"] = json!(len + number(&next, "length"));
            return;
        }
    }
    map.push(next);
}

#[track_caller]
fn number(entry: &Value, key: &str) -> u64 {
    entry[key].as_u64().unwrap_or_else(|| panic!("'{key}' is no number in {entry}"))
}

fn value(output: &Output) -> Option<Value> {
    serde_json::from_str(&output.stdout).ok()
}

/// Returns a line for each place where two values differ.
pub(crate) fn difference(what: &str, ours: &Value, theirs: &Value) -> Vec<String> {
    match (ours, theirs) {
        _ if ours == theirs => Vec::new(),
        (Value::Object(a), Value::Object(b)) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            keys.flat_map(|key| difference(&format!("{what}/{key}"), &ours[key], &theirs[key]))
                .collect()
        }
        (Value::Array(a), Value::Array(b)) => {
            let at = (0..).find(|&n| a.get(n) != b.get(n)).unwrap_or(0);
            let [mine, other] = [a, b].map(|list| list.get(at).unwrap_or(&Value::Null));
            vec![format!("{what}[{at}]: ours {mine}, theirs {other}")]
        }
        _ => vec![format!("{what}: ours {ours}, theirs {theirs}")],
    }
}

//! Parses and prints options as text: `key=value,…` and `json:{…}`; nests flat keys into trees.
//!
//! All sizes are bounded: the text by [`MAX_TEXT_LEN`], the tree by [`MAX_DEPTH`] (which JSON's own
//! limit of 128 already keeps from exhausting the stack while it is parsed).

use serde_json::{Map, Value};

use super::{MAX_DEPTH, MAX_TEXT_LEN, Options, json, path};
use crate::error::{Error, ErrorKind, Result};

/// Longest part of a key between dots, in bytes.
const MAX_PART_LEN: usize = 127;
/// Longest list.
const MAX_LIST_LEN: usize = 4096;

pub(super) fn parse(text: &[u8]) -> Result<Options> {
    if text.len() > MAX_TEXT_LEN {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!("options are longer than {MAX_TEXT_LEN} bytes"),
        ));
    }
    let json = text.strip_prefix(b"json:");
    if let Some(json) = json.or_else(|| Some(text).filter(|text| text.starts_with(b"{"))) {
        let json = std::str::from_utf8(json).map_err(|error| {
            Error::new(ErrorKind::InvalidInput, "options in JSON must be UTF-8").caused_by(error)
        })?;
        let value = json::parse(json).map_err(|error| {
            Error::new(ErrorKind::InvalidInput, "cannot parse json: options").caused_by(error)
        })?;
        return Options::from_json(value);
    }
    let mut flat = Map::new();
    for (key, value) in key_values(text) {
        let key = String::from_utf8(key).map_err(|error| {
            Error::new(ErrorKind::InvalidInput, "the name of an option must be UTF-8")
                .caused_by(error)
        })?;
        if key.is_empty() {
            return Err(bad_key("an option has no name; write key=value", &key));
        }
        // As in QEMU the last one wins: an editor of command lines appends.
        flat.insert(key, path::from_bytes(&value));
    }
    Ok(Options { map: nest(flat)? })
}

/// Splits at commas that are not doubled; in values, doubled commas become single ones.
fn key_values(text: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let place = |text: &[u8], wanted: &[u8]| {
        text.iter().position(|byte| wanted.contains(byte)).unwrap_or(text.len())
    };
    let mut pairs = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (key, after) = rest.split_at(place(rest, b"=,"));
        let Some(mut value_text) = after.strip_prefix(b"=") else {
            pairs.push((key.to_vec(), b"on".to_vec()));
            rest = after.strip_prefix(b",").unwrap_or_default();
            continue;
        };
        let mut value = Vec::new();
        rest = loop {
            let (part, more) = value_text.split_at(place(value_text, b","));
            value.extend_from_slice(part);
            match more.strip_prefix(b",,") {
                Some(more) => {
                    value.push(b',');
                    value_text = more;
                }
                None => break more.strip_prefix(b",").unwrap_or_default(),
            }
        };
        pairs.push((key.to_vec(), value));
    }
    pairs
}

/// Makes flat keys into trees and groups of numbered keys into lists.
pub(super) fn nest(flat: Map<String, Value>) -> Result<Map<String, Value>> {
    let mut tree = Map::new();
    for (key, value) in flat {
        insert(&mut tree, &key, &key, value, 1)?;
    }
    // Top-level keys are names, never numbers, so only what is inside can be a list.
    for value in tree.values_mut() {
        make_lists(value)?;
    }
    Ok(tree)
}

fn insert(
    map: &mut Map<String, Value>,
    whole: &str,
    path: &str,
    value: Value,
    depth: usize,
) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(too_deep());
    }
    let (part, rest) = path.split_once('.').map_or((path, None), |(part, rest)| (part, Some(rest)));
    if part.is_empty() || part.len() > MAX_PART_LEN {
        return Err(bad_key("an option's name has an empty or overlong part", whole));
    }
    if let Some(rest) = rest {
        let slot = map.entry(part).or_insert_with(|| Value::Object(Map::new()));
        return match slot {
            Value::Object(group) => insert(group, whole, rest, value, depth + 1),
            _ => Err(both(part)),
        };
    }
    match (map.get_mut(part), value) {
        (None, Value::Object(group)) => {
            let group = nest_group(group, whole, depth)?;
            map.insert(part.to_owned(), Value::Object(group));
        }
        (None, value) => {
            check_depth(&value, depth)?;
            map.insert(part.to_owned(), value);
        }
        (Some(Value::Object(known)), Value::Object(group)) => {
            for (key, value) in group {
                insert(known, whole, &key, value, depth + 1)?;
            }
        }
        (Some(_), _) => return Err(both(part)),
    }
    Ok(())
}

fn nest_group(group: Map<String, Value>, whole: &str, depth: usize) -> Result<Map<String, Value>> {
    let mut tree = Map::new();
    for (key, value) in group {
        insert(&mut tree, whole, &key, value, depth + 1)?;
    }
    Ok(tree)
}

fn check_depth(value: &Value, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(too_deep());
    }
    match value {
        Value::Array(items) => items.iter().try_for_each(|item| check_depth(item, depth + 1)),
        Value::Object(map) => map.values().try_for_each(|item| check_depth(item, depth + 1)),
        _ => Ok(()),
    }
}

/// A group whose keys are 0, 1, 2 … is a list.
fn make_lists(value: &mut Value) -> Result<()> {
    let Value::Object(map) = value else { return Ok(()) };
    for inner in map.values_mut() {
        make_lists(inner)?;
    }
    let is_list = map.keys().all(|key| key.bytes().all(|b| b.is_ascii_digit()));
    if map.is_empty() || !is_list {
        return Ok(());
    }
    if map.len() > MAX_LIST_LEN {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!("a list has more than {MAX_LIST_LEN} entries"),
        ));
    }
    let mut list = Vec::with_capacity(map.len());
    for index in 0..map.len() {
        match map.get_mut(index.to_string().as_str()) {
            Some(item) => list.push(item.take()),
            None => return Err(bad_key("a list lacks an index", &index.to_string())),
        }
    }
    *value = Value::Array(list);
    Ok(())
}

pub(super) fn print(map: &Map<String, Value>) -> String {
    let mut out = String::new();
    for (key, value) in map {
        print_value(&mut out, key, value);
    }
    out
}

fn print_value(out: &mut String, path: &str, value: &Value) {
    let leaf = match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, inner)| print_value(out, &format!("{path}.{key}"), inner));
            return;
        }
        Value::Array(items) => {
            items
                .iter()
                .enumerate()
                .for_each(|(index, inner)| print_value(out, &format!("{path}.{index}"), inner));
            return;
        }
        Value::Null => return,
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::String(text) => text.replace(',', ",,"),
        Value::Number(number) => number.to_string(),
    };
    if !out.is_empty() {
        out.push(',');
    }
    out.push_str(path);
    out.push('=');
    out.push_str(&leaf);
}

fn bad_key(message: &str, key: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, message).field("key", key)
}

fn both(part: &str) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("option '{part}' is given twice, or both as a value and as a group"),
    )
}

fn too_deep() -> Error {
    Error::new(
        ErrorKind::LimitExceeded,
        format!("options are nested more than {MAX_DEPTH} levels deep"),
    )
}

//! QAPI-style options: a tree of names and values, from JSON or from `key=value,…`.
//!
//! Each layer takes out the keys it knows; keys left at the end are refused by name, so that no
//! option is silently ignored. A key can be taken by path (`cache.direct`) whether it was given
//! flat or nested.
//!
//! Invariant: a tree is at most [`MAX_DEPTH`] levels deep, whatever it was made from.

mod json;
mod path;
mod text;

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

/// Deepest nesting of option trees.
pub const MAX_DEPTH: usize = 64;
/// Longest text that is parsed, in bytes.
pub const MAX_TEXT_LEN: usize = 1 << 20;

/// A tree of options. Keys are taken out as they are understood.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    map: Map<String, Value>,
}

/// Type of an option's value, for help texts and checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionKind {
    /// Any text.
    String,
    /// on/off, true/false, yes/no.
    Bool,
    /// A number.
    Number,
    /// Bytes, with suffix k, M, G, T, P, E.
    Size,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A child: a node name or a nested tree.
    Child,
}

impl fmt::Display for OptionKind {
    /// The placeholder in help texts: "text", "on|off", "number", "size", "node", or the words of a
    /// choice.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::String => f.write_str("text"),
            Self::Bool => f.write_str("on|off"),
            Self::Number => f.write_str("number"),
            Self::Size => f.write_str("size"),
            Self::Choice(words) => f.write_str(&words.join("|")),
            Self::Child => f.write_str("node"),
        }
    }
}

/// Describes an option of a driver.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its name, as QEMU spells it.
    pub name: &'static str,
    /// Type of its value.
    pub kind: OptionKind,
    /// One line of help.
    pub help: &'static str,
    /// Its default as text, if it has one.
    pub default: Option<&'static str>,
}

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// From a JSON object. Keys with dots are nested (`{"file.driver": …}` is `{"file": {"driver":
    /// …}}`).
    pub fn from_json(value: Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map: text::nest(map)? }),
            other => Err(Error::new(ErrorKind::InvalidInput, "options must be a JSON object")
                .field("options", other)),
        }
    }

    /// From `key=value,key.sub=value,…` (a comma in a value is written twice, `list.0=…` makes a
    /// list, a key without a value is `on`), from `json:{…}` or from `{…}`, where as in QEMU
    /// strings may stand in single quotes. Values from the first form are text; takers convert.
    pub fn parse(text: &str) -> Result<Self> {
        text::parse(text.as_bytes())
    }

    /// As [`Options::parse`], from a text that may name files that are not UTF-8. Only values in
    /// the form `key=value` can be such names.
    pub fn parse_os(text: &OsStr) -> Result<Self> {
        text::parse(text.as_encoded_bytes())
    }

    /// As `key=value,…`, which [`Options::parse`] reads back, except that every value becomes text
    /// there and that empty groups, empty lists and nulls, which the form cannot say, are left out.
    pub fn to_text(&self) -> String {
        text::print(&self.map)
    }

    /// Sets a value (builder style).
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.map.insert(key.to_owned(), value.into());
        self
    }

    /// Sets a value.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.map.insert(key.to_owned(), value.into());
    }

    /// True if the key is there. `a.b` looks into the group `a`.
    pub fn contains(&self, key: &str) -> bool {
        self.peek(key).is_some()
    }

    /// Returns a value without taking it. `a.b` looks into the group `a`.
    pub fn peek(&self, key: &str) -> Option<&Value> {
        if let Some(value) = self.map.get(key) {
            return Some(value);
        }
        let mut parts = key.split('.');
        let first = self.map.get(parts.next()?)?;
        parts.try_fold(first, |value, part| value.as_object()?.get(part))
    }

    /// Takes any value. `a.b` takes `b` out of the group `a`, and the group too once it is empty.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        take_path(&mut self.map, key)
    }

    /// Takes a child: the name of a node, a tree that describes one, or an explicit null.
    pub fn take_child(&mut self, key: &'static str) -> Result<Option<ChildOption>> {
        self.take(key).map(|value| ChildOption::from_json(key, value)).transpose()
    }

    /// Takes one of a few words; the error lists them.
    pub fn take_choice<T: Copy>(
        &mut self,
        key: &'static str,
        words: &[(&str, T)],
    ) -> Result<Option<T>> {
        let Some(word) = self.take_str(key)? else { return Ok(None) };
        match words.iter().find(|(known, _)| *known == word) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let known: Vec<&str> = words.iter().map(|(known, _)| *known).collect();
                Err(wrong(key, &format!("one of {}", known.join(", ")), &Value::String(word)))
            }
        }
    }

    /// Takes text (numbers and booleans are refused by name).
    pub fn take_str(&mut self, key: &'static str) -> Result<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong(key, "text", &other)),
        }
    }

    /// Sets a file name, whatever bytes it holds.
    pub fn set_path(&mut self, key: &str, path: impl AsRef<Path>) {
        self.set(key, path::to_json(path.as_ref()));
    }

    /// Takes a file name.
    pub fn take_path(&mut self, key: &'static str) -> Result<Option<PathBuf>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        path::from_json(&value).map(Some).ok_or_else(|| wrong(key, "a file name", &value))
    }

    /// Returns a file name without taking it; `None` also if the value is none.
    pub fn peek_path(&self, key: &str) -> Option<PathBuf> {
        path::from_json(self.peek(key)?)
    }

    /// Takes a boolean: true/false, or the words on/off/yes/no/true/false.
    pub fn take_bool(&mut self, key: &'static str) -> Result<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(Value::String(s)) => match s.as_str() {
                "on" | "yes" | "true" => Ok(Some(true)),
                "off" | "no" | "false" => Ok(Some(false)),
                _ => Err(wrong(key, "on or off", &Value::String(s))),
            },
            Some(other) => Err(wrong(key, "on or off", &other)),
        }
    }

    /// Takes an unsigned number; text of digits is accepted.
    pub fn take_u64(&mut self, key: &'static str) -> Result<Option<u64>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Number(n)) if n.is_u64() => Ok(n.as_u64()),
            Some(Value::String(s)) => match parse_number(&s) {
                Some(n) => Ok(Some(n)),
                None => Err(wrong(key, "a number", &Value::String(s))),
            },
            Some(other) => Err(wrong(key, "a number", &other)),
        }
    }

    /// Takes a size in bytes: a number, or text with an optional suffix b, k, M, G, T, P, E (powers
    /// of 1024).
    pub fn take_size(&mut self, key: &'static str) -> Result<Option<u64>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Number(n)) if n.is_u64() => Ok(n.as_u64()),
            Some(Value::String(s)) => match parse_size(&s) {
                Some(n) => Ok(Some(n)),
                None => Err(wrong(key, "a size like 64k or 10G", &Value::String(s))),
            },
            Some(other) => Err(wrong(key, "a size like 64k or 10G", &other)),
        }
    }

    /// The keys that were not taken.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// Back to JSON.
    pub fn into_json(self) -> Value {
        Value::Object(self.map)
    }

    /// Refuses keys that were not taken, naming the first one. `owner` names what does not know it.
    pub fn finish(self, owner: &str) -> Result<()> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(key) => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{owner} does not know the option '{key}'"),
            )),
        }
    }
}

/// Describes a child: by name or by a tree of options.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ChildOption {
    /// The name of a node that is open already.
    Node(String),
    /// A node to be opened.
    Tree(Options),
    /// Explicitly none.
    None,
}

impl ChildOption {
    /// From an option's value; `key` names it in the error.
    pub fn from_json(key: &'static str, value: Value) -> Result<Self> {
        match value {
            // An empty value is null on a command line.
            Value::String(name) if name.is_empty() && key == "backing" => Ok(Self::None),
            Value::String(name) => Ok(Self::Node(name)),
            Value::Object(_) => Ok(Self::Tree(Options::from_json(value)?)),
            Value::Null => Ok(Self::None),
            other => Err(wrong(key, "a node name or a description of a node", &other)),
        }
    }
}

fn take_path(map: &mut Map<String, Value>, key: &str) -> Option<Value> {
    // `shift_remove` keeps the order of the rest, so that errors name the first key in the user's
    // order.
    if let Some(value) = map.shift_remove(key) {
        return Some(value);
    }
    let (group, rest) = key.split_once('.')?;
    let inner = map.get_mut(group)?.as_object_mut()?;
    let value = take_path(inner, rest)?;
    if inner.is_empty() {
        map.shift_remove(group);
    }
    Some(value)
}

/// A number from text: digits, or hexadecimal ones behind `0x`.
pub fn parse_number(text: &str) -> Option<u64> {
    let is_all = |digits: &str, radix: u32| digits.chars().all(|c| c.is_digit(radix));
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if is_all(hex, 16) => u64::from_str_radix(hex, 16).ok(),
        None if is_all(text, 10) => text.parse().ok(),
        _ => None,
    }
}

/// Bytes from text: hexadecimal digits behind `0x`, or digits, an optional fraction, an optional
/// suffix b, k, M, G, T, P, E (either case; powers of 1024). `None` as well for what is no whole
/// number of bytes: "93.1" was meant as something larger.
pub fn parse_size(text: &str) -> Option<u64> {
    if text.starts_with("0x") || text.starts_with("0X") {
        return parse_number(text);
    }
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, suffix) = text.split_at(split);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let unit = 1u128 << shift;
    let whole: u128 = match whole {
        "" if !fraction.is_empty() => 0,
        digits => digits.parse().ok()?,
    };
    let fraction = match fraction {
        "" => 0,
        f if f.len() <= 18 && f.bytes().all(|digit| digit.is_ascii_digit()) && shift > 0 => {
            let parts = 10u128.pow(u32::try_from(f.len()).ok()?);
            let bytes = f.parse::<u128>().ok()? * unit;
            if !bytes.is_multiple_of(parts) {
                return None;
            }
            bytes / parts
        }
        _ => return None,
    };
    u64::try_from(whole.checked_mul(unit)?.checked_add(fraction)?).ok()
}

pub(crate) fn wrong(key: &'static str, wanted: &str, found: &Value) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("option '{key}' wants {wanted}")).field(key, found)
}

#[cfg(test)]
mod tests;

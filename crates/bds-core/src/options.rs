//! QAPI-style options: a tree of names and values, from JSON or from `key=value,…`.
//!
//! Whoever understands a key takes it out; what is left at the end is refused by name, so that no option is
//! ever ignored in silence.

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

/// A tree of options, consumed as it is understood.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    map: Map<String, Value>,
}

/// What kind of value an option takes, for help texts and checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// One option a driver knows.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its name, as QEMU spells it.
    pub name: &'static str,
    /// What it takes.
    pub kind: OptionKind,
    /// One line for a person.
    pub help: &'static str,
    /// Its default as text, if it has one.
    pub default: Option<&'static str>,
}

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// From a JSON object.
    pub fn from_json(value: Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map }),
            other => Err(Error::new(ErrorKind::InvalidInput, "options must be a JSON object")
                .field("options", other)),
        }
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

    /// Is the key there?
    pub fn contains(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Looks without taking.
    pub fn peek(&self, key: &str) -> Option<&Value> {
        self.map.get(key)
    }

    /// Takes any value.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key)
    }

    /// Takes text (numbers and booleans are refused by name).
    pub fn take_str(&mut self, key: &'static str) -> Result<Option<String>> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong(key, "text", &other)),
        }
    }

    /// Takes a boolean: true/false, or the words on/off/yes/no/true/false.
    pub fn take_bool(&mut self, key: &'static str) -> Result<Option<bool>> {
        match self.map.remove(key) {
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
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::Number(n)) if n.is_u64() => Ok(n.as_u64()),
            Some(Value::String(s)) => match s.parse() {
                Ok(n) => Ok(Some(n)),
                Err(_) => Err(wrong(key, "a number", &Value::String(s))),
            },
            Some(other) => Err(wrong(key, "a number", &other)),
        }
    }

    /// Takes a size in bytes: a number, or text with an optional suffix b, k, M, G, T, P, E (powers of 1024).
    pub fn take_size(&mut self, key: &'static str) -> Result<Option<u64>> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::Number(n)) if n.is_u64() => Ok(n.as_u64()),
            Some(Value::String(s)) => match parse_size(&s) {
                Some(n) => Ok(Some(n)),
                None => Err(wrong(key, "a size like 64k or 10G", &Value::String(s))),
            },
            Some(other) => Err(wrong(key, "a size like 64k or 10G", &other)),
        }
    }

    /// The keys that nobody took.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// Back to JSON.
    pub fn into_json(self) -> Value {
        Value::Object(self.map)
    }

    /// Refuses what nobody took, by name.
    pub fn finish(self, who: &str) -> Result<()> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(key) => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{who} does not know the option '{key}'"),
            )),
        }
    }
}

/// Bytes from text: digits, an optional fraction, an optional suffix b, k, M, G, T, P, E (either case; powers of 1024).
pub fn parse_size(text: &str) -> Option<u64> {
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
    let whole: u128 = whole.parse().ok()?;
    let fraction = match fraction {
        "" => 0,
        f if f.len() <= 18 => {
            f.parse::<u128>().ok()? * unit / 10u128.pow(u32::try_from(f.len()).ok()?)
        }
        _ => return None,
    };
    u64::try_from(whole.checked_mul(unit)?.checked_add(fraction)?).ok()
}

fn wrong(key: &'static str, wanted: &str, found: &Value) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("option '{key}' wants {wanted}")).field(key, found)
}

//! Encodes file names in option trees.
//!
//! A name that is UTF-8 is a string. Linux allows any bytes but NUL and JSON does not, so any other
//! name is the list of its bytes.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

pub(super) fn to_json(path: &Path) -> Value {
    from_bytes(path.as_os_str().as_bytes())
}

/// Encodes a text that may be a file name.
pub(super) fn from_bytes(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => Value::from(text),
        Err(_) => Value::from(bytes),
    }
}

/// `None`: not a file name.
pub(super) fn from_json(value: &Value) -> Option<PathBuf> {
    match value {
        Value::String(text) => Some(PathBuf::from(text)),
        Value::Array(items) if !items.is_empty() => {
            let bytes: Option<Vec<u8>> = items.iter().map(byte).collect();
            bytes.map(|bytes| PathBuf::from(OsString::from_vec(bytes)))
        }
        _ => None,
    }
}

/// A byte from a number, also from its text as in `key=value`.
fn byte(value: &Value) -> Option<u8> {
    match value {
        Value::String(text) => text.parse().ok(),
        other => other.as_u64().and_then(|number| u8::try_from(number).ok()),
    }
}

//! The verbs, one a file: each calls the library with its arguments and prints the result.

pub(crate) mod backup;
pub(crate) mod bench;
pub(crate) mod bitmap;
pub(crate) mod check;
pub(crate) mod commit;
pub(crate) mod compare;
pub(crate) mod convert;
mod convert_bitmaps;
mod convert_plan;
mod convert_target;
pub(crate) mod create;
pub(crate) mod dd;
pub(crate) mod drivers;
pub(crate) mod graph;
pub(crate) mod info;
mod job;
pub(crate) mod manual;
pub(crate) mod map;
pub(crate) mod measure;
pub(crate) mod mirror;
pub(crate) mod resize;
pub(crate) mod stream;
pub(crate) mod verify;

use bds_core::options::parse_size;
use bds_core::{Error, ErrorKind, Result};

/// Parses a size; `what` names it in the error.
pub(crate) fn size(what: &'static str, text: &str) -> Result<u64> {
    parse_size(text).ok_or_else(|| invalid_size(what, text))
}

pub(crate) fn invalid_size(what: &'static str, text: &str) -> Error {
    let message = format!(
        "Invalid {what} specified: use digits and an optional suffix k, M, G, T, P, E, so that it is a \
         whole number of bytes"
    );
    Error::new(ErrorKind::InvalidInput, message).field(what, text)
}

/// Fails if an option is given that qemu-img has and this tool does not support.
pub(crate) fn refuse(is_given: bool, option: &str, remedy: &str) -> Result<()> {
    if !is_given {
        return Ok(());
    }
    Err(Error::new(ErrorKind::NotSupported, format!("{option} is not supported: {remedy}")))
}

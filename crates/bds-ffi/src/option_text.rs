//! Parses the texts of `options` parameters.

use bds_core::Options;

use crate::abi::bds_status::BDS_ERR_JSON;
use crate::failure::Failure;
use crate::ptr::Text;

/// Parses the text of an `options` parameter: JSON, or `key=value,…`.
pub(crate) fn parse(text: Text, what: &str) -> Result<Options, Failure> {
    let text = text.path(what)?;
    let begins_as_json = text.as_os_str().to_string_lossy().trim_start().starts_with(['{', '[']);
    Options::parse_os(text.as_os_str()).map_err(|error| match begins_as_json {
        true => Failure::new(BDS_ERR_JSON, format!("{what}: {error}")),
        false => Failure::from(error).of(what),
    })
}

/// As `parse`; NULL stands for no options.
pub(crate) fn parse_optional(text: Text, what: &str) -> Result<Options, Failure> {
    match text.is_null() {
        true => Ok(Options::new()),
        false => parse(text, what),
    }
}

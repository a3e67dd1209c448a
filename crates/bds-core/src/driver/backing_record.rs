//! The backing file as an image itself records it.

use std::ffi::OsString;

/// Name and format of the backing file that an image records. Which node serves as its backing node
/// is another matter: the graph decides that.
///
/// ```
/// use bds_core::driver::BackingRecord;
///
/// let record = BackingRecord::new("base.qcow2", Some("qcow2"));
/// assert_eq!(record.name, "base.qcow2");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRecord {
    /// The file's name as recorded: absolute, relative to the image, or a `json:` description.
    pub name: OsString,
    /// The driver that opens it; `None` leaves that to a probe.
    pub format: Option<String>,
}

impl BackingRecord {
    /// A record of this name and format.
    pub fn new(name: impl Into<OsString>, format: Option<&str>) -> Self {
        Self { name: name.into(), format: format.map(str::to_owned) }
    }
}

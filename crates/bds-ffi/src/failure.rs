//! Failures: their codes, and the last one of each thread with its message.
//!
//! The return value alone is enough for a program; message and JSON are for people. They belong to
//! the thread and last until its next failing call.

use std::cell::RefCell;
use std::ffi::CString;
use std::io;

use bds_core::{Error, ErrorKind};
use bds_refcount::{Full, Stale};
use serde_json::{Value, json};

use crate::abi::bds_status::{
    self, BDS_ERR_ARGUMENT, BDS_ERR_CANCELLED, BDS_ERR_CORRUPT, BDS_ERR_EXHAUSTED, BDS_ERR_EXISTS,
    BDS_ERR_FORKED, BDS_ERR_IN_USE, BDS_ERR_INACTIVE, BDS_ERR_JSON, BDS_ERR_KIND,
    BDS_ERR_NOT_FOUND, BDS_ERR_OPTION, BDS_ERR_PANIC, BDS_ERR_PERMISSION, BDS_ERR_POISONED,
    BDS_ERR_RANGE, BDS_ERR_READ_ONLY, BDS_ERR_REFERENCE, BDS_ERR_STALE, BDS_ERR_STATE,
    BDS_ERR_UNSUPPORTED, BDS_ERR_UTF8, BDS_ERR_VERSION, BDS_OK, BDS_STILL_REFERENCED,
};

/// Why a call fails.
#[derive(Debug)]
pub(crate) struct Failure {
    code: i32,
    message: String,
    /// What the library said, for `bds_error_json`.
    error: Option<Box<Error>>,
}

impl Failure {
    pub(crate) fn new(status: bds_status, message: impl Into<String>) -> Self {
        Self { code: status as i32, message: message.into(), error: None }
    }

    pub(crate) fn errno(errno: i32, message: impl Into<String>) -> Self {
        Self { code: -errno, message: message.into(), error: None }
    }

    pub(crate) fn argument(message: impl Into<String>) -> Self {
        Self::new(BDS_ERR_ARGUMENT, message)
    }

    /// Says which argument it is about.
    pub(crate) fn of(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = code_of(&error);
        Self { code, message: error.to_string(), error: Some(Box::new(error)) }
    }
}

impl From<Stale> for Failure {
    fn from(stale: Stale) -> Self {
        let status = if stale == Stale::WrongKind { BDS_ERR_KIND } else { BDS_ERR_STALE };
        Self::new(status, stale.to_string())
    }
}

impl From<Full> for Failure {
    fn from(full: Full) -> Self {
        Self::new(BDS_ERR_EXHAUSTED, full.to_string())
    }
}

impl From<nix::Error> for Failure {
    fn from(errno: nix::Error) -> Self {
        Self::errno(errno as i32, errno.desc())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::errno(error.raw_os_error().unwrap_or(libc::EIO), error.to_string())
    }
}

/// The code of a library error. An errno of the system stays what it was.
pub(crate) fn code_of(error: &Error) -> i32 {
    let system = error.cause().and_then(|cause| cause.downcast_ref::<io::Error>());
    if system.and_then(io::Error::raw_os_error) == Some(error.errno()) {
        return -error.errno();
    }
    let status = match error.kind() {
        ErrorKind::InvalidImage | ErrorKind::Corrupt => BDS_ERR_CORRUPT,
        ErrorKind::InvalidInput => BDS_ERR_OPTION,
        ErrorKind::NotSupported => BDS_ERR_UNSUPPORTED,
        ErrorKind::PermissionDenied => BDS_ERR_PERMISSION,
        ErrorKind::ReadOnly => BDS_ERR_READ_ONLY,
        ErrorKind::Inactive => BDS_ERR_INACTIVE,
        ErrorKind::InUse => BDS_ERR_IN_USE,
        ErrorKind::NotFound => BDS_ERR_NOT_FOUND,
        ErrorKind::AlreadyExists => BDS_ERR_EXISTS,
        ErrorKind::OutOfRange => BDS_ERR_RANGE,
        ErrorKind::Cancelled => BDS_ERR_CANCELLED,
        ErrorKind::Stale => BDS_ERR_STALE,
        ErrorKind::ReferenceRefused => BDS_ERR_REFERENCE,
        ErrorKind::WouldWait => return -libc::EAGAIN,
        _ => return -error.errno(),
    };
    status as i32
}

/// Code, C's name, and the errno for callers that can store nothing else.
const CODES: &[(bds_status, &str, i32)] = &[
    (BDS_OK, "BDS_OK\0", 0),
    (BDS_STILL_REFERENCED, "BDS_STILL_REFERENCED\0", 0),
    (BDS_ERR_STALE, "BDS_ERR_STALE\0", libc::ESTALE),
    (BDS_ERR_KIND, "BDS_ERR_KIND\0", libc::EINVAL),
    (BDS_ERR_ARGUMENT, "BDS_ERR_ARGUMENT\0", libc::EINVAL),
    (BDS_ERR_PANIC, "BDS_ERR_PANIC\0", libc::EIO),
    (BDS_ERR_POISONED, "BDS_ERR_POISONED\0", libc::EIO),
    (BDS_ERR_FORKED, "BDS_ERR_FORKED\0", libc::EPERM),
    (BDS_ERR_VERSION, "BDS_ERR_VERSION\0", libc::EINVAL),
    (BDS_ERR_OPTION, "BDS_ERR_OPTION\0", libc::EINVAL),
    (BDS_ERR_JSON, "BDS_ERR_JSON\0", libc::EINVAL),
    (BDS_ERR_UTF8, "BDS_ERR_UTF8\0", libc::EINVAL),
    (BDS_ERR_NOT_FOUND, "BDS_ERR_NOT_FOUND\0", libc::ENOENT),
    (BDS_ERR_EXISTS, "BDS_ERR_EXISTS\0", libc::EEXIST),
    (BDS_ERR_IN_USE, "BDS_ERR_IN_USE\0", libc::EBUSY),
    (BDS_ERR_PERMISSION, "BDS_ERR_PERMISSION\0", libc::EACCES),
    (BDS_ERR_STATE, "BDS_ERR_STATE\0", libc::EBUSY),
    (BDS_ERR_UNSUPPORTED, "BDS_ERR_UNSUPPORTED\0", libc::ENOTSUP),
    (BDS_ERR_CORRUPT, "BDS_ERR_CORRUPT\0", libc::EIO),
    (BDS_ERR_CANCELLED, "BDS_ERR_CANCELLED\0", libc::ECANCELED),
    (BDS_ERR_INACTIVE, "BDS_ERR_INACTIVE\0", libc::EPERM),
    (BDS_ERR_READ_ONLY, "BDS_ERR_READ_ONLY\0", libc::EROFS),
    (BDS_ERR_RANGE, "BDS_ERR_RANGE\0", libc::EIO),
    (BDS_ERR_REFERENCE, "BDS_ERR_REFERENCE\0", libc::EACCES),
    (BDS_ERR_EXHAUSTED, "BDS_ERR_EXHAUSTED\0", libc::ENOMEM),
];

/// The last failure of a thread.
pub(crate) struct Last {
    pub(crate) code: i32,
    function: &'static str,
    pub(crate) message: CString,
    error: Option<Box<Error>>,
}

thread_local! {
    static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
}

/// Keeps a failure as the thread's last one, and returns its code.
#[cold]
pub(crate) fn record(function: &'static str, failure: Failure) -> i32 {
    let Failure { code, message, error } = failure;
    let mut text = format!("{function}: {message}").into_bytes();
    text.retain(|byte| *byte != 0);
    let message = CString::new(text).expect("zero bytes were taken out");
    // A thread that is ending has no last failure any more.
    let _ = LAST.try_with(|last| last.replace(Some(Last { code, function, message, error })));
    code
}

/// Looks at this thread's last failure; `None` if the thread is ending.
pub(crate) fn with_last<T>(body: impl FnOnce(Option<&Last>) -> T) -> Option<T> {
    LAST.try_with(|last| body(last.borrow().as_ref())).ok()
}

impl Last {
    /// The failure for people and logs.
    pub(crate) fn json(&self) -> Value {
        let mut value = json!({
            "status": self.code,
            "name": status_name(self.code).trim_end_matches('\0'),
            "errno": errno_of(self.code),
            "function": self.function,
            "message": self.message.to_string_lossy(),
        });
        if let Some(error) = &self.error {
            value["kind"] = json!(format!("{:?}", error.kind()));
            if let Some(node) = error.node_name() {
                value["node"] = json!(node);
            }
            if let Some(offset) = error.offset() {
                value["offset"] = json!(offset);
            }
            if let Some(cause) = error.cause() {
                value["cause"] = json!(cause.to_string());
            }
        }
        value
    }
}

/// C's name of a status, with a NUL at its end.
pub(crate) fn status_name(status: i32) -> &'static str {
    match CODES.iter().find(|(code, ..)| *code as i32 == status) {
        Some((_, name, _)) => name,
        None if (-4095..0).contains(&status) => "errno\0",
        None if status > 0 => "success\0",
        None => "unknown\0",
    }
}

/// The positive errno that says most about a status.
pub(crate) fn errno_of(status: i32) -> i32 {
    match CODES.iter().find(|(code, ..)| *code as i32 == status) {
        Some((_, _, errno)) => *errno,
        None if (-4095..0).contains(&status) => -status,
        None if status >= 0 => 0,
        None => libc::EIO,
    }
}

//! Functions for the thread's last error, the names of codes, and strings.

use std::ffi::c_char;

use serde_json::Value;

use crate::entry::{entry, entry_or};
use crate::failure::{Last, errno_of, status_name, with_last};
use crate::ptr::{self, Out, static_text};

/// The code of this thread's last failing call; 0: none has failed. [any]
#[unsafe(no_mangle)]
pub extern "C" fn bds_error_status() -> i32 {
    entry_or(
        "bds_error_status",
        0,
        || Ok(with_last(|last| last.map_or(0, |l| l.code)).unwrap_or(0)),
    )
}

/// The message of this thread's last failing call, "" if none has failed. Never NULL. [any]
///
/// Valid until the thread's next failing call, or its end.
#[unsafe(no_mangle)]
pub extern "C" fn bds_error_message() -> *const c_char {
    entry_or("bds_error_message", static_text("\0"), || {
        let message = with_last(|last| last.map(|l| l.message.as_ptr())).flatten();
        Ok(message.unwrap_or(static_text("\0")))
    })
}

/// This thread's last failure as JSON: status, name, errno, function, message, kind, node, offset,
/// cause. `null` if none has failed. Free it with bds_free. [any]
///
/// Errors: BDS_ERR_ARGUMENT for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn bds_error_json(json_out: Out<*mut c_char>) -> i32 {
    entry("bds_error_json", || {
        let out = json_out.check("json_out")?;
        let value = with_last(|last| last.map(Last::json)).flatten();
        out.set(ptr::give_text(&value.unwrap_or(Value::Null).to_string())?);
        Ok(0)
    })
}

/// Frees a string that the library returned through a `char **`. NULL is ignored. [any]
///
/// Never free such a string with free(3).
#[unsafe(no_mangle)]
pub extern "C" fn bds_free(text: ptr::Given) {
    entry_or("bds_free", (), || {
        text.free();
        Ok(())
    });
}

/// Name of a status: "BDS_ERR_STALE", or "errno" for a negative errno. Static; never NULL. [any]
#[unsafe(no_mangle)]
pub extern "C" fn bds_status_name(status: i32) -> *const c_char {
    static_text(status_name(status))
}

/// The positive errno that says most about a status; 0 for success. [any]
///
/// For callers that can store nothing else: a guest device, FUSE, NBD.
#[unsafe(no_mangle)]
pub extern "C" fn bds_status_to_errno(status: i32) -> i32 {
    errno_of(status)
}

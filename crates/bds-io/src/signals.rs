//! Reads and sets the dispositions of signals that concern files.
//!
//! Dispositions belong to the program, so the library changes none by itself; a program calls this
//! at its start.

use std::io;

use crate::sys;

/// Ignores SIGXFSZ, so that a write past RLIMIT_FSIZE fails with EFBIG instead of ending the
/// process. Engines hand operations to kernel threads, where a handler would not run; an ignored
/// signal is dropped there too.
///
/// # Errors
/// Those of signal(2).
pub fn ignore_file_size_limit() -> io::Result<()> {
    sys::ignore_signal(libc::SIGXFSZ)
}

/// Whether the process ignores a signal. If it does at its start, the parent process asked for it
/// (`nohup`, `trap '' INT`).
///
/// # Errors
/// EINVAL if there is no such signal.
pub fn is_ignored(number: i32) -> io::Result<bool> {
    sys::is_signal_ignored(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignore_file_size_limit_ignores_sigxfsz() {
        assert!(!is_ignored(libc::SIGXFSZ).unwrap());
        ignore_file_size_limit().unwrap();
        assert!(is_ignored(libc::SIGXFSZ).unwrap());
    }

    #[test]
    fn an_unknown_signal_is_refused() {
        assert_eq!(is_ignored(4096).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}

//! Prints errors as short messages and maps them to exit codes.

use std::process::ExitCode;

use bds_core::{Error, ErrorKind};

use crate::{interrupt, printer};

/// Prints an error and returns the exit code.
pub(crate) fn failure(error: &Error) -> ExitCode {
    printer::message(format_args!("bds: {}", message(error)));
    // An operation can also be cancelled by the system; only a signal has an exit code of its own.
    let of_signal = interrupt::exit_code().filter(|_| error.kind() == ErrorKind::Cancelled);
    ExitCode::from(of_signal.unwrap_or(1))
}

/// Returns the error's text without what has no meaning outside the program: generated node names,
/// and errno values beside their descriptions.
pub(crate) fn message(error: &Error) -> String {
    let text = without(&without(&error.to_string(), "node '#block", "': "), " (os error ", ")");
    let text = text.replace("cannot write the target: cannot write", "cannot write");
    let text = text.replace("cannot read the source: cannot read", "cannot read");
    // A file name that follows anyway is not repeated in front.
    match text.split_once(": ") {
        Some((file, rest)) if rest.contains(&format!("'{file}'")) => {
            rest.replacen("': cannot open: ", "': ", 1)
        }
        _ => text,
    }
}

/// Returns `text` without every part that begins with `from` and ends with the next `to`.
fn without(text: &str, from: &str, to: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(begin) = rest.find(from) {
        let Some(len) = rest[begin + from.len()..].find(to) else { break };
        out.push_str(&rest[..begin]);
        rest = &rest[begin + from.len() + len + to.len()..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_node_names_are_left_out() {
        let error = Error::io(std::io::Error::from_raw_os_error(2), "cannot open")
            .node("#block000")
            .file("a.qcow2");
        assert_eq!(message(&error), "a.qcow2: cannot open: No such file or directory");
        let error = error.context("Could not open 'a.qcow2'");
        assert_eq!(message(&error), "Could not open 'a.qcow2': No such file or directory");
        let error =
            Error::new(ErrorKind::Io, "cannot write the target: cannot write").file("a").at(512);
        assert_eq!(message(&error), "a: cannot write at offset 0x200");
        let error = Error::new(ErrorKind::Io, "no").file("a").context("cannot open 'a'");
        assert_eq!(message(&error), "cannot open 'a': no");
        let named = Error::new(ErrorKind::Io, "gone").node("disk0");
        assert_eq!(message(&named), "node 'disk0': gone");
    }
}

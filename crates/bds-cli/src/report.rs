//! Errors as a person wants to read them.

use std::process::ExitCode;

use bds_core::{Error, ErrorKind};

use crate::{printer, stop};

/// Prints an error and gives the exit code it deserves.
pub(crate) fn failure(error: &Error) -> ExitCode {
    printer::message(format_args!("bds: {}", words(error)));
    // An operation can also be cancelled by the system; only a signal has an exit code of its own.
    let of_signal = stop::exit_code().filter(|_| error.kind() == ErrorKind::Cancelled);
    ExitCode::from(of_signal.unwrap_or(1))
}

/// The error without what only means something inside the program: generated node names, numbers of errors that
/// are also there in words.
pub(crate) fn words(error: &Error) -> String {
    let text = without(&without(&error.to_string(), "node '#block", "': "), " (os error ", ")");
    let text = text.replace("cannot write the target: cannot write", "cannot write");
    let text = text.replace("cannot read the source: cannot read", "cannot read");
    // A name that follows anyway is not said in front as well.
    match text.split_once(": ") {
        Some((file, rest)) if rest.contains(&format!("'{file}'")) => {
            rest.replacen("': cannot open: ", "': ", 1)
        }
        _ => text,
    }
}

/// `text` without every part that begins with `from` and ends with the next `to`.
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
    fn inner_names_are_left_out() {
        let error = Error::io(std::io::Error::from_raw_os_error(2), "cannot open")
            .node("#block000")
            .file("a.qcow2");
        assert_eq!(words(&error), "a.qcow2: cannot open: No such file or directory");
        let error = error.context("Could not open 'a.qcow2'");
        assert_eq!(words(&error), "Could not open 'a.qcow2': No such file or directory");
        let error =
            Error::new(ErrorKind::Io, "cannot write the target: cannot write").file("a").at(512);
        assert_eq!(words(&error), "a: cannot write at offset 0x200");
        let error = Error::new(ErrorKind::Io, "no").file("a").context("cannot open 'a'");
        assert_eq!(words(&error), "cannot open 'a': no");
        let named = Error::new(ErrorKind::Io, "gone").node("disk0");
        assert_eq!(words(&named), "node 'disk0': gone");
    }
}

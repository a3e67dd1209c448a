//! The error type of the library: a kind, an errno, and where it happened.
//!
//! Kinds are few and stable; [`ErrorKind`] says what each means and maps it to one errno. An errno
//! that came from the system is kept as it was (ENOSPC stays ENOSPC). "Not supported, use the
//! fallback" is not an error here: see [`crate::driver::Attempt`].

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Kind of an error. Stable.
///
/// | kind | errno | when |
/// |---|---|---|
/// | `Io` | EIO | the device or file failed, or the node is poisoned |
/// | `NoSpace` | ENOSPC | no space left on the host or in the image |
/// | `NoMedium` | ENOMEDIUM | the backend has no medium |
/// | `InvalidImage` | EINVAL | an image breaks the rules of its format, found at open |
/// | `InvalidInput` | EINVAL | an option or argument is wrong, alone or for this graph |
/// | `NotSupported` | ENOTSUP | a version, feature or operation that this build or driver lacks |
/// | `PermissionDenied` | EACCES | a user of a node lacks a permission on it (`Perm`), or the host denied access |
/// | `ReadOnly` | EPERM | the node, or a node below it, is read-only, and something would change it |
/// | `Inactive` | EPERM | the node is inactive: another process may write to its image |
/// | `InUse` | EBUSY | another user holds, locks, blocks or froze it, or permissions of two users conflict |
/// | `NotFound` | ENOENT | no such file, node, backend or bitmap |
/// | `AlreadyExists` | EEXIST | the name is taken |
/// | `LimitExceeded` | EFBIG | a limit or budget is exceeded |
/// | `Corrupt` | EIO | metadata turned out broken after the image was opened |
/// | `OutOfRange` | EIO | a range ends past the end of the node, or is longer than a request may be |
/// | `WouldWait` | EBUSY | it would have to wait, and the caller does not want that |
/// | `Cancelled` | ECANCELED | it was cancelled, or the graph was shut down |
/// | `Stale` | ESTALE | the object of a handle is gone |
/// | `ReferenceRefused` | EACCES | the reference gate refused a file named inside an image |
/// | `NoMemory` | ENOMEM | not enough memory, or the memory budget is exhausted |
///
/// A request that is refused for several reasons gets the first of `NoMedium`, `OutOfRange` (of the
/// backend), `ReadOnly` or `Inactive`, `PermissionDenied`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The device or file failed (EIO).
    Io,
    /// No space left (ENOSPC).
    NoSpace,
    /// The backend has no medium (ENOMEDIUM).
    NoMedium,
    /// An image breaks its format's rules at open (EINVAL).
    InvalidImage,
    /// An option or argument is wrong (EINVAL).
    InvalidInput,
    /// A version, feature or operation this build does not do (ENOTSUP).
    NotSupported,
    /// A user lacks a permission on a node, or the host denied access (EACCES).
    PermissionDenied,
    /// The node is read-only (EPERM).
    ReadOnly,
    /// The node is inactive: another process may write to its image (EPERM).
    Inactive,
    /// In use by another user: a lock, a permission, a holder (EBUSY).
    InUse,
    /// No such file or node (ENOENT).
    NotFound,
    /// The name is taken (EEXIST).
    AlreadyExists,
    /// A limit or budget is exceeded (EFBIG).
    LimitExceeded,
    /// Metadata turned out broken at run time (EIO).
    Corrupt,
    /// A range lies outside the node (EIO).
    OutOfRange,
    /// It would have to wait, and the caller does not want that (EBUSY).
    WouldWait,
    /// Cancelled (ECANCELED).
    Cancelled,
    /// The object of a handle is gone (ESTALE).
    Stale,
    /// A reference named inside an image was refused by the gate (EACCES).
    ReferenceRefused,
    /// Not enough memory, or the memory budget (ENOMEM).
    NoMemory,
}

impl ErrorKind {
    /// The errno of the kind, for errors that did not come from the system.
    pub fn errno(self) -> i32 {
        match self {
            Self::Io | Self::Corrupt | Self::OutOfRange => libc::EIO,
            Self::NoSpace => libc::ENOSPC,
            Self::NoMedium => libc::ENOMEDIUM,
            Self::InvalidImage | Self::InvalidInput => libc::EINVAL,
            Self::NotSupported => libc::ENOTSUP,
            Self::PermissionDenied | Self::ReferenceRefused => libc::EACCES,
            Self::ReadOnly | Self::Inactive => libc::EPERM,
            Self::InUse | Self::WouldWait => libc::EBUSY,
            Self::NotFound => libc::ENOENT,
            Self::AlreadyExists => libc::EEXIST,
            Self::LimitExceeded => libc::EFBIG,
            Self::Cancelled => libc::ECANCELED,
            Self::Stale => libc::ESTALE,
            Self::NoMemory => libc::ENOMEM,
        }
    }

    /// The kind of a system error.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT => Self::NoSpace,
            libc::ENOMEDIUM => Self::NoMedium,
            libc::EINVAL => Self::InvalidInput,
            libc::ENOTSUP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV => Self::NotSupported,
            libc::EACCES | libc::EROFS => Self::PermissionDenied,
            libc::EPERM => Self::ReadOnly,
            libc::EBUSY | libc::EAGAIN | libc::ETXTBSY => Self::InUse,
            libc::ENOENT => Self::NotFound,
            libc::EEXIST => Self::AlreadyExists,
            libc::EFBIG => Self::LimitExceeded,
            libc::ECANCELED => Self::Cancelled,
            libc::ESTALE => Self::Stale,
            libc::ENOMEM => Self::NoMemory,
            _ => Self::Io,
        }
    }
}

/// An error: its kind, a message, and where it happened. One pointer wide.
///
/// `Display` is one line with everything, the cause included; so [`std::error::Error::source`] goes
/// on behind the cause, and a report of the whole chain says nothing twice. [`Error::cause`] is the
/// cause itself. `Debug` is the same line with kind and errno; `{:#?}` shows the fields.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    errno: Option<i32>,
    message: String,
    node: Option<String>,
    file: Option<PathBuf>,
    offset: Option<u64>,
    field: Option<(&'static str, String)>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A new error. The message is lower case, without a final stop, and says what to do if
    /// anything can be done.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            errno: None,
            message: message.into(),
            node: None,
            file: None,
            offset: None,
            field: None,
            source: None,
        }))
    }

    /// Wraps an error of the system, whose errno decides the kind and is kept.
    pub fn io(error: io::Error, message: impl Into<String>) -> Self {
        let errno = error.raw_os_error();
        let kind = errno.map_or(ErrorKind::Io, ErrorKind::from_errno);
        let mut this = Self::new(kind, message);
        this.0.errno = errno;
        this.0.source = Some(Box::new(error));
        this
    }

    /// Replaces the kind (for example: EINVAL from a file that is really a bad image). Drops the
    /// errno of the system.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self.0.errno = None;
        self
    }

    /// Names the node, unless an inner one is named already.
    #[must_use]
    pub fn node(mut self, name: impl Into<String>) -> Self {
        self.0.node.get_or_insert_with(|| name.into());
        self
    }

    /// Names the file, unless an inner one is named already.
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.file.get_or_insert_with(|| path.into());
        self
    }

    /// Says at which byte of the node or file, unless said already.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Names the field (of a header, of the options) and the value found there.
    #[must_use]
    pub fn field(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.0.field.get_or_insert_with(|| (name, value.to_string()));
        self
    }

    /// Sets the cause.
    #[must_use]
    pub fn caused_by(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Puts context in front of the message ("cannot open backing file: …").
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.0.message = format!("{context}: {}", self.0.message);
        self
    }

    /// Its kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The system's errno, or the kind's. Positive.
    pub fn errno(&self) -> i32 {
        self.0.errno.unwrap_or_else(|| self.0.kind.errno())
    }

    /// The message without node, file, offset and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Name of the node it happened on, if known.
    pub fn node_name(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// Offset it happened at, if known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The error that caused it, if known: of the system, of a library, or another [`Error`].
    pub fn cause(&self) -> Option<&(dyn std::error::Error + Send + Sync + 'static)> {
        self.0.source.as_deref()
    }

    /// True if its errno came from the system, and so from the host.
    pub(crate) fn is_from_system(&self) -> bool {
        self.0.errno.is_some()
    }

    /// Copies the error for another receiver (several waiters of one failed operation). The cause
    /// is kept as text.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self(Box::new(Inner {
            kind: self.0.kind,
            errno: self.0.errno,
            message: self.0.message.clone(),
            node: self.0.node.clone(),
            file: self.0.file.clone(),
            offset: self.0.offset,
            field: self.0.field.clone(),
            source: self.0.source.as_ref().map(|s| s.to_string().into()),
        }))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !f.alternate() {
            return write!(f, "{self} [{:?}, errno {}]", self.kind(), self.errno());
        }
        let Inner { kind, errno: _, message, node, file, offset, field, source } = &*self.0;
        f.debug_struct("Error")
            .field("kind", kind)
            .field("errno", &self.errno())
            .field("message", message)
            .field("node", node)
            .field("file", file)
            .field("offset", offset)
            .field("field", field)
            .field("cause", source)
            .finish()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { message, node, file, offset, field, source, .. } = &*self.0;
        if let Some(file) = file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(node) = node {
            write!(f, "node '{node}': ")?;
        }
        f.write_str(message)?;
        if let Some((name, value)) = field {
            write!(f, " ({name} = {value})")?;
        }
        if let Some(offset) = offset {
            write!(f, " at offset {offset:#x}")?;
        }
        if let Some(source) = source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // `Display` includes the cause.
        self.0.source.as_ref()?.source()
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn errno_of_the_system_is_kept() {
        let e = Error::io(io::Error::from_raw_os_error(libc::EDQUOT), "write");
        assert_eq!((e.kind(), e.errno()), (ErrorKind::NoSpace, libc::EDQUOT));
    }

    #[test]
    fn text_names_file_node_field_and_offset() {
        let e = Error::new(ErrorKind::InvalidImage, "l1 table too large")
            .file("a.qcow2")
            .node("disk0")
            .field("l1_size", 7)
            .at(36);
        let line = "a.qcow2: node 'disk0': l1 table too large (l1_size = 7) at offset 0x24";
        assert_eq!(e.to_string(), line);
        assert_eq!(format!("{e:?}"), format!("{line} [InvalidImage, errno {}]", libc::EINVAL));
        let fields = format!("{e:#?}");
        for field in ["kind: InvalidImage", "\"disk0\"", "\"l1 table too large\"", "36"] {
            assert!(fields.contains(field), "{field}: {fields}");
        }
    }

    /// What a program prints that reports an error with all its sources.
    fn report(error: &Error) -> String {
        let mut report = error.to_string();
        let mut next = error.source();
        while let Some(source) = next {
            report += &format!(": {source}");
            next = source.source();
        }
        report
    }

    #[test]
    fn a_report_of_all_sources_names_each_once() {
        let system = || io::Error::from_raw_os_error(libc::ENOENT);
        let inner = Error::io(system(), "cannot open").file("base.img");
        let outer = Error::new(ErrorKind::NotFound, "no backing file").node("top").caused_by(inner);
        let expected = format!("node 'top': no backing file: base.img: cannot open: {}", system());
        assert_eq!((outer.to_string(), report(&outer)), (expected.clone(), expected.clone()));
        assert_eq!(report(&outer.duplicate()), expected);
        let cause = outer.cause().expect("it was set");
        assert!(cause.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::NotFound));
    }

    /// Kinds, errno names and meanings of the table in the documentation of [`ErrorKind`].
    fn documented() -> Vec<(String, String)> {
        include_str!("error.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("/// | `"))
            .map(|row| {
                let mut cells = row.split('|').map(|cell| cell.trim().trim_matches('`').to_owned());
                (cells.next().expect("a kind"), cells.next().expect("an errno"))
            })
            .collect()
    }

    #[test]
    fn the_documented_table_has_every_kind_with_its_errno() {
        let all = [
            (ErrorKind::Io, "EIO"),
            (ErrorKind::NoSpace, "ENOSPC"),
            (ErrorKind::NoMedium, "ENOMEDIUM"),
            (ErrorKind::InvalidImage, "EINVAL"),
            (ErrorKind::InvalidInput, "EINVAL"),
            (ErrorKind::NotSupported, "ENOTSUP"),
            (ErrorKind::PermissionDenied, "EACCES"),
            (ErrorKind::ReadOnly, "EPERM"),
            (ErrorKind::Inactive, "EPERM"),
            (ErrorKind::InUse, "EBUSY"),
            (ErrorKind::NotFound, "ENOENT"),
            (ErrorKind::AlreadyExists, "EEXIST"),
            (ErrorKind::LimitExceeded, "EFBIG"),
            (ErrorKind::Corrupt, "EIO"),
            (ErrorKind::OutOfRange, "EIO"),
            (ErrorKind::WouldWait, "EBUSY"),
            (ErrorKind::Cancelled, "ECANCELED"),
            (ErrorKind::Stale, "ESTALE"),
            (ErrorKind::ReferenceRefused, "EACCES"),
            (ErrorKind::NoMemory, "ENOMEM"),
        ];
        let errno = |name: &str| match name {
            "EIO" => libc::EIO,
            "ENOSPC" => libc::ENOSPC,
            "ENOMEDIUM" => libc::ENOMEDIUM,
            "EINVAL" => libc::EINVAL,
            "ENOTSUP" => libc::ENOTSUP,
            "EACCES" => libc::EACCES,
            "EPERM" => libc::EPERM,
            "EBUSY" => libc::EBUSY,
            "ENOENT" => libc::ENOENT,
            "EEXIST" => libc::EEXIST,
            "EFBIG" => libc::EFBIG,
            "ECANCELED" => libc::ECANCELED,
            "ESTALE" => libc::ESTALE,
            "ENOMEM" => libc::ENOMEM,
            other => panic!("no errno {other}"),
        };
        for (kind, name) in all {
            assert_eq!(kind.errno(), errno(name), "{kind:?}");
            // An errno maps back to a kind of the same errno.
            assert_eq!(ErrorKind::from_errno(kind.errno()).errno(), kind.errno(), "{kind:?}");
        }
        let rows = all.map(|(kind, name)| (format!("{kind:?}"), name.to_owned()));
        assert_eq!(documented(), rows);
    }
}

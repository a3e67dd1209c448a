//! One error type from the cellar to the door: a kind, an errno, and where it happened.
//!
//! Kinds are few and stable; each maps to one errno in one table, and an errno that came from the system
//! is kept as it was (ENOSPC stays ENOSPC). "Not supported, use the fallback" is not an error here: see
//! [`crate::driver::Attempt`].

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, coarsely. Stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The device or file failed (EIO).
    Io,
    /// No space left (ENOSPC).
    NoSpace,
    /// Nothing is in the drive (ENOMEDIUM).
    NoMedium,
    /// An image breaks its format's rules at open (EINVAL).
    InvalidImage,
    /// An option or argument is wrong (EINVAL).
    InvalidInput,
    /// A version, feature or operation this build does not do (ENOTSUP).
    NotSupported,
    /// The host said no (EACCES).
    PermissionDenied,
    /// The node is read-only (EPERM).
    ReadOnly,
    /// The node is inactive: another process has charge of its bytes (EPERM).
    Inactive,
    /// Somebody else uses it: a lock, a permission, a holder (EBUSY).
    InUse,
    /// No such file or node (ENOENT).
    NotFound,
    /// The name is taken (EEXIST).
    AlreadyExists,
    /// A limit or budget is exceeded (EFBIG).
    LimitExceeded,
    /// Metadata that was trusted turned out broken at run time (EIO).
    Corrupt,
    /// A range lies outside the node (EIO).
    OutOfRange,
    /// Would have to wait, and the caller said not to (EBUSY).
    WouldWait,
    /// Cancelled (ECANCELED).
    Cancelled,
    /// A handle whose object is gone (ESTALE).
    Stale,
    /// A reference named inside an image was refused by the gate (EACCES).
    ReferenceRefused,
    /// Not enough memory, or the memory budget (ENOMEM).
    NoMemory,
}

impl ErrorKind {
    /// The errno a C caller sees when the system gave none.
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

    /// The kind an errno of the system belongs to.
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

/// What failed, where, and what can be done. One pointer wide.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
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
    /// A new error. The message is lower case, without a final stop, and says what to do if anything can be done.
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

    /// Wraps an error of the system; its errno decides the kind and is kept.
    pub fn io(error: io::Error, message: impl Into<String>) -> Self {
        let errno = error.raw_os_error();
        let kind = errno.map_or(ErrorKind::Io, ErrorKind::from_errno);
        let mut this = Self::new(kind, message);
        this.0.errno = errno;
        this.0.source = Some(Box::new(error));
        this
    }

    /// Overrides the kind (for example: EINVAL from a file that is really a bad image). The errno of the system is dropped.
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

    /// Keeps the cause.
    #[must_use]
    pub fn caused_by(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Puts words in front of the message ("cannot open backing file: …").
    #[must_use]
    pub fn context(mut self, words: impl fmt::Display) -> Self {
        self.0.message = format!("{words}: {}", self.0.message);
        self
    }

    /// What went wrong, coarsely.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The system's errno, or the kind's. Positive.
    pub fn errno(&self) -> i32 {
        self.0.errno.unwrap_or_else(|| self.0.kind.errno())
    }

    /// The message without its context.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The node it happened on, if known.
    pub fn node_name(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The byte it happened at, if known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The same facts for a second receiver (several waiters of one failed operation). The source is kept as text.
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
        self.0.source.as_ref().map(|s| &**s as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(
            e.to_string(),
            "a.qcow2: node 'disk0': l1 table too large (l1_size = 7) at offset 0x24"
        );
    }
}

//! Kinds and flags of requests, and the answer of a driver that may decline one.

use std::future::Future;
use std::pin::Pin;

/// A boxed future that can be sent between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Result of an operation that a driver may decline. Exhaustive: a caller handles both.
///
/// Declining is not a failure: the caller has a fallback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Attempt {
    /// It was done.
    Done,
    /// Nothing was changed; use the fallback.
    Unsupported,
}

bitflags::bitflags! {
    /// Modifiers of a read.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ReadFlags: u32 {
        /// Only load the data into caches: the buffer says how much, and its bytes may be left as
        /// they were.
        const PREFETCH = 1;
        /// Copy what is read from layers below into the node that is read. The request path does
        /// that; drivers never see it unless they set it.
        const COPY_ON_READ = 2;
    }

    /// Modifiers of a write. The request path removes flags that a driver does not declare and
    /// emulates them.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct WriteFlags: u32 {
        /// Durable when it returns.
        const FUA = 1;
        /// Does not change what a reader sees; needs only the write-unchanged permission.
        const UNCHANGED = 2;
        /// Exclude every overlapping request.
        const SERIALISING = 4;
        /// Fail with `WouldWait` rather than wait for an overlapping request.
        const NO_WAIT = 8;
    }

    /// Modifiers of a zero write.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ZeroFlags: u32 {
        /// Durable when it returns.
        const FUA = 1;
        /// May deallocate, if the range still reads as zeros afterwards.
        const MAY_UNMAP = 2;
        /// Only if that is faster than writing zeros; else `Attempt::Unsupported`.
        const NO_FALLBACK = 4;
        /// See [`WriteFlags::UNCHANGED`].
        const UNCHANGED = 8;
        /// See [`WriteFlags::NO_WAIT`].
        const NO_WAIT = 16;
    }
}

/// How the space of a grown image is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prealloc {
    /// Not at all.
    #[default]
    Off,
    /// Metadata only.
    Metadata,
    /// Reserved on the host, not written.
    Falloc,
    /// Written with zeros.
    Full,
}

impl Prealloc {
    /// Parses QEMU's name for it.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "off" => Self::Off,
            "metadata" => Self::Metadata,
            "falloc" => Self::Falloc,
            "full" => Self::Full,
            _ => return None,
        })
    }
}

/// A change of length. `Truncate { zero_new: true, ..Truncate::to(len) }` keeps the defaults of the
/// other fields.
#[derive(Clone, Copy, Debug)]
pub struct Truncate {
    /// The new length in bytes.
    pub len: u64,
    /// The length must become exactly this (else: at least).
    pub exact: bool,
    /// How grown space is allocated.
    pub prealloc: Prealloc,
    /// Grown space must read as zeros, whatever lies below.
    pub zero_new: bool,
}

impl Truncate {
    /// Exactly to `len` bytes, without preallocation; grown space need not read as zeros.
    pub const fn to(len: u64) -> Self {
        Self { len, exact: true, prealloc: Prealloc::Off, zero_new: false }
    }
}

//! Types of block status: what a range holds (data, zeros, nothing) and where.

bitflags::bitflags! {
    /// Facts about a run of bytes. `DATA` or `ZERO` implies `ALLOCATED`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct StatusFlags: u32 {
        /// There are bytes to read.
        const DATA = 1;
        /// It reads as zeros.
        const ZERO = 2;
        /// Decided at this layer, not by the backing node.
        const ALLOCATED = 4;
        /// The run reaches the end of this node.
        const EOF = 8;
        /// Stored compressed.
        const COMPRESSED = 16;
        /// `map` holds guest bytes one to one.
        const OFFSET_VALID = 32;
        /// Passes through: the status of `map` is this node's (filters, raw).
        const RAW = 64;
        /// Preallocated: the status of `map` says whether it is zero there.
        const RECURSE = 128;
    }
}

/// Position of bytes in a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMap {
    /// Name of the child in this driver ("file", "data-file").
    pub child: &'static str,
    /// Byte offset in that child.
    pub offset: u64,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// Length in bytes, at most that of the question; zero only at or past the end.
    pub len: u64,
    /// Facts about it.
    pub flags: StatusFlags,
    /// Position in a child, if `OFFSET_VALID`, `RAW` or `RECURSE`.
    pub map: Option<HostMap>,
}

/// How exact an answer about block status has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// A cheap answer: unclear parts count as data.
    Cheap,
    /// Exact about zeros, which may take I/O.
    Exact,
}

//! Checks ranges and permissions: whether a range may be touched at all, and whether this parent
//! may write it.
//!
//! Arithmetic and answers only. A range is checked once, where a request enters; the steps after
//! that take a [`CheckedRange`] and add offsets and lengths without overflow, because its end is at
//! most `MAX_LEN`.

use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Edge, Node, Perm};

/// Longest node: its length can be rounded up to any alignment.
pub(crate) const MAX_LEN: u64 = (1 << 63) - (1 << 30);
/// Longest data request.
pub(crate) const MAX_REQUEST: u64 = 2_147_483_136;

/// A range of bytes whose end is at most [`MAX_LEN`].
#[derive(Clone, Copy, Debug)]
pub(super) struct CheckedRange {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl CheckedRange {
    /// A range of any length, without data: zero writes, discards, questions.
    pub(super) fn new(offset: u64, len: u64) -> Result<Self> {
        Ok(Self { start: offset, end: check(offset, len)? })
    }

    /// A range that is read into or written from a buffer of `len` bytes.
    pub(super) fn of_data(offset: u64, len: u64) -> Result<Self> {
        check_data_len(offset, len)?;
        Self::new(offset, len)
    }

    /// As [`CheckedRange::new`], for a backend's request: those end inside the node. Only parents
    /// inside the graph may read or write past the end.
    pub(super) fn inside(node: &Node, offset: u64, len: u64) -> Result<Self> {
        let reach = node.len();
        let range = Self::new(offset, len)?;
        if range.end > reach {
            let message = format!("the request ends past the end of the node ({reach} bytes)");
            return Err(out_of_range(offset, len, &message));
        }
        Ok(range)
    }

    /// As [`CheckedRange::of_data`] and [`CheckedRange::inside`].
    pub(super) fn of_data_inside(node: &Node, offset: u64, len: u64) -> Result<Self> {
        let range = Self::inside(node, offset, len)?;
        check_data_len(offset, len).map(|()| range)
    }

    pub(super) fn len(self) -> u64 {
        self.end - self.start
    }

    pub(super) fn is_empty(self) -> bool {
        self.start == self.end
    }
}

fn check_data_len(offset: u64, len: u64) -> Result<()> {
    if len > MAX_REQUEST {
        let message = "the request is longer than 2147483136 bytes: split it";
        return Err(out_of_range(offset, len, message));
    }
    Ok(())
}

/// The end of a range, if it is at most [`MAX_LEN`].
pub(super) fn check(offset: u64, len: u64) -> Result<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_LEN => Ok(end),
        _ => Err(out_of_range(offset, len, "the range ends beyond what any node can hold")),
    }
}

/// The permissions of which one suffices for a write.
pub(super) fn write_perms(is_unchanged: bool) -> Perm {
    if is_unchanged { Perm::WRITE | Perm::WRITE_UNCHANGED } else { Perm::WRITE }
}

/// Checks that this parent may write up to `end`, having one of the permissions `any_of`, and
/// reports a write past the node's write threshold.
#[inline]
pub(super) fn check_write(edge: &Edge, node: &Node, end: u64, any_of: Perm) -> Result<()> {
    may_write(edge, node, end, any_of)?;
    if end > node.write_threshold_or_max() {
        node.pass_threshold(end);
    }
    Ok(())
}

/// As [`check_write`], for a request that stores no bytes.
#[inline]
pub(super) fn may_write(edge: &Edge, node: &Node, end: u64, any_of: Perm) -> Result<()> {
    let perm = edge.access().perm;
    check_writable(node)?;
    if !perm.intersects(any_of) {
        return Err(no_permission(edge, "write to"));
    }
    if !perm.contains(Perm::RESIZE) {
        let reach = round_up(node.len(), u64::from(node.limits().request_alignment));
        if end > reach {
            return Err(out_of_range(
                reach,
                end - reach,
                "the write ends past the end of the node",
            ));
        }
    }
    Ok(())
}

/// Checks that this parent may change the length of the node.
pub(super) fn check_resize(edge: &Edge, node: &Node) -> Result<()> {
    check_writable(node)?;
    if !edge.access().perm.contains(Perm::RESIZE) {
        return Err(no_permission(edge, "resize"));
    }
    Ok(())
}

#[cold]
fn no_permission(edge: &Edge, verb: &str) -> Error {
    let words = format!("{} has no permission to {verb} the node", edge.holder());
    Error::new(ErrorKind::PermissionDenied, words)
}

#[inline]
fn check_writable(node: &Node) -> Result<()> {
    if !node.is_writable() {
        return Err(cannot_write(node));
    }
    if node.has_readonly_bitmap() {
        return node.refuse_write_for_bitmap();
    }
    Ok(())
}

#[cold]
fn cannot_write(node: &Node) -> Error {
    match node.could_write() {
        false => Error::new(ErrorKind::ReadOnly, "the node is read-only"),
        true => Error::new(ErrorKind::Inactive, "the node is inactive: activate it first"),
    }
}

fn out_of_range(offset: u64, len: u64, message: &str) -> Error {
    Error::new(ErrorKind::OutOfRange, message).at(offset).field("length", len)
}

/// True if a request was refused because its arguments made no sense.
pub(super) fn is_invalid(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::OutOfRange)
}

/// `align` is a power of two, `n` at most `MAX_LEN`.
#[inline]
pub(super) fn round_up(n: u64, align: u64) -> u64 {
    (n + (align - 1)) & !(align - 1)
}

/// `align` is a power of two.
#[inline]
pub(super) fn round_down(n: u64, align: u64) -> u64 {
    n & !(align - 1)
}

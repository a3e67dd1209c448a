//! May this range be touched, and may it be touched by this parent?
//!
//! Arithmetic and answers only. Everything that follows in the corridor may add offsets and lengths without
//! overflow, because `end <= MAX_LEN` has been checked here.

use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Edge, Node, Perm};

/// Longest node: room is left for rounding up to any alignment.
pub(crate) const MAX_LEN: u64 = (1 << 63) - (1 << 30);
/// Longest data request.
pub(crate) const MAX_REQUEST: u64 = 2_147_483_136;

/// The end of a sane range.
pub(super) fn check(offset: u64, len: u64) -> Result<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_LEN => Ok(end),
        _ => Err(out_of_range(offset, len, "the range ends beyond what any node can hold")),
    }
}

/// The end of a sane range of data.
pub(super) fn check_data(offset: u64, len: u64) -> Result<u64> {
    if len > MAX_REQUEST {
        return Err(out_of_range(
            offset,
            len,
            "the request is longer than 2147483136 bytes: split it",
        ));
    }
    check(offset, len)
}

/// Is this parent allowed to write up to `end`? If so, it is going to: a mark that it passes is told.
#[inline]
pub(super) fn check_write(edge: &Edge, node: &Node, end: u64, is_unchanged: bool) -> Result<()> {
    may_write(edge, node, end, is_unchanged)?;
    if end > node.write_threshold_or_max() {
        node.pass_threshold(end);
    }
    Ok(())
}

/// Is this parent allowed to write up to `end`?
#[inline]
pub(super) fn may_write(edge: &Edge, node: &Node, end: u64, is_unchanged: bool) -> Result<()> {
    let perm = edge.access().perm;
    if !node.is_writable() {
        return Err(cannot_write(node));
    }
    let wanted = if is_unchanged { Perm::WRITE | Perm::WRITE_UNCHANGED } else { Perm::WRITE };
    if !perm.intersects(wanted) {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{} did not ask to write here", edge.holder()),
        ));
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

#[cold]
fn cannot_write(node: &Node) -> Error {
    match node.could_write() {
        false => Error::new(ErrorKind::ReadOnly, "the node is read-only"),
        true => Error::new(ErrorKind::Inactive, "the node is inactive: activate it first"),
    }
}

/// EIO with the offset.
pub(super) fn out_of_range(offset: u64, len: u64, message: &str) -> Error {
    Error::new(ErrorKind::OutOfRange, message).at(offset).field("length", len)
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

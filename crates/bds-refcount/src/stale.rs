//! Errors of look-ups and inserts: why a handle is stale, why no slot or reference is left.

use std::{error, fmt};

/// Says why a handle does not resolve.
///
/// Every variant except [`TooManyReferences`](Stale::TooManyReferences) and
/// [`NeverIssued`](Stale::NeverIssued) is final: the handle will not resolve in this arena again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Stale {
    /// The handle is 0, the null handle.
    Null,
    /// The last reference is gone; the object waits to be closed or is being closed.
    Dying,
    /// The object has ended; its slot is free or holds another object.
    Released,
    /// The object has ended, and its slot will not be used again.
    Retired,
    /// The handle comes from another arena.
    WrongArena,
    /// The handle names another kind of object.
    WrongKind,
    /// This arena has not given out such a handle, or the object is still being made.
    NeverIssued,
    /// The object lives but has as many references as can be counted (2³⁷).
    TooManyReferences,
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "the handle is null",
            Self::Dying => "the last reference to the object is gone and it is being closed",
            Self::Released => "the object was released",
            Self::Retired => "the object was released and its slot is retired",
            Self::WrongArena => "the handle belongs to another arena",
            Self::WrongKind => "the handle names another kind of object",
            Self::NeverIssued => "no such handle was given out",
            Self::TooManyReferences => "the object has too many references",
        })
    }
}

impl error::Error for Stale {}

/// The arena has no free slot: every index is in use, waiting to be reaped, or retired.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full {
    /// Slots that this arena can have in all. 0: it found no generation of its kind that was not
    /// used already.
    pub capacity: usize,
    /// How many of them are retired for good.
    pub retired: usize,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { capacity, retired } = self;
        if *capacity == 0 {
            f.write_str("no generations are left for another arena of this kind; ")?;
            return f.write_str("drop arenas that are not needed any more");
        }
        write!(f, "all {capacity} slots of the arena are taken ({retired} of them retired); ")?;
        f.write_str("release objects and reap")
    }
}

impl error::Error for Full {}

/// A reference was not cloned because the object has as many as can be counted (2³⁷).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooManyReferences;

impl fmt::Display for TooManyReferences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the object has too many references")
    }
}

impl error::Error for TooManyReferences {}

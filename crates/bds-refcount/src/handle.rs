//! `Handle<T>`: a 64-bit generational name of an object in an arena. It never dangles.
//!
//! ```text
//!  63   60 59        48 47              24 23               0
//! ┌───────┬────────────┬──────────────────┬──────────────────┐
//! │ kind  │ arena tag  │ generation (≥ 1) │ index            │
//! └───────┴────────────┴──────────────────┴──────────────────┘
//! ```
//! Any `u64` may become a handle; whether it names anything is decided by
//! [`Arena::acquire`](crate::Arena::acquire) alone. This file does arithmetic only; it knows no
//! slots. The order of the fields is not part of any promise.

use std::{
    cmp::Ordering,
    fmt,
    hash::{Hash, Hasher},
    marker::PhantomData,
};

use crate::pages;

/// Bits of the index field.
pub(crate) const INDEX_BITS: u32 = 24;
/// Bits of the generation field.
pub(crate) const GENERATION_BITS: u32 = 24;
/// Bits of the arena tag.
pub(crate) const TAG_BITS: u32 = 12;
/// First bit of tag and kind, which identify the arena.
pub(crate) const PREFIX_SHIFT: u32 = INDEX_BITS + GENERATION_BITS;

const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const GENERATION_MASK: u64 = (1 << GENERATION_BITS) - 1;
const TAG_MASK: u64 = (1 << TAG_BITS) - 1;

/// Kind of the objects in an arena, 1 to 15. It is part of every handle, so that a node's handle is
/// refused with [`WrongKind`](crate::Stale::WrongKind) where an edge's is expected.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Kind(u8);

impl Kind {
    /// The kind with this number.
    ///
    /// # Panics
    /// If the number is not in 1..=15. In a `const` that is a compile error; for numbers that come
    /// from outside use [`Kind::from_u8`].
    pub const fn new(number: u8) -> Self {
        match Self::from_u8(number) {
            Some(kind) => kind,
            None => panic!("an arena kind is a number from 1 to 15"),
        }
    }

    /// The kind with this number, or `None` outside 1..=15.
    pub const fn from_u8(number: u8) -> Option<Self> {
        match number {
            1..=15 => Some(Self(number)),
            _ => None,
        }
    }

    /// The number of this kind, 1 to 15.
    pub const fn to_u8(self) -> u8 {
        self.0
    }
}

/// Names an object of type `T` in an [`Arena<T>`](crate::Arena): `Copy`, 64 bits, never dangling.
///
/// A handle denotes one object for ever: after that object's end it is stale in every future
/// lookup, also when its slot has been used again. Zero is never a valid handle.
pub struct Handle<T> {
    bits: u64,
    // `fn() -> T`: a handle owns no T, so it is Send and Sync for every T.
    _names: PhantomData<fn() -> T>,
}

impl<T> Handle<T> {
    /// The null handle, which names no object.
    pub const NULL: Self = Self::from_u64(0);

    /// Makes a handle of any number. Never fails; a number that no arena gave out resolves nowhere.
    #[inline]
    pub const fn from_u64(bits: u64) -> Self {
        Self { bits, _names: PhantomData }
    }

    /// The handle as an opaque number, never 0 for a handle that an arena gave out.
    #[inline]
    pub const fn to_u64(self) -> u64 {
        self.bits
    }

    /// Kind of the named object, or `None` for a number that no arena gave out.
    pub const fn kind(self) -> Option<Kind> {
        Kind::from_u8((self.bits >> (PREFIX_SHIFT + TAG_BITS)) as u8)
    }

    /// Tag of the arena.
    pub const fn tag(self) -> u16 {
        ((self.bits >> PREFIX_SHIFT) & TAG_MASK) as u16
    }

    /// Whether this is the null handle.
    pub const fn is_null(self) -> bool {
        self.bits == 0
    }

    /// Kind and tag as one number, for one comparison.
    #[inline]
    pub(crate) const fn prefix(self) -> u64 {
        self.bits >> PREFIX_SHIFT
    }

    #[inline]
    pub(crate) const fn generation(self) -> u32 {
        ((self.bits >> INDEX_BITS) & GENERATION_MASK) as u32
    }

    /// Position of the slot; see `pages.rs`.
    #[inline]
    pub(crate) const fn place(self) -> u32 {
        (self.bits & INDEX_MASK) as u32
    }

    /// The same kind, tag and generation at another place.
    #[inline]
    pub(crate) const fn at(self, place: u32) -> Self {
        Self::from_u64(self.bits & !INDEX_MASK | place as u64)
    }

    /// The handle with generation 0; see [`Handle::with_generation`].
    #[inline]
    pub(crate) const fn base(self) -> u64 {
        self.bits & !(GENERATION_MASK << INDEX_BITS)
    }

    /// Adds a generation to `base`, in which it is 0.
    #[inline]
    pub(crate) const fn with_generation(base: u64, generation: u32) -> Self {
        Self::from_u64(base | (generation as u64) << INDEX_BITS)
    }
}

/// Kind and tag in their places above [`PREFIX_SHIFT`], shifted down.
pub(crate) const fn prefix(kind: Kind, tag: u16) -> u64 {
    (kind.0 as u64) << TAG_BITS | (tag as u64 & TAG_MASK)
}

impl<T> Clone for Handle<T> {
    #[inline]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Handle<T> {}

impl<T> PartialEq for Handle<T> {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.bits == other.bits
    }
}

impl<T> Eq for Handle<T> {}

impl<T> PartialOrd for Handle<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Handle<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.bits.cmp(&other.bits)
    }
}

impl<T> Hash for Handle<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bits.hash(state);
    }
}

impl<T> fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({self})")
    }
}

/// `kind.tag.number-of-slot@generation`, for messages; the form carries no promise.
impl<T> fmt::Display for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_null() {
            return f.write_str("null");
        }
        let kind = self.bits >> (PREFIX_SHIFT + TAG_BITS);
        write!(f, "{kind}.{}.{}@{}", self.tag(), pages::key(self.place()), self.generation())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_from_the_number() {
        let base = prefix(Kind::new(15), 0xABC) << PREFIX_SHIFT | 0x00FE_DCBA;
        let handle = Handle::<String>::with_generation(base, 0x0012_3456);
        let again = Handle::<String>::from_u64(handle.to_u64());
        assert_eq!(again, handle);
        assert_eq!(again.kind(), Some(Kind::new(15)));
        assert_eq!(again.tag(), 0xABC);
        assert_eq!(again.place(), 0x00FE_DCBA);
        assert_eq!(again.generation(), 0x0012_3456);
        assert_eq!(again.to_string(), "15.2748.13556890@1193046");
    }

    #[test]
    fn null_is_zero_and_has_no_kind() {
        assert_eq!(Handle::<u8>::NULL.to_u64(), 0);
        assert!(Handle::<u8>::NULL.is_null());
        assert_eq!(Handle::<u8>::NULL.kind(), None);
        assert_eq!(Handle::<u8>::NULL.to_string(), "null");
    }

    #[test]
    fn kinds_are_one_to_fifteen() {
        assert_eq!(Kind::from_u8(0), None);
        assert_eq!(Kind::from_u8(16), None);
        assert_eq!(Kind::from_u8(7).map(Kind::to_u8), Some(7));
    }

    #[test]
    fn handles_are_copy_and_send_for_every_type() {
        fn name<H: Copy + Ord + std::hash::Hash + fmt::Debug + Send + Sync>() {}
        name::<Handle<std::cell::Cell<*const u8>>>();
    }
}

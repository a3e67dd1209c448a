//! Named holders: records which references to an object have a name, and their call sites.
//!
//! Every long-lived holder (an edge, a backend, a job) takes its reference as a [`Held`], so "node
//! is in use" errors and leak reports can name it. Registering takes the slot's side lock and one
//! allocation; release takes no lock: the record is owned by the `Held`, the list knows it weakly,
//! and the next registration or listing removes dead entries.
//!
//! Anonymous references (plain `Strong`) are only counted, in debug builds too. Recording where
//! each was cloned would put an allocation and a lock into every clone, make the reference larger,
//! and have debug builds test another program than the one that ships. References that matter have
//! names.

use std::{
    fmt,
    ops::Deref,
    panic::Location,
    sync::{Arc, Weak},
};

use crate::strong::{Release, Strong};

/// A kind of holder: a label that the user of the arena chooses ("edge", "backend", "job").
///
/// Two kinds are equal if their labels are. A user with a fixed set of kinds has an enum with
/// `From` into this type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HolderKind(&'static str);

impl HolderKind {
    /// The kind with this label.
    pub const fn new(label: &'static str) -> Self {
        Self(label)
    }

    /// The label.
    pub const fn as_str(self) -> &'static str {
        self.0
    }
}

impl From<&'static str> for HolderKind {
    fn from(label: &'static str) -> Self {
        Self(label)
    }
}

impl fmt::Display for HolderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Identifies a holder among those of its kind.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum HolderName {
    /// By name.
    Text(Arc<str>),
    /// By number.
    Id(u64),
}

impl fmt::Display for HolderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Id(id) => write!(f, "#{id}"),
        }
    }
}

impl From<&str> for HolderName {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for HolderName {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<Arc<str>> for HolderName {
    fn from(text: Arc<str>) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for HolderName {
    fn from(id: u64) -> Self {
        Self::Id(id)
    }
}

/// Kind and name of a holder.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Holder {
    /// Its kind.
    pub kind: HolderKind,
    /// Its name.
    pub name: HolderName,
}

impl Holder {
    /// A holder of this kind and name (text or number).
    pub fn new(kind: impl Into<HolderKind>, name: impl Into<HolderName>) -> Self {
        Self { kind: kind.into(), name: name.into() }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            HolderName::Text(text) => write!(f, "{} '{text}'", self.kind),
            HolderName::Id(id) => write!(f, "{} #{id}", self.kind),
        }
    }
}

/// A named reference as [`Arena::holders`](crate::Arena::holders) lists it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HolderInfo {
    /// Its kind.
    pub kind: HolderKind,
    /// Its name.
    pub name: HolderName,
    /// Call site that took the reference.
    pub since: &'static Location<'static>,
}

impl fmt::Display for HolderInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holder = Holder { kind: self.kind, name: self.name.clone() };
        write!(f, "{holder} (since {})", self.since)
    }
}

/// A record in a holder list; listed for as long as its `Held` exists.
pub(crate) struct Entry {
    holder: Holder,
    since: &'static Location<'static>,
}

/// The named holders of one object.
#[derive(Default)]
pub(crate) struct HolderList(Vec<Weak<Entry>>);

impl HolderList {
    pub(crate) fn add(&mut self, entry: &Arc<Entry>) {
        // Remove dead entries whenever the list would have to grow: constant time on average.
        if self.0.len() == self.0.capacity() {
            self.0.retain(|entry| entry.strong_count() > 0);
        }
        self.0.push(Arc::downgrade(entry));
    }

    pub(crate) fn list(&mut self) -> Vec<HolderInfo> {
        self.0.retain(|entry| entry.strong_count() > 0);
        let info = |entry: Arc<Entry>| HolderInfo {
            kind: entry.holder.kind,
            name: entry.holder.name.clone(),
            since: entry.since,
        };
        self.0.iter().filter_map(Weak::upgrade).map(info).collect()
    }
}

/// A reference with a named holder. Derefs to the reference ([`Strong`]), and through it to the
/// object.
///
/// Its name is removed from the list before the reference is released, so a listed holder is always
/// counted.
pub struct Held<T> {
    // Fields drop in this order: first the name, then the reference.
    entry: Arc<Entry>,
    strong: Strong<T>,
}

impl<T> Held<T> {
    pub(crate) fn register(
        strong: Strong<T>,
        holder: Holder,
        since: &'static Location<'static>,
    ) -> Self {
        let entry = Arc::new(Entry { holder, since });
        strong.enroll(&entry);
        Self { entry, strong }
    }

    /// Kind and name of the holder.
    pub fn holder(&self) -> &Holder {
        &self.entry.holder
    }

    /// Call site that took the reference.
    pub fn since(&self) -> &'static Location<'static> {
        self.entry.since
    }

    /// Removes the name, releases the reference and says whether it was the last.
    pub fn release(self) -> Release {
        self.into_strong().release()
    }

    /// Removes the name and keeps the reference.
    pub fn into_strong(self) -> Strong<T> {
        let Self { entry, strong } = self;
        drop(entry);
        strong
    }

    /// Renames the holder: the reference has this name from now on.
    #[track_caller]
    pub fn pass_to(self, holder: Holder) -> Self {
        self.pass_since(holder, Location::caller())
    }

    /// As [`pass_to`](Self::pass_to), with the call site given: for a function that acts for its
    /// caller.
    pub fn pass_since(self, holder: Holder, since: &'static Location<'static>) -> Self {
        // The new name first: the object is never without one.
        let Self { entry, strong } = self;
        let next = Self::register(strong, holder, since);
        drop(entry);
        next
    }
}

/// Makes another reference with the same kind and name; its call site is that of `clone`.
impl<T> Clone for Held<T> {
    #[track_caller]
    fn clone(&self) -> Self {
        Self::register(self.strong.clone(), self.holder().clone(), Location::caller())
    }
}

impl<T> Deref for Held<T> {
    type Target = Strong<T>;

    fn deref(&self) -> &Strong<T> {
        &self.strong
    }
}

impl<T> fmt::Debug for Held<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let handle = self.strong.handle();
        write!(f, "Held({handle} by {} since {})", self.holder(), self.entry.since)
    }
}

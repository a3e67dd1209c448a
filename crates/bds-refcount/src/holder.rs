//! Named holders: who refers to an object, what for, and since where.
//!
//! Every holder that stays (an edge, a backend, a job) takes its reference as a [`Held`], so "node is in use" and leak
//! reports can name it. Registering takes the slot's side lock and one allocation; giving up takes no lock: the record
//! is owned by the `Held`, the roll knows it weakly, and whoever next registers or lists strikes it off.
//!
//! Anonymous references (plain `Strong`) are only counted, in debug builds too. Recording where each was cloned would
//! put an allocation and a lock into every clone, make the reference larger, and have debug builds test another
//! program than the one that ships. What matters is held by name.

use std::{
    fmt,
    ops::Deref,
    panic::Location,
    sync::{Arc, Weak},
};

use crate::strong::{Release, Strong};

/// What sort of holder.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum HolderKind {
    /// The creator, or whoever it passed the object on to.
    Owner,
    /// A parent's edge to its child.
    Edge,
    /// The monitor's list of what the user made.
    Monitor,
    /// A backend's root.
    Backend,
    /// A job.
    Job,
    /// An export.
    Export,
    /// A drained section.
    Drain,
    /// An iteration that stands at this object.
    Iterator,
    /// A graph change being staged.
    Change,
    /// A user of the library.
    User,
    /// Anything else, in a word.
    Other(&'static str),
}

impl fmt::Display for HolderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owner => "owner",
            Self::Edge => "edge",
            Self::Monitor => "monitor",
            Self::Backend => "backend",
            Self::Job => "job",
            Self::Export => "export",
            Self::Drain => "drain",
            Self::Iterator => "iterator",
            Self::Change => "change",
            Self::User => "user",
            Self::Other(word) => word,
        })
    }
}

/// Which one of its kind.
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

/// The name under which a reference is held.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Holder {
    /// What sort of holder.
    pub kind: HolderKind,
    /// Which one.
    pub name: HolderName,
}

impl Holder {
    /// A holder of this kind and name (text or number).
    pub fn new(kind: HolderKind, name: impl Into<HolderName>) -> Self {
        Self { kind, name: name.into() }
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

/// One line of the answer to "who holds this?".
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HolderInfo {
    /// What sort of holder.
    pub kind: HolderKind,
    /// Which one.
    pub name: HolderName,
    /// Where in the program the reference was taken.
    pub since: &'static Location<'static>,
}

impl fmt::Display for HolderInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holder = Holder { kind: self.kind, name: self.name.clone() };
        write!(f, "{holder} (since {})", self.since)
    }
}

/// A record on a roll; on it for as long as its `Held` exists.
pub(crate) struct Entry {
    holder: Holder,
    since: &'static Location<'static>,
}

/// The named holders of one object.
#[derive(Default)]
pub(crate) struct Roll(Vec<Weak<Entry>>);

impl Roll {
    pub(crate) fn add(&mut self, entry: &Arc<Entry>) {
        // Strike off those who left whenever the list would have to grow: constant time on average.
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

/// A reference held by name. Gives the reference ([`Strong`]), and through it the object.
///
/// Its name is struck off before the reference is given up, so a listed holder always counts.
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

    /// The name under which this is held.
    pub fn holder(&self) -> &Holder {
        &self.entry.holder
    }

    /// Where in the program it was taken.
    pub fn since(&self) -> &'static Location<'static> {
        self.entry.since
    }

    /// Strikes the name off, gives the reference up and says whether it was the last.
    pub fn release(self) -> Release {
        self.into_strong().release()
    }

    /// Strikes the name off and leaves the reference.
    pub fn into_strong(self) -> Strong<T> {
        let Self { entry, strong } = self;
        drop(entry);
        strong
    }

    /// Passes the reference on to another holder.
    #[track_caller]
    pub fn pass_to(self, holder: Holder) -> Self {
        self.pass_since(holder, Location::caller())
    }

    /// As [`pass_to`](Self::pass_to), since another place in the program: for whoever does it on a caller's behalf.
    pub fn pass_since(self, holder: Holder, since: &'static Location<'static>) -> Self {
        // The new name first: the object is never without one.
        let Self { entry, strong } = self;
        let next = Self::register(strong, holder, since);
        drop(entry);
        next
    }
}

/// Another reference under the same name, since here.
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

//! The bitmaps of a node: their states, and what each state allows.
//!
//! ```text
//!              recording   busy (leased)             readonly       inconsistent
//! clear        yes         no                        no             no
//! merge into   yes         no                        no             no
//! merge from   yes         no                        yes            no
//! enable …     yes         no                        yes            no
//! lease        yes         no: one lease at a time   yes            no
//! remove       yes         no                        no             yes
//! ```
//!
//! A leased bitmap may be *split*: it is frozen then, and a successor records instead. The verbs
//! are in `verbs` and `edit`, guards in `lease`.

use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::sync::Mutex as AsyncMutex;

use super::recorder::Recorder;
use crate::bitmap::HBitmap;
use crate::error::{Error, ErrorKind, Result};

/// The lease of a bitmap.
#[derive(Clone)]
pub(super) struct Lease {
    /// Tells it from other leases of the bitmap.
    pub(super) token: u64,
    pub(super) holder: Arc<str>,
    /// Records instead of the bitmap, which is frozen.
    pub(super) successor: Option<Arc<HBitmap>>,
}

/// One bitmap.
#[derive(Clone)]
pub(super) struct Entry {
    /// Given out once in the life of the node.
    pub(super) number: u64,
    pub(super) name: Option<Arc<str>>,
    /// The owner of an anonymous one.
    pub(super) owner: Option<Arc<str>>,
    /// Clean and meaningless if it is inconsistent.
    pub(super) bits: Arc<HBitmap>,
    pub(super) is_enabled: bool,
    pub(super) is_persistent: bool,
    /// It is persistent, and the node cannot be written.
    pub(super) is_readonly: bool,
    pub(super) is_inconsistent: bool,
    pub(super) lease: Option<Lease>,
}

/// Names a lease: a bitmap's number and the lease's token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LeaseKey {
    pub(super) number: u64,
    pub(super) token: u64,
}

/// What a verb needs of a bitmap.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Its contents are read, or its flags change.
    Use,
    /// Its contents change.
    Modify,
    /// It goes.
    Remove,
}

impl Entry {
    /// An enabled bitmap without name and owner.
    pub(super) fn new(bits: HBitmap) -> Self {
        Self {
            number: 0,
            name: None,
            owner: None,
            bits: Arc::new(bits),
            is_enabled: true,
            is_persistent: false,
            is_readonly: false,
            is_inconsistent: false,
            lease: None,
        }
    }

    pub(super) fn describe(&self) -> String {
        match (&self.name, &self.owner) {
            (Some(name), _) => format!("bitmap '{name}'"),
            (None, owner) => {
                format!("an anonymous bitmap of {}", owner.as_deref().unwrap_or("no owner"))
            }
        }
    }

    fn subject(&self) -> String {
        match &self.name {
            Some(name) => format!("Bitmap '{name}'"),
            None => "The anonymous bitmap".to_owned(),
        }
    }

    /// Checks that its state allows what is needed.
    ///
    /// # Errors
    /// With QEMU's texts: `InUse`, `ReadOnly`, `InvalidInput` if it is inconsistent.
    pub(super) fn check(&self, need: Need) -> Result<()> {
        if let Some(lease) = &self.lease {
            let text = "is currently in use by another operation and cannot be used";
            let error = Error::new(ErrorKind::InUse, format!("{} {text}", self.subject()));
            return Err(error.caused_by(Holds(Arc::clone(&lease.holder))));
        }
        if self.is_readonly && need != Need::Use {
            return Err(self.readonly());
        }
        match need {
            Need::Remove => Ok(()),
            Need::Use | Need::Modify => self.check_consistent(),
        }
    }

    /// # Errors
    /// `InvalidInput`: it is inconsistent.
    pub(super) fn check_consistent(&self) -> Result<()> {
        if !self.is_inconsistent {
            return Ok(());
        }
        let text = format!(
            "{} is inconsistent and cannot be used; it can only be removed (block-dirty-bitmap-remove)",
            self.subject()
        );
        Err(Error::new(ErrorKind::InvalidInput, text))
    }

    /// Checks that the node may be resized.
    pub(super) fn check_resize(&self, len: u64) -> Result<()> {
        self.check(Need::Modify)?;
        let granules = len.div_ceil(u64::from(self.bits.granularity()));
        if granules > crate::bitmap::MAX_GRANULES {
            let text = format!("{} would have more than 2^32 granules", self.subject());
            return Err(Error::new(ErrorKind::LimitExceeded, text));
        }
        Ok(())
    }

    fn readonly(&self) -> Error {
        let text = format!("{} is readonly and cannot be modified", self.subject());
        Error::new(ErrorKind::ReadOnly, text)
    }

    /// The bits that record writes now.
    fn recording(&self) -> Option<&Arc<HBitmap>> {
        let is_recording = self.is_enabled && !self.is_readonly && !self.is_inconsistent;
        let successor = self.lease.as_ref().and_then(|lease| lease.successor.as_ref());
        is_recording.then(|| successor.unwrap_or(&self.bits))
    }

    fn all_bits(&self) -> impl Iterator<Item = &Arc<HBitmap>> {
        let successor = self.lease.as_ref().and_then(|lease| lease.successor.as_ref());
        [Some(&self.bits), successor].into_iter().flatten()
    }

    /// The bits with those of the successor, if there is one.
    pub(super) fn merged_bits(&self) -> Result<Arc<HBitmap>> {
        let Some(successor) = self.all_bits().nth(1) else { return Ok(Arc::clone(&self.bits)) };
        let merged = self.bits.resized(self.bits.len())?;
        merged.take_over(successor);
        Ok(Arc::new(merged))
    }

    /// Freezes a leased bitmap: a successor, clean at first, records instead.
    ///
    /// # Errors
    /// `InvalidInput`: it was split before.
    pub(super) fn split(&mut self) -> Result<()> {
        let lease = self.lease.as_mut().filter(|lease| lease.successor.is_none());
        let Some(lease) = lease else {
            let text = format!("{} was split already", self.subject());
            return Err(Error::new(ErrorKind::InvalidInput, text));
        };
        let successor = HBitmap::new(0, self.bits.granularity())?;
        successor.set_len(self.bits.len());
        lease.successor = Some(Arc::new(successor));
        Ok(())
    }

    /// Puts the successor in the place of a bitmap that was split, ends the lease, and returns the
    /// successor.
    ///
    /// # Errors
    /// `InvalidInput`: it was not split.
    pub(super) fn abdicate(&mut self) -> Result<Arc<HBitmap>> {
        let Some(successor) = self.lease.as_ref().and_then(|lease| lease.successor.clone()) else {
            let text = format!("{} was not split", self.subject());
            return Err(Error::new(ErrorKind::InvalidInput, text));
        };
        self.lease = None;
        self.bits = Arc::clone(&successor);
        Ok(successor)
    }
}

/// The cause of a refusal: who has the lease.
#[derive(Debug)]
struct Holds(Arc<str>);

impl std::fmt::Display for Holds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} holds it", self.0)
    }
}

impl std::error::Error for Holds {}

/// The bitmaps by age, the oldest first.
#[derive(Clone, Default)]
pub(super) struct State {
    pub(super) entries: Vec<Entry>,
    last_number: u64,
    last_token: u64,
    /// There was a persistent bitmap: the image may hold one.
    pub(super) had_persistent: bool,
    /// A persistent bitmap changed while its copy in the image may still count as valid.
    pub(super) is_stale: bool,
    /// The node has ended.
    pub(super) is_closed: bool,
}

impl State {
    /// Adds a bitmap, whose number is set here. The caller has checked the name.
    pub(super) fn insert(&mut self, entry: Entry) -> u64 {
        self.last_number += 1;
        self.had_persistent |= entry.is_persistent;
        self.entries.push(Entry { number: self.last_number, ..entry });
        self.last_number
    }

    pub(super) fn find(&self, number: u64) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.number == number)
    }

    pub(super) fn find_mut(&mut self, number: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.number == number)
    }

    /// # Errors
    /// `NotFound`.
    pub(super) fn named(&self, name: &str) -> Result<&Entry> {
        let found = self.entries.iter().find(|entry| entry.name.as_deref() == Some(name));
        found.ok_or_else(|| not_found(name))
    }

    /// # Errors
    /// `NotFound`.
    pub(super) fn named_mut(&mut self, name: &str) -> Result<&mut Entry> {
        let mut all = self.entries.iter_mut();
        all.find(|entry| entry.name.as_deref() == Some(name)).ok_or_else(|| not_found(name))
    }

    /// Leases a bitmap.
    ///
    /// # Errors
    /// `NotFound`, or as [`Entry::check`].
    pub(super) fn lease(
        &mut self,
        number: u64,
        holder: &str,
        need: Need,
    ) -> Result<(LeaseKey, Arc<HBitmap>)> {
        let token = self.last_token + 1;
        let Some(entry) = self.find_mut(number) else { return Err(removed()) };
        entry.check(need)?;
        entry.lease = Some(Lease { token, holder: holder.into(), successor: None });
        let bits = Arc::clone(&entry.bits);
        self.last_token = token;
        Ok((LeaseKey { number, token }, bits))
    }

    /// The bitmap, if this lease of it lasts.
    pub(super) fn leased(&mut self, key: LeaseKey) -> Option<&mut Entry> {
        let entry = self.find_mut(key.number)?;
        entry.lease.as_ref().is_some_and(|lease| lease.token == key.token).then_some(entry)
    }

    pub(super) fn has_persistent(&self) -> bool {
        self.entries.iter().any(|entry| entry.is_persistent)
    }

    pub(super) fn has_name(&self, name: &str) -> bool {
        self.entries.iter().any(|entry| entry.name.as_deref() == Some(name))
    }

    pub(super) fn remove(&mut self, number: u64) {
        self.entries.retain(|entry| entry.number != number);
    }

    /// Makes all bitmaps as long as the node, which may have grown by a write, or been resized from
    /// below. Requests may record meanwhile.
    pub(super) fn follow(&self, len: &impl Fn() -> u64) {
        for bits in self.entries.iter().flat_map(Entry::all_bits) {
            let wanted = len();
            if bits.len() > wanted {
                bits.set_len(wanted);
                // A write behind the end may have made the node longer, and its mark may have been
                // dropped just now. It came after the new length, which is seen here then.
                let now = len();
                bits.grow(now);
                bits.set(wanted..now);
            } else {
                bits.grow(wanted);
            }
        }
    }
}

/// The error for a number that has no bitmap any more.
pub(super) fn removed() -> Error {
    Error::new(ErrorKind::NotFound, "the bitmap was removed")
}

fn not_found(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found"))
}

/// What a node and the guards of its bitmaps share.
#[derive(Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Held while the driver's store is used.
    pub(super) store_turn: AsyncMutex<()>,
    recorder: Recorder,
}

impl Shared {
    pub(super) fn lock(&self) -> Locked<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { state, recorder: &self.recorder }
    }
}

/// A node's bitmaps, locked.
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    recorder: &'a Recorder,
}

impl Locked<'_> {
    /// Lets requests record as the entries say now.
    pub(super) fn publish(&self) {
        let recording = self.state.entries.iter().filter_map(Entry::recording);
        self.recorder.publish(recording.cloned().collect());
    }

    /// Ends the lease, unless it has ended: its successor is merged back.
    pub(super) fn reclaim(&mut self, key: LeaseKey) {
        let Some(entry) = self.state.leased(key) else { return };
        let bits = Arc::clone(&entry.bits);
        let Some(successor) = entry.lease.take().and_then(|lease| lease.successor) else { return };
        // First no request marks in the successor any more, then it is merged.
        self.publish();
        bits.grow(successor.len());
        bits.take_over(&successor);
    }
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

/// A node's bitmaps.
#[derive(Default)]
pub(in crate::graph) struct BitmapList {
    /// Set before the first bitmap comes, for ever: requests to nodes without bitmaps look no
    /// further.
    had_any: AtomicBool,
    /// A bitmap is read-only: the node must not be written.
    is_readonly: AtomicBool,
    shared: Arc<Shared>,
}

/// A node's bitmaps as reached from below.
pub(in crate::graph) struct BitmapSlot(Arc<Shared>);

impl BitmapSlot {
    /// Checks that all bitmaps can follow the node to this length: none is busy, read-only or
    /// inconsistent.
    pub(in crate::graph) fn check_resize(&self, len: u64) -> Result<()> {
        self.0.lock().entries.iter().try_for_each(|entry| entry.check_resize(len))
    }
}

impl BitmapList {
    /// What is shared with guards, for a bitmap that comes.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        self.had_any.store(true, Ordering::SeqCst);
        &self.shared
    }

    /// What is shared with guards, if the node ever had a bitmap.
    pub(super) fn existing(&self) -> Option<&Arc<Shared>> {
        self.had_any.load(Ordering::SeqCst).then_some(&self.shared)
    }

    /// The bitmaps, if the node ever had one.
    pub(super) fn get(&self) -> Option<Locked<'_>> {
        self.existing().map(|shared| shared.lock())
    }

    /// The number of the bitmap of this name.
    ///
    /// # Errors
    /// `NotFound`.
    pub(super) fn number_of(&self, name: &str) -> Result<u64> {
        match self.get() {
            Some(locked) => locked.named(name).map(|entry| entry.number),
            None => Err(not_found(name)),
        }
    }

    /// Locks the bitmaps of a node of this length.
    pub(super) fn lock(&self, len: impl Fn() -> u64) -> Locked<'_> {
        let locked = self.shared().lock();
        locked.follow(&len);
        locked
    }

    /// Whether one of them is persistent.
    pub(in crate::graph) fn has_persistent(&self) -> bool {
        self.get().is_some_and(|locked| locked.has_persistent())
    }

    /// Marks persistent bitmaps as read-only, or not. While one is, the node refuses writes.
    pub(in crate::graph) fn set_readonly(&self, is_readonly: bool) {
        let Some(mut locked) = self.get() else { return };
        let mut any = false;
        for entry in locked.entries.iter_mut().filter(|entry| entry.is_persistent) {
            entry.is_readonly = is_readonly;
            any |= is_readonly;
        }
        self.is_readonly.store(any, Ordering::Relaxed);
        locked.publish();
    }

    /// Whether a bitmap forbids writes to the node.
    #[inline]
    pub(in crate::graph) fn is_readonly(&self) -> bool {
        self.is_readonly.load(Ordering::Relaxed)
    }

    /// The error of a write that [`BitmapList::is_readonly`] refuses.
    pub(in crate::graph) fn refuse_write(&self) -> Result<()> {
        let Some(locked) = self.get() else { return Ok(()) };
        let refused = locked.entries.iter().find(|entry| entry.is_readonly);
        refused.map_or(Ok(()), |entry| Err(entry.readonly()))
    }

    /// Makes all bitmaps as long as the node is.
    pub(in crate::graph) fn follow(&self, len: impl Fn() -> u64) {
        if let Some(locked) = self.get() {
            locked.follow(&len);
        }
    }

    /// A handle for those that reach the node from below.
    pub(in crate::graph) fn slot(&self) -> BitmapSlot {
        BitmapSlot(Arc::clone(&self.shared))
    }

    /// Marks what a request has changed. One load if the node never had a bitmap.
    #[inline]
    pub(in crate::graph) fn record(&self, range: &Range<u64>, len: impl Fn() -> u64) {
        if self.had_any.load(Ordering::SeqCst) {
            self.shared.recorder.record(range, len);
        }
    }

    /// The node ends, and its bitmaps with it. `Err` names those that are leased, and anonymous
    /// ones that their owner still has.
    pub(in crate::graph) fn close(&self) -> Result<()> {
        let Some(mut state) = self.get() else { return Ok(()) };
        state.is_closed = true;
        let entries = std::mem::take(&mut state.entries);
        state.publish();
        let left: Vec<String> = entries
            .iter()
            .filter_map(|entry| match (&entry.lease, &entry.owner) {
                (Some(lease), _) => {
                    Some(format!("{} is in use by {}", entry.describe(), lease.holder))
                }
                (None, Some(_)) => {
                    Some(format!("{} was not removed by its owner", entry.describe()))
                }
                (None, None) => None,
            })
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InUse, format!("the node ended while {}", left.join(", "))))
    }
}

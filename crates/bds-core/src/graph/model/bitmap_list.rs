//! The list of a node's dirty bitmaps by number: names, owners, leases.
//!
//! The public side, with ids and guards, is in `bitmap_leases`.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use slab::Slab;

use crate::error::{Error, ErrorKind, Result};

/// One bitmap.
pub(super) struct Entry {
    pub(super) number: u64,
    pub(super) name: Option<Arc<str>>,
    /// The owner of an anonymous one.
    pub(super) owner: Option<Arc<str>>,
    pub(super) leased_by: Option<Arc<str>>,
}

impl Entry {
    pub(super) fn describe(&self) -> String {
        match (&self.name, &self.owner) {
            (Some(name), _) => format!("bitmap '{name}'"),
            (None, owner) => {
                format!("an anonymous bitmap of {}", owner.as_deref().unwrap_or("no owner"))
            }
        }
    }
}

#[derive(Default)]
pub(super) struct State {
    pub(super) entries: Slab<Entry>,
    last_number: u64,
    /// The node has ended.
    pub(super) is_closed: bool,
}

impl State {
    /// Adds a bitmap and returns its number. `None`: the name is taken.
    pub(super) fn insert(
        &mut self,
        name: Option<Arc<str>>,
        owner: Option<Arc<str>>,
    ) -> Option<u64> {
        if name.is_some() && self.entries.iter().any(|(_, entry)| entry.name == name) {
            return None;
        }
        self.last_number += 1;
        let number = self.last_number;
        self.entries.insert(Entry { number, name, owner, leased_by: None });
        Some(number)
    }

    pub(super) fn find(&mut self, number: u64) -> Option<(usize, &mut Entry)> {
        self.entries.iter_mut().find(|(_, entry)| entry.number == number)
    }
}

/// A node's bitmaps. Allocates nothing before the first.
#[derive(Default)]
pub(in crate::graph) struct BitmapList(OnceLock<Arc<Mutex<State>>>);

impl BitmapList {
    pub(super) fn state(&self) -> Arc<Mutex<State>> {
        Arc::clone(self.0.get_or_init(Arc::default))
    }

    /// The state, if the node ever had a bitmap.
    pub(super) fn get(&self) -> Option<MutexGuard<'_, State>> {
        self.0.get().map(|state| lock(state))
    }

    /// The node ends, and its bitmaps with it. `Err` names those that are leased, and anonymous
    /// ones that their owner still has.
    pub(in crate::graph) fn close(&self) -> Result<()> {
        let Some(mut state) = self.get() else { return Ok(()) };
        state.is_closed = true;
        let entries = std::mem::take(&mut state.entries);
        let left: Vec<String> = entries
            .iter()
            .filter_map(|(_, entry)| match (&entry.leased_by, &entry.owner) {
                (Some(holder), _) => Some(format!("{} is in use by {holder}", entry.describe())),
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

pub(super) fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Edits of bitmaps: several at once, on several nodes, all or nothing.
//!
//! Edits are staged on copies of the lists of bitmaps, each on the outcome of those before it,
//! while all lists are locked. What changes bits is put off: it cannot fail. A stage that is
//! dropped has done nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::info::{BitmapOptions, MAX_BITMAP_NAME_LEN};
use super::list::{Entry, LeaseKey, Locked, Need, Shared, State};
use super::persist;
use crate::bitmap::HBitmap;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::NodeRef;
use crate::graph::model::node::NodeId;

/// One edit of a node's bitmaps.
#[derive(Debug)]
pub(in crate::graph) struct BitmapEdit {
    pub(in crate::graph) node: NodeRef,
    pub(super) verb: Verb,
}

#[derive(Debug)]
pub(super) enum Verb {
    Add(BitmapOptions),
    Remove(String),
    Clear(String),
    Enable(String),
    Disable(String),
    Merge {
        target: String,
        sources: Vec<(NodeRef, String)>,
    },
    Split(LeaseKey),
    /// With what the successor gets in addition.
    Abdicate(LeaseKey, Option<Arc<HBitmap>>),
}

impl BitmapEdit {
    pub(in crate::graph) fn add(node: &NodeRef, options: BitmapOptions) -> Self {
        Self { node: node.clone(), verb: Verb::Add(options) }
    }

    pub(in crate::graph) fn remove(node: &NodeRef, name: &str) -> Self {
        Self { node: node.clone(), verb: Verb::Remove(name.to_owned()) }
    }

    pub(in crate::graph) fn clear(node: &NodeRef, name: &str) -> Self {
        Self { node: node.clone(), verb: Verb::Clear(name.to_owned()) }
    }

    pub(in crate::graph) fn enable(node: &NodeRef, name: &str) -> Self {
        Self { node: node.clone(), verb: Verb::Enable(name.to_owned()) }
    }

    pub(in crate::graph) fn disable(node: &NodeRef, name: &str) -> Self {
        Self { node: node.clone(), verb: Verb::Disable(name.to_owned()) }
    }

    pub(in crate::graph) fn merge(
        node: &NodeRef,
        target: &str,
        sources: &[(&NodeRef, &str)],
    ) -> Self {
        let sources = sources.iter().map(|(node, name)| (NodeRef::clone(node), (*name).to_owned()));
        let verb = Verb::Merge { target: target.to_owned(), sources: sources.collect() };
        Self { node: node.clone(), verb }
    }

    /// All nodes that are involved.
    pub(in crate::graph) fn nodes(&self) -> impl Iterator<Item = &NodeRef> {
        let sources = match &self.verb {
            Verb::Merge { sources, .. } => &sources[..],
            _ => &[],
        };
        std::iter::once(&self.node).chain(sources.iter().map(|(node, _)| node))
    }

    /// Passes each reference through `take`.
    pub(in crate::graph) fn map_nodes(self, take: impl Fn(NodeRef) -> NodeRef) -> Self {
        let verb = match self.verb {
            Verb::Merge { target, sources } => {
                let sources = sources.into_iter().map(|(node, name)| (take(node), name)).collect();
                Verb::Merge { target, sources }
            }
            verb => verb,
        };
        Self { node: take(self.node), verb }
    }

    /// Fills in the default granularity, which the driver may have to be asked for.
    pub(in crate::graph) async fn resolve(&mut self) -> Result<()> {
        if let Verb::Add(options) = &mut self.verb
            && options.granularity.is_none()
        {
            options.granularity = Some(persist::default_granularity(&self.node).await?);
        }
        Ok(())
    }

    /// Does it change a bitmap that the image stores? Then the stored copy is marked first.
    pub(super) fn is_about_stored(&self, state: &State) -> bool {
        let is_persistent = |entry: Option<&Entry>| entry.is_some_and(|entry| entry.is_persistent);
        match &self.verb {
            Verb::Add(options) => options.persistent,
            Verb::Clear(name) | Verb::Enable(name) | Verb::Disable(name) => {
                is_persistent(state.named(name).ok())
            }
            Verb::Merge { target, sources } => {
                !sources.is_empty() && is_persistent(state.named(target).ok())
            }
            Verb::Abdicate(key, _) => is_persistent(state.find(key.number)),
            Verb::Remove(_) | Verb::Split(_) => false,
        }
    }
}

/// The lists of the nodes that some edits involve.
pub(in crate::graph) struct Lists(BTreeMap<NodeId, (NodeRef, Arc<Shared>)>);

impl Lists {
    pub(in crate::graph) fn of<'e>(edits: impl IntoIterator<Item = &'e BitmapEdit>) -> Self {
        let nodes = edits.into_iter().flat_map(BitmapEdit::nodes);
        Self(nodes.map(|node| (node.id(), (node.clone(), node.bitmaps.shared().clone()))).collect())
    }

    /// Locks the lists, by the ids of their nodes, and stages the edits.
    ///
    /// # Errors
    /// Of the first edit that is refused.
    pub(in crate::graph) fn stage<'e>(
        &self,
        edits: impl IntoIterator<Item = &'e BitmapEdit>,
    ) -> Result<StagedBitmaps<'_>> {
        let lists = self.0.iter().map(|(id, (node, shared))| {
            let locked = shared.lock();
            locked.follow(&|| node.len());
            (*id, StagedList { node, state: locked.clone(), locked })
        });
        let mut staged =
            StagedBitmaps { lists: lists.collect(), effects: Vec::new(), removed: Vec::new() };
        for edit in edits {
            staged.apply(edit).map_err(|error| error.node(edit.node.name()))?;
        }
        Ok(staged)
    }
}

/// A node's list, locked, and how it is going to be.
struct StagedList<'a> {
    node: &'a NodeRef,
    locked: Locked<'a>,
    state: State,
}

/// What happens to bits.
enum Effect {
    Clear(Arc<HBitmap>),
    Merge { target: Arc<HBitmap>, source: Arc<HBitmap> },
}

/// Edits that are allowed. They take effect with [`StagedBitmaps::commit`].
pub(in crate::graph) struct StagedBitmaps<'a> {
    lists: BTreeMap<NodeId, StagedList<'a>>,
    effects: Vec<Effect>,
    removed: Vec<(NodeRef, Arc<str>)>,
}

impl StagedBitmaps<'_> {
    /// Takes effect. Returns the removed bitmaps that images may still have.
    pub(in crate::graph) fn commit(self) -> Vec<(NodeRef, Arc<str>)> {
        for effect in self.effects {
            match effect {
                Effect::Clear(bits) => bits.clear(0..u64::MAX),
                Effect::Merge { target, source } => target.take_over(&source),
            }
        }
        for StagedList { node, mut locked, state } in self.lists.into_values() {
            *locked = state;
            locked.publish();
            node.tracker().observe_writes();
        }
        self.removed
    }

    fn apply(&mut self, edit: &BitmapEdit) -> Result<()> {
        match &edit.verb {
            Verb::Add(options) => self.add(&edit.node, options),
            Verb::Remove(name) => self.remove(&edit.node, name),
            Verb::Clear(name) => {
                let entry = self.named(&edit.node, name, Need::Modify)?;
                entry.recovered_bytes = None;
                let bits = Arc::clone(&entry.bits);
                self.effects.push(Effect::Clear(bits));
                Ok(())
            }
            Verb::Enable(name) => {
                self.named(&edit.node, name, Need::Use)?.is_enabled = true;
                Ok(())
            }
            Verb::Disable(name) => {
                self.named(&edit.node, name, Need::Use)?.is_enabled = false;
                Ok(())
            }
            Verb::Merge { target, sources } => self.merge(&edit.node, target, sources),
            Verb::Split(key) => self.leased(&edit.node, *key)?.split(),
            Verb::Abdicate(key, uncopied) => {
                let bits = self.leased(&edit.node, *key)?.abdicate()?;
                if let Some(source) = uncopied.clone() {
                    check_sizes(bits.len(), source.len())?;
                    self.effects.push(Effect::Merge { target: bits, source });
                }
                self.state(&edit.node).is_stale = true;
                Ok(())
            }
        }
    }

    fn state(&mut self, node: &NodeRef) -> &mut State {
        let list = self.lists.get_mut(&node.id());
        &mut list.expect("the lists of all nodes were taken").state
    }

    fn named(&mut self, node: &NodeRef, name: &str, need: Need) -> Result<&mut Entry> {
        let entry = self.state(node).named_mut(name)?;
        entry.check(need)?;
        Ok(entry)
    }

    fn leased(&mut self, node: &NodeRef, key: LeaseKey) -> Result<&mut Entry> {
        self.state(node).leased(key).ok_or_else(lease_ended)
    }

    fn add(&mut self, node: &NodeRef, options: &BitmapOptions) -> Result<()> {
        let entry = new_entry(node, options)?;
        let state = self.state(node);
        if state.has_name(&options.name) {
            let text = format!("Bitmap already exists: {}", options.name);
            return Err(Error::new(ErrorKind::AlreadyExists, text));
        }
        if options.persistent {
            persist::check_can_store(node, state, &entry)?;
        }
        state.insert(entry);
        Ok(())
    }

    fn remove(&mut self, node: &NodeRef, name: &str) -> Result<()> {
        let entry = self.named(node, name, Need::Remove)?;
        let (number, name) = (entry.number, entry.name.clone());
        let stored = name.filter(|_| entry.is_persistent);
        self.state(node).remove(number);
        self.removed.extend(stored.map(|name| (node.clone(), name)));
        Ok(())
    }

    fn merge(&mut self, node: &NodeRef, target: &str, sources: &[(NodeRef, String)]) -> Result<()> {
        let target = Arc::clone(&self.named(node, target, Need::Modify)?.bits);
        for (from, name) in sources {
            let source = self.named(from, name, Need::Use);
            let source = Arc::clone(&source.map_err(|error| error.node(from.name()))?.bits);
            // A bitmap may reach further than its node after that became shorter from below.
            check_sizes(node.len(), from.len())?;
            if !Arc::ptr_eq(&target, &source) {
                self.effects.push(Effect::Merge { target: Arc::clone(&target), source });
            }
        }
        Ok(())
    }
}

/// The error for a lease that has ended.
pub(super) fn lease_ended() -> Error {
    Error::new(ErrorKind::Stale, "the lease of the bitmap has ended")
}

fn check_sizes(target: u64, source: u64) -> Result<()> {
    if target == source {
        return Ok(());
    }
    let text = format!(
        "Bitmaps are of different sizes (destination size is {target}, source size is {source}) and can't be merged"
    );
    Err(Error::new(ErrorKind::InvalidInput, text))
}

fn new_entry(node: &NodeRef, options: &BitmapOptions) -> Result<Entry> {
    let BitmapOptions { name, granularity, persistent, disabled } = options;
    let refuse = |text: String| Err(Error::new(ErrorKind::InvalidInput, text));
    if name.is_empty() {
        return refuse("Bitmap name cannot be empty".to_owned());
    }
    if name.len() > MAX_BITMAP_NAME_LEN {
        return refuse(format!("Bitmap name too long: {name}"));
    }
    let granularity = granularity.unwrap_or(persist::DEFAULT_GRANULARITY);
    if !granularity.is_power_of_two() || granularity < crate::bitmap::MIN_GRANULARITY {
        return refuse("Granularity must be power of 2 and at least 512".to_owned());
    }
    Ok(Entry {
        name: Some(name.as_str().into()),
        is_enabled: !disabled,
        is_persistent: *persistent,
        ..Entry::new(HBitmap::new(node.len(), granularity)?)
    })
}

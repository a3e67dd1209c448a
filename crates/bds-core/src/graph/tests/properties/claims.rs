//! Runs commands on claims: frozen links, blockers, job slots, bitmaps and their leases.

use futures_util::FutureExt;

use super::commands::{Body, Child, Command, Fault, Tree};
use super::model::{Bitmap, Key, Kind};
use super::open::pick;
use super::run::Comparison;
use crate::graph::{BitmapOptions, NodeRef};

impl Comparison {
    pub(super) fn claim(&mut self, command: &Command) {
        match *command {
            Command::Freeze(top, base) => self.freeze(top, base),
            Command::Thaw(n) => {
                if !self.frozen.is_empty() {
                    let (guard, number) = self.frozen.swap_remove(n % self.frozen.len());
                    drop(guard);
                    self.thaw(number);
                }
            }
            Command::Poison(n) => {
                if let Some(n) = self.pick_ref(n) {
                    self.refs[n].poison();
                    self.node(self.model.refs[n]).is_poisoned = true;
                }
            }
            Command::Block(n, operations) => {
                let Some(n) = self.pick_ref(n) else { return };
                let guard = self.refs[n].block(Self::operations(operations), "a test");
                let (number, key) = (self.model.fresh(), self.model.refs[n]);
                self.node(key).blocks.push((number, operations));
                self.blockers.push((guard, key, number));
            }
            Command::Unblock(n) => {
                if !self.blockers.is_empty() {
                    let (guard, key, number) = self.blockers.swap_remove(n % self.blockers.len());
                    drop(guard);
                    if let Some(node) = self.model.nodes.get_mut(&key) {
                        node.blocks.retain(|(known, _)| *known != number);
                    }
                }
            }
            Command::ClaimJob(n) => {
                let Some(n) = self.pick_ref(n) else { return };
                let (number, key) = (self.model.fresh(), self.model.refs[n]);
                let slot = self.refs[n].claim_job(&format!("job{number}"));
                let is_free = self.node(key).job.is_none();
                assert_eq!(slot.is_ok(), is_free, "P45: one job a node");
                if let Ok(slot) = slot {
                    self.node(key).job = Some(number);
                    self.slots.push((slot, key));
                }
            }
            Command::UnclaimJob(n) => {
                if !self.slots.is_empty() {
                    let (slot, key) = self.slots.swap_remove(n % self.slots.len());
                    drop(slot);
                    if let Some(node) = self.model.nodes.get_mut(&key) {
                        node.job = None;
                    }
                }
            }
            ref other => self.bitmap(other),
        }
    }

    fn node(&mut self, key: Key) -> &mut super::model::Node {
        self.model.nodes.get_mut(&key).unwrap()
    }

    /// P21: all links from top to base, or none.
    fn freeze(&mut self, top: usize, base: usize) {
        let (Some(top), Some(base)) = (self.pick_ref(top), self.pick_ref(base)) else { return };
        let (base, key) = (self.refs[base].clone(), self.model.refs[base]);
        self.freeze_path(top, base, key);
    }

    /// Freezes links of the longest chain, or of any. If the chain is short, inserts filters first.
    pub(super) async fn freeze_chain(&mut self, n: usize, len: usize) {
        for _ in 0..2 {
            let paths = self.model.refs.iter().map(|key| (self.path(*key).len(), *key));
            let Some((links, top)) = paths.max() else { return };
            if links < 3 {
                self.open_filter_on(top).await;
            }
        }
        let paths = (0..self.refs.len()).map(|top| (top, self.path(self.model.refs[top])));
        let mut paths: Vec<(usize, Vec<Key>)> =
            paths.filter(|(_, path)| !path.is_empty()).collect();
        paths.sort_by_key(|(_, path)| std::cmp::Reverse(path.len()));
        let Some((top, path)) =
            paths.get(if n.is_multiple_of(2) { 0 } else { n % paths.len().max(1) })
        else {
            return;
        };
        // The whole chain with higher probability than a part.
        let key = path[path.len() - 1 - len % 4 % path.len()];
        let (id, _) = self.ids.iter().find(|(_, known)| *known == key).unwrap();
        let base = self.graph.acquire(*id).unwrap();
        self.freeze_path(*top, base, key);
    }

    async fn open_filter_on(&mut self, key: Key) {
        let Some(at) = self.model.swept().live().iter().position(|known| *known == key) else {
            return;
        };
        let body = Body::Filter(Box::new(Child::Node(at)));
        let ro = Some(self.model.nodes[&key].ro);
        let fault = Fault::None;
        self.open(&Tree { name: None, ro, discard: false, transfer: 0, fault, body }).await;
    }

    fn freeze_path(&mut self, top: usize, base: NodeRef, key: Key) {
        let chain = self.chain(self.model.refs[top], key);
        let is_free =
            |edges: &Vec<u32>| edges.iter().all(|edge| self.model.edges[edge].frozen.is_none());
        let chain = chain.filter(is_free);
        let frozen = self.graph.freeze_chain(&self.refs[top], &base, "a test");
        drop(base);
        assert_eq!(frozen.is_ok(), chain.is_some(), "P21: {:?}", frozen.err());
        let (Ok(frozen), Some(chain)) = (frozen, chain) else { return };
        assert_eq!(frozen.len(), chain.len(), "P21");
        self.tally.count_if(!chain.is_empty(), "frozen");
        self.tally.count_if(chain.len() > 1, "frozen, more than one link");
        let number = self.model.fresh();
        for edge in chain {
            self.model.edges.get_mut(&edge).unwrap().frozen = Some(number);
        }
        self.frozen.push((frozen, number));
    }

    /// The nodes of the chain below a node, from the top down.
    fn path(&self, top: Key) -> Vec<Key> {
        let mut path = Vec::new();
        let mut at = Some(top);
        while let Some(key) = at {
            let is_filter = self.model.nodes[&key].kind == Kind::Filter;
            let edge = self.model.child(key, if is_filter { "file" } else { "backing" });
            at = edge.and_then(|edge| self.model.edges[&edge].child);
            path.extend(at);
        }
        path
    }

    fn chain(&self, top: Key, base: Key) -> Option<Vec<u32>> {
        let mut edges = Vec::new();
        let mut at = top;
        while at != base {
            let is_filter = self.model.nodes[&at].kind == Kind::Filter;
            let edge = self.model.child(at, if is_filter { "file" } else { "backing" })?;
            edges.push(edge);
            at = self.model.edges[&edge].child?;
        }
        Some(edges)
    }

    fn thaw(&mut self, number: u32) {
        for edge in self.model.edges.values_mut() {
            if edge.frozen == Some(number) {
                edge.frozen = None;
            }
        }
        // Links of closed nodes end with their freeze guard.
        let nodes = &self.model.nodes;
        self.model.edges.retain(|_, edge| {
            edge.parent.is_none_or(|parent| nodes.contains_key(&parent) || edge.frozen.is_some())
        });
    }

    /// P46: an id is valid while its node lives and the bitmap was not removed.
    fn bitmap(&mut self, command: &Command) {
        match *command {
            Command::AddBitmap(n, name) => {
                let Some(n) = self.pick_ref(n) else { return };
                let (key, name) = (self.model.refs[n], format!("b{name}"));
                let added = now(self.refs[n].add_bitmap(BitmapOptions::named(&*name)));
                let node = self.node(key);
                let is_new = node.bitmaps.iter().all(|it| it.name.as_ref() != Some(&name));
                assert_eq!(added.is_ok(), is_new, "P46");
                let Ok(id) = added else { return };
                let number = Self::push_bitmap(self.node(key), Some(name));
                self.bitmaps.push((id, key, number));
            }
            Command::AddAnonymous(n) => {
                let Some(n) = self.pick_ref(n) else { return };
                let key = self.model.refs[n];
                let bitmap = self.refs[n].add_anonymous_bitmap("a test", None).unwrap();
                let number = Self::push_bitmap(self.node(key), None);
                self.bitmaps.push((bitmap.id(), key, number));
                self.anonymous.push((bitmap, key, number));
            }
            Command::DropAnonymous(n) => {
                if !self.anonymous.is_empty() {
                    let (bitmap, key, number) =
                        self.anonymous.swap_remove(n % self.anonymous.len());
                    drop(bitmap);
                    self.forget(key, number);
                }
            }
            Command::Lease(n) => {
                let Some((id, key, number)) = pick(&self.bitmaps, n) else { return };
                let is_live = self.model.is_live(key);
                let lease = self.graph.lease_bitmap(id, "a test");
                let found = self.find(key, number).filter(|it| is_live && !it.leased);
                assert_eq!(lease.is_ok(), found.is_some(), "P46: {:?}", lease.err());
                if let (Ok(lease), Some(found)) = (lease, found) {
                    found.leased = true;
                    self.tally.count("leased");
                    self.leases.push((lease, key, number));
                }
            }
            Command::EndLease(n) => {
                if !self.leases.is_empty() {
                    let (lease, key, number) = self.leases.swap_remove(n % self.leases.len());
                    drop(lease);
                    if let Some(found) = self.find(key, number) {
                        found.leased = false;
                    }
                }
            }
            Command::RemoveBitmap(n) => {
                let Some((id, key, number)) = pick(&self.bitmaps, n) else { return };
                let is_live = self.model.is_live(key);
                let found = self.find(key, number);
                let may = is_live && found.is_some_and(|it| !it.leased && it.name.is_some());
                assert_eq!(now(self.graph.remove_bitmap(id)).is_ok(), may, "P46");
                if may {
                    self.forget(key, number);
                }
            }
            ref other => unreachable!("{other:?} is done elsewhere"),
        }
    }

    fn push_bitmap(node: &mut super::model::Node, name: Option<String>) -> u64 {
        node.last_bitmap += 1;
        node.bitmaps.push(Bitmap { number: node.last_bitmap, name, leased: false });
        node.last_bitmap
    }

    fn find(&mut self, key: Key, number: u64) -> Option<&mut Bitmap> {
        let node = self.model.nodes.get_mut(&key)?;
        node.bitmaps.iter_mut().find(|it| it.number == number)
    }

    fn forget(&mut self, key: Key, number: u64) {
        if let Some(node) = self.model.nodes.get_mut(&key) {
            node.bitmaps.retain(|it| it.number != number);
        }
    }
}

/// The result of a verb that does not wait: the fake drivers store no bitmaps.
fn now<T>(verb: impl Future<Output = T>) -> T {
    verb.now_or_never().expect("nothing to wait for")
}

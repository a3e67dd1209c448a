//! Power cuts: stop a world, and make the worlds that follow it.
//!
//! A cut ends all I/O: nothing completes any more and tasks are dropped. The content that each file
//! keeps is decided when the next world is made, so one cut can be followed by many.

use super::crash::{CutMode, survivors};
use super::journal::Effect;
use super::op::{Deferred, NewLen, Request};
use super::rng::Rng;
use super::world::{Inode, World, to_index};
use super::{Sim, SimConfig};

impl World {
    /// Cuts the power. BlockOps in flight may have reached the medium in part, in any order.
    pub(super) fn cut(&mut self, deferred: &mut Deferred) {
        if std::mem::replace(&mut self.is_cut, true) {
            return;
        }
        let mut slots: Vec<usize> = self.ops.iter().map(|(slot, _)| slot).collect();
        while !slots.is_empty() {
            let slot = slots.swap_remove(self.rng.index(slots.len()));
            self.record_unfinished(slot);
        }
        deferred.ops = std::mem::take(&mut self.ops);
        for event in self.clock.drain().into_values() {
            if let super::clock::Event::Wake(waker) = event {
                // Woken tasks find a world without power, in which they are dropped.
                deferred.wakers.push(waker);
            }
        }
    }

    /// Records the effect that an operation had not taken yet as a change that may or may not
    /// survive.
    fn record_unfinished(&mut self, slot: usize) {
        let pending = &self.ops[slot];
        let Some(request) = &pending.request else { return };
        let (op, file) = (pending.op, pending.file);
        let (from, upto) = (pending.done, pending.limit);
        let (effect, len) = match request {
            Request::Write { offset, iov, .. } if from < upto => {
                let mut data = vec![0; to_index(upto - from)];
                iov.copy_to(to_index(from), &mut data);
                let end = offset + upto;
                (Effect::Write { offset: offset + from, data }, NewLen::AtLeast(end))
            }
            Request::Change { effect, len, .. } if pending.is_untouched() => (effect.clone(), *len),
            Request::Copy { source, offset, target_offset, .. } if pending.is_untouched() => {
                let source = &self.files[*source].visible;
                let len = upto.min(source.len().saturating_sub(*offset));
                let mut data = vec![0; to_index(len)];
                source.read(*offset, &mut data);
                let end = target_offset + len;
                (Effect::Write { offset: *target_offset, data }, NewLen::AtLeast(end))
            }
            _ => return,
        };
        let inode = &mut self.files[file];
        let len_before =
            inode.journal.changes.last().map_or(inode.visible.len(), |last| last.len_after);
        let len_after = len.after(len_before);
        let effect = match effect {
            Effect::Grow if len_after < len_before => Effect::Cut { len: len_after },
            other => other,
        };
        inode.journal.record(op, effect, len_before, len_after);
    }
}

impl Sim {
    /// Cuts the power now: no I/O completes any more and sleepers never wake. Tasks are dropped
    /// when `run_until_cut` notices or the next world is made, not here: the caller may be one of
    /// them.
    pub fn power_cut(&self) {
        let mut deferred = Deferred::default();
        self.world().cut(&mut deferred);
        deferred.finish();
    }

    /// True once the power was cut.
    pub fn is_cut(&self) -> bool {
        self.world().is_cut
    }

    /// Cuts the power with the state-changing operation number `n` (see [`Sim::writes`], counted
    /// from the beginning of the world): that one is in flight when it happens. `None`: never.
    pub fn cut_after_writes(&self, n: Option<u64>) {
        self.world().cut_after_writes = n;
    }

    /// Cuts the power (if it was not cut) and returns the world after the reboot: each file as on
    /// the medium, where changes that were not durable survived or not by `seed` and the configured
    /// [`CutMode`]. Faults and scheduled cuts do not carry over. May be called again with other
    /// seeds.
    pub fn after_cut(&self, seed: u64) -> Sim {
        let mode = self.world().config.cut_mode;
        self.after_cut_by(seed, mode)
    }

    /// [`Sim::after_cut`] with this mode.
    pub fn after_cut_by(&self, seed: u64, mode: CutMode) -> Sim {
        self.power_cut();
        self.drop_tasks();
        let mut rng = Rng::new(seed);
        self.next_world(seed, |inode, config| {
            let sector_len = u64::from(config.sector_len);
            let image = survivors(&inode.journal, mode, sector_len, &mut rng);
            let is_kept = inode.is_name_durable
                || match mode {
                    CutMode::LoseAll => false,
                    CutMode::KeepAll => true,
                    _ => rng.coin(),
                };
            is_kept.then(|| Inode::new(inode.path.clone(), inode.kind, image))
        })
    }

    /// A new world with the same configuration and the same visible files, all of it durable. Cheap
    /// (content is shared until written), so one prepared image can start many worlds. The former
    /// world continues unchanged.
    pub fn fork(&self, seed: u64) -> Sim {
        self.next_world(seed, |inode, _| {
            Some(Inode::new(inode.path.clone(), inode.kind, inode.visible.clone()))
        })
    }

    fn next_world(
        &self,
        seed: u64,
        mut carry: impl FnMut(&Inode, &SimConfig) -> Option<Inode>,
    ) -> Sim {
        let world = self.world();
        let config = SimConfig { fault_rate: 0.0, cut_after_writes: None, ..world.config.clone() };
        let next = Sim::new(seed, config);
        let mut new_world = next.world();
        let mut moved = std::collections::BTreeMap::new();
        for (path, file) in &world.names {
            if let Some(link) = moved.get(file) {
                if let Some(link) = *link {
                    new_world.link(path, link);
                }
                continue;
            }
            let old = &world.files[*file];
            let carried = carry(old, &world.config);
            let new_file = carried.map(|inode| {
                let (serial, changes) = (old.serial, old.changes);
                new_world.add(Inode { path: path.clone(), serial, changes, ..inode })
            });
            moved.insert(*file, new_file);
        }
        drop(new_world);
        next
    }
}

//! The simulated world: a seeded scheduler, a virtual clock and a disk with a volatile cache.

use std::future::Future;

use crate::file::Fs;

/// What the simulated disk may do.
#[derive(Clone, Debug, Default)]
pub struct SimConfig {}

/// A simulated disk and its clock. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sim {
    _p: (),
}

impl Sim {
    /// A fresh, empty disk.
    pub fn new(seed: u64, config: SimConfig) -> Sim {
        let _ = (seed, config);
        todo!()
    }
    /// Its name space.
    pub fn fs(&self) -> Fs {
        Fs::Sim(self.clone())
    }
    /// Runs a future to its end under the virtual clock and seeded scheduler. Panics on deadlock (nothing can ever run again), naming the seed.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _ = future;
        todo!()
    }
}

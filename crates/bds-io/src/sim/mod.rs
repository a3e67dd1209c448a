//! `Sim`: a simulated world with a seeded scheduler, a virtual clock and disks that lose power.
//!
//! One seed replays a run exactly: which task runs next, when an operation takes effect and when it
//! completes, which of two racing writes wins, what is short, what fails, what a power cut leaves.
//!
//! ```text
//!   executor, tasks   choice of the next task          fault   injected failures
//!   clock             events in virtual time           lock    byte locks
//!   op, engine        operations in flight             crash   content after a power cut
//!   world             files and names                  power   cutting, and the worlds after
//!   image, journal    bytes: visible; durable or not   trace   recent operations
//!   file              files as `crate::File` sees them   rng   the seeded generator
//!   disk              files as a test sees them
//! ```
//!
//! What it deliberately does not do: real threads (everything runs on the thread in
//! [`Sim::block_on`]; waking its tasks from other threads ends the replay), directories, links by
//! path, time of day. Nothing outside the world may be waited for inside it: that is a deadlock
//! here. A world replays its own decisions only: code under test that iterates a map with random
//! hashing, or reads the host's clock, does not replay.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::file::Fs;

mod clock;
mod crash;
mod disk;
mod engine;
mod executor;
mod fault;
mod file;
mod image;
mod journal;
mod lock;
mod op;
mod power;
mod rng;
mod tasks;
mod trace;
mod world;

pub use crash::CutMode;
pub use disk::ForeignLock;
pub use fault::{Fault, OpMask};
pub(crate) use file::SimFile;
pub use lock::LockKind;

use tasks::Tasks;
use world::World;

/// State of dirty data after a failed sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SyncFailure {
    /// It is marked clean and no later sync brings it to the medium, as on Linux. Reads still see
    /// it.
    #[default]
    DropDirty,
    /// The next sync tries again.
    KeepDirty,
}

/// Options of a simulated world; make them with `..SimConfig::default()`. By default nothing fails,
/// but latencies vary, effects are split and reordered, some transfers are short, and half of the
/// inline attempts succeed.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Shortest time from submission to completion.
    pub latency_min: Duration,
    /// Longest time from submission to completion; one in sixteen takes sixteen times as long.
    pub latency_max: Duration,
    /// Probability that a read, write or copy does less than was requested.
    pub short_io_rate: f64,
    /// Probability that a transfer takes effect in two pieces at two moments.
    pub split_rate: f64,
    /// Probability that an operation whose future is dropped before it took effect never does, as
    /// when an engine cancels what it can. Syncs are always carried out.
    pub cancel_rate: f64,
    /// Probability that `try_read` and `try_write` succeed.
    pub inline_rate: f64,
    /// Probability that an event less than `latency_max` away overtakes tasks that are ready to
    /// run: slow processors.
    pub overtake_rate: f64,
    /// Sector size of the medium in bytes, which it writes as a whole: 512 or 4096.
    pub sector_len: u32,
    /// How [`Sim::after_cut`] treats changes that are not durable.
    pub cut_mode: CutMode,
    /// Cut with this state-changing operation (see [`Sim::cut_after_writes`]).
    pub cut_after_writes: Option<u64>,
    /// Created names survive a cut only once the file was synced. Removals always survive.
    pub volatile_names: bool,
    /// Effect of a failed sync on dirty data.
    pub sync_failure: SyncFailure,
    /// Probability that an operation of `fault_ops` fails with `fault_errno`.
    pub fault_rate: f64,
    /// Operations that fail at `fault_rate`.
    pub fault_ops: OpMask,
    /// The errno they fail with.
    pub fault_errno: i32,
    /// Operations this file system does not have: EOPNOTSUPP; copies give up, extents are all data.
    pub unsupported: OpMask,
    /// Space of the disk in bytes; beyond it ENOSPC. Also bounds the memory of a world.
    pub capacity_bytes: u64,
    /// Memory and offset alignment that direct files demand.
    pub direct_align: (usize, u32),
    /// Operations that [`Sim::trace`] remembers.
    pub trace_len: usize,
    /// Turns after which a world that is never idle counts as a livelock.
    pub max_turns: u64,
}

impl Default for SimConfig {
    fn default() -> SimConfig {
        SimConfig {
            latency_min: Duration::from_micros(10),
            latency_max: Duration::from_micros(200),
            short_io_rate: 0.02,
            split_rate: 0.25,
            cancel_rate: 0.25,
            inline_rate: 0.5,
            overtake_rate: 0.125,
            sector_len: 512,
            cut_mode: CutMode::Random,
            cut_after_writes: None,
            volatile_names: false,
            sync_failure: SyncFailure::DropDirty,
            fault_rate: 0.0,
            fault_ops: OpMask::IO,
            fault_errno: libc::EIO,
            unsupported: OpMask::empty(),
            capacity_bytes: 16 << 30,
            direct_align: (512, 512),
            trace_len: 64,
            max_turns: 50_000_000,
        }
    }
}

impl SimConfig {
    /// A predictable disk: nothing is short, split, cancelled or inline, so that operations can be
    /// counted. Order and latency still vary with the seed.
    pub fn calm() -> SimConfig {
        SimConfig {
            short_io_rate: 0.0,
            split_rate: 0.0,
            cancel_rate: 0.0,
            inline_rate: 0.0,
            ..SimConfig::default()
        }
    }
}

/// A simulated disk, its clock and its tasks. Cheap to clone: clones are the same world.
///
/// A world lives as long as a clone of it or one of its files. Detached tasks that never end and
/// hold such a file keep it alive for ever; a power cut followed by [`Sim::run_until_idle`] or
/// [`Sim::after_cut`] drops them.
#[derive(Clone)]
pub struct Sim(Arc<Shared>);

struct Shared {
    seed: u64,
    // Lock order: none is taken while the other is held.
    world: Mutex<World>,
    tasks: Mutex<Tasks>,
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sim(seed {})", self.0.seed)
    }
}

impl Sim {
    /// A world with an empty disk.
    pub fn new(seed: u64, config: SimConfig) -> Sim {
        Sim(Arc::new(Shared {
            seed,
            world: Mutex::new(World::new(seed, config)),
            tasks: Mutex::new(Tasks::default()),
        }))
    }

    /// Its name space.
    pub fn fs(&self) -> Fs {
        Fs::Sim(self.clone())
    }

    /// The seed it was made with.
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// Awaited operations so far (also those done inline): the range of a fault sweep.
    pub fn ops(&self) -> u64 {
        self.ops_of(OpMask::IO)
    }

    /// Operations of these kinds so far.
    pub fn ops_of(&self, kinds: OpMask) -> u64 {
        self.world().counted(kinds)
    }

    /// State-changing operations so far, syncs among them: the range of a crash sweep.
    pub fn writes(&self) -> u64 {
        self.ops_of(OpMask::CHANGE)
    }

    /// Makes the matching operation number `n` fail, counted from now (0: the next one).
    pub fn fail_nth(&self, n: u64, fault: Fault) {
        self.world().faults.arm(n, fault);
    }

    /// From now on operations fail at this rate (see `SimConfig::fault_ops` and `fault_errno`).
    pub fn set_fault_rate(&self, rate: f64) {
        self.world().faults.rate = rate;
    }

    /// No injected failure from now on.
    pub fn clear_faults(&self) {
        self.world().faults.clear();
    }

    /// The last operations, oldest first, for a failure message.
    pub fn trace(&self) -> Vec<String> {
        let world = self.world();
        world.trace.lines(|file| world.files[file].path.display().to_string())
    }

    /// A hash over all operations and their times so far: equal for equal runs.
    pub fn fingerprint(&self) -> u64 {
        self.world().trace.fingerprint()
    }

    /// The world's state. Never held while foreign code (wakers, buffers, tasks) runs.
    fn world(&self) -> MutexGuard<'_, World> {
        // A panic elsewhere fails the test by itself; the state is consistent between calls.
        self.0.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! A plan: commands as data, so that a failing one can be made shorter and printed.

use std::fmt;

use bds_testkit::Chance;

/// Disks of a world.
pub(super) const DISKS: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Snapshot,
    Backup,
    Increment,
    Mirror,
    ActiveCommit,
    Commit,
    Stream,
    Group,
    Bitmap,
    Pause,
    Resume,
    Complete,
    Cancel,
    Finalize,
    Dismiss,
    Speed,
    Drain,
    DrainAll,
    Query,
    Fault,
    FailTarget,
    Heal,
}

/// Each verb and how often it comes.
const VERBS: [(Verb, u64); 22] = [
    (Verb::Snapshot, 6),
    (Verb::Backup, 5),
    (Verb::Increment, 6),
    (Verb::Mirror, 6),
    (Verb::ActiveCommit, 4),
    (Verb::Commit, 5),
    (Verb::Stream, 5),
    (Verb::Group, 4),
    (Verb::Bitmap, 4),
    (Verb::Pause, 3),
    (Verb::Resume, 6),
    (Verb::Complete, 9),
    (Verb::Cancel, 3),
    (Verb::Finalize, 6),
    (Verb::Dismiss, 2),
    (Verb::Speed, 3),
    (Verb::Drain, 4),
    (Verb::DrainAll, 1),
    (Verb::Query, 3),
    (Verb::Fault, 3),
    (Verb::FailTarget, 1),
    (Verb::Heal, 4),
];

/// One command of one of the two clients that give commands at the same time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command {
    pub(super) verb: Verb,
    pub(super) client: usize,
    pub(super) disk: usize,
    /// Decides everything else about it.
    pub(super) pick: u64,
    /// Time before it.
    pub(super) pause_us: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// Images of each disk's chain at first.
    pub(super) chains: [u64; DISKS],
    pub(super) commands: Vec<Command>,
    /// The power is cut with the write of this number.
    pub(super) cut: Option<u64>,
}

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let mut chains = [0; DISKS];
        for chain in &mut chains {
            *chain = chance.between(1, 4);
        }
        // A third of the plans has no faults: then no failure is excused.
        let has_faults = !chance.one_in(3);
        let mut commands = Vec::new();
        for _ in 0..chance.between(20, 70) {
            let command = Command {
                verb: verb(&mut chance),
                client: chance.below(2) as usize,
                disk: chance.below(DISKS as u64) as usize,
                pick: chance.draw(),
                pause_us: [0, 100, 3000, 20_000][chance.below(4) as usize],
            };
            let is_fault = matches!(command.verb, Verb::Fault | Verb::FailTarget);
            if has_faults || !is_fault {
                commands.push(command);
            }
        }
        let cut = chance.one_in(2).then(|| chance.between(50, 6000));
        Self { seed, chains, commands, cut }
    }

    /// The same, ending with a power cut if it does not, and the other way round.
    pub(super) fn with_the_other_end(&self) -> Self {
        let cut = self.cut.is_none().then(|| Chance::new(self.seed ^ 0xc07).between(50, 6000));
        Self { cut, ..self.clone() }
    }

    /// Whether requests fail.
    pub(super) fn has_faults(&self) -> bool {
        self.commands.iter().any(|c| matches!(c.verb, Verb::Fault | Verb::FailTarget))
    }
}

fn verb(chance: &mut Chance) -> Verb {
    let total: u64 = VERBS.iter().map(|(_, weight)| weight).sum();
    let mut at = chance.below(total);
    for (verb, weight) in VERBS {
        if at < weight {
            return verb;
        }
        at -= weight;
    }
    Verb::Query
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, chains, cut, .. } = self;
        writeln!(f, "seed {seed}, chains of {chains:?} images, power cut after write {cut:?}")?;
        for Command { verb, client, disk, pick, pause_us } in &self.commands {
            let words =
                format!("client {client}, disk {disk}, pick {pick:#x}, {pause_us} us later");
            writeln!(f, "  {verb:?}: {words}")?;
        }
        Ok(())
    }
}

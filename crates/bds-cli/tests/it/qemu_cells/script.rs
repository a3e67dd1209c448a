//! Generates the requests of a cell, as text for qemu-io and as values for the library, and
//! computes the contents they must result in.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bds_testkit::Chance;

use super::cell::Cell;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Write { at: u64, len: u64, byte: u8 },
    Compressed { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64, may_unmap: bool },
    Discard { at: u64, len: u64 },
}

impl Act {
    /// As qemu-io has it.
    pub(crate) fn command(&self) -> String {
        match self {
            Self::Write { at, len, byte } => format!("write -q -P {byte} {at} {len}"),
            Self::Compressed { at, len, byte } => format!("write -q -c -P {byte} {at} {len}"),
            Self::Zero { at, len, may_unmap: false } => format!("write -q -z {at} {len}"),
            Self::Zero { at, len, may_unmap: true } => format!("write -q -z -u {at} {len}"),
            Self::Discard { at, len } => format!("discard -q {at} {len}"),
        }
    }
}

/// The first script: every kind of request at every kind of place, then some at random.
pub(crate) fn first(cell: &Cell, seed: u64) -> Vec<Act> {
    let (c, len, reach) = (cell.cluster, cell.disk_len(), cell.l2_reach());
    let write = |at, len, byte| Act::Write { at, len, byte };
    let zero = |at, len, may_unmap| Act::Zero { at, len, may_unmap };
    let mut acts = vec![
        write(0, c, 0x11),
        write(2 * c + 100, c.min(700) - 100, 0x12),
        write(3 * c + c / 2, 2 * c, 0x13),
        zero(c / 4, c / 2, false),
        zero(6 * c, 2 * c, false),
        zero(4 * c, c, true),
        Act::Discard { at: 3 * c, len: c },
        // Half a cluster cannot be deallocated.
        Act::Discard { at: 5 * c, len: c / 2 },
        write(reach - c - 300, 2 * c + 600, 0x14),
        zero(reach + 2 * c, c, true),
        write(len - 700, 700, 0x15),
        zero(len - 512, 512, false),
    ];
    if cell.compresses() {
        let compressed = |at, len, byte| Act::Compressed { at, len, byte };
        acts.extend([
            compressed(8 * c, 5 * c, 0x21),
            write(9 * c + 10, 100, 0x22),
            Act::Discard { at: 10 * c, len: c },
            zero(11 * c, c, true),
            compressed(reach + 4 * c, c, 0x23),
            zero(reach + 4 * c + 1, 30, false),
        ]);
    }
    acts.extend(random(cell, seed, 12));
    acts
}

/// Requests at random: around the beginning, the end of the first L2 table and the end of the disk.
pub(crate) fn random(cell: &Cell, seed: u64, count: usize) -> Vec<Act> {
    let (c, end, reach) = (cell.cluster, cell.disk_len(), cell.l2_reach());
    let sub = cell.subcluster();
    let mut chance = Chance::new(seed);
    let act = |_| {
        let window = [0, reach - 2 * c, end - 2 * c][usize::try_from(chance.below(3)).unwrap_or(0)];
        let unit = [1, 512, sub, c][usize::try_from(chance.below(4)).unwrap_or(0)];
        let at = (window + chance.below((8 * c).min(end - window))) / unit * unit;
        let most = if unit == 1 { 700 } else { 3 * c / unit };
        let len = (chance.between(1, most) * unit).min(end - at);
        match chance.below(6) {
            0 => Act::Discard { at, len },
            1 => Act::Zero { at, len, may_unmap: false },
            2 => Act::Zero { at, len, may_unmap: true },
            _ => Act::Write { at, len, byte: 0x80 | chance.draw().to_le_bytes()[0] },
        }
    };
    (0..count).map(act).collect()
}

const PAGE: u64 = 4096;
const ZEROS: [u8; 4096] = [0; 4096];

/// A disk's bytes; pages that were not written are zeros.
#[derive(Clone, Debug)]
pub(crate) struct Bytes {
    pub(crate) len: u64,
    pages: BTreeMap<u64, Box<[u8; 4096]>>,
}

impl Bytes {
    pub(crate) fn new(len: u64) -> Self {
        Self { len, pages: BTreeMap::new() }
    }

    /// The same with another length, zeros where it is longer.
    pub(crate) fn resized(&self, len: u64) -> Self {
        let mut out = self.clone();
        if len < self.len {
            let (at, gone) = (len, self.len - len);
            out.fill(at, gone, 0);
        }
        out.len = len;
        out
    }

    /// What the acts leave. `discards_zero`: whole clusters that are discarded read as zeros, else
    /// as before.
    pub(crate) fn apply(&mut self, acts: &[Act], cluster: u64, discards_zero: bool) {
        for act in acts {
            match *act {
                Act::Write { at, len, byte } | Act::Compressed { at, len, byte } => {
                    self.fill(at, len, byte);
                }
                Act::Zero { at, len, .. } => self.fill(at, len, 0),
                Act::Discard { at, len } if discards_zero => {
                    let from = at.next_multiple_of(cluster);
                    let to = if at + len == self.len {
                        at + len
                    } else {
                        (at + len) / cluster * cluster
                    };
                    self.fill(from, to.saturating_sub(from), 0);
                }
                Act::Discard { .. } => {}
            }
        }
    }

    fn fill(&mut self, at: u64, len: u64, byte: u8) {
        let end = at + len;
        let mut at = at;
        while at < end {
            let (page, within) = (at / PAGE, at % PAGE);
            let take = (PAGE - within).min(end - at);
            let [from, to] = [within, within + take].map(|n| usize::try_from(n).unwrap_or(0));
            if byte != 0 || self.pages.contains_key(&page) {
                let bytes = self.pages.entry(page).or_insert_with(|| Box::new(ZEROS));
                bytes[from..to].fill(byte);
            }
            at += take;
        }
    }

    /// Is there no other byte than zero?
    pub(crate) fn is_zero(&self, at: u64, len: u64) -> bool {
        let end = at + len;
        self.pages.range(at / PAGE..end.div_ceil(PAGE)).all(|(page, bytes)| {
            let first = page * PAGE;
            let [from, to] = [at.max(first) - first, end.min(first + PAGE) - first]
                .map(|n| usize::try_from(n).unwrap_or(0));
            bytes[from..to] == ZEROS[..to - from]
        })
    }

    /// Writes it as a sparse raw file.
    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.len)?;
        for (page, bytes) in &self.pages {
            let at = page * PAGE;
            let len = usize::try_from((self.len.saturating_sub(at)).min(PAGE)).unwrap_or(0);
            file.write_all_at(&bytes[..len], at)?;
        }
        Ok(())
    }
}

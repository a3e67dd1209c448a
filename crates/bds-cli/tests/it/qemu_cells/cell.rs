//! Defines the cells of the matrix: all, those the format forbids, and a sample in which every pair
//! of values occurs.

use std::collections::BTreeSet;
use std::fmt;

/// How clusters are compressed in this cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Codec {
    /// Nothing is compressed.
    None,
    Zlib,
    Zstd,
}

/// One combination of creation options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) version: u8,
    pub(crate) cluster: u64,
    pub(crate) refcount_bits: u8,
    pub(crate) extended: bool,
    pub(crate) codec: Codec,
    pub(crate) backing: bool,
    pub(crate) data_file: bool,
}

/// Why a cell does not exist: the words by which qemu-img and `bds` refuse it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Reason {
    pub(crate) qemu: &'static str,
    pub(crate) bds: &'static str,
}

const REFCOUNTS: Reason = Reason {
    qemu: "Different refcount widths than 16 bits require compatibility level 1.1",
    bds: "refcount widths other than 16 bits are only supported with compatibility level 1.1",
};
const OLD_EXTENDED: Reason = Reason {
    qemu: "Extended L2 entries are only supported with compatibility level 1.1",
    bds: "extended L2 entries are only supported with compatibility level 1.1",
};
const OLD_ZSTD: Reason = Reason {
    qemu: "Non-zlib compression type is only supported with compatibility level 1.1",
    bds: "compression types other than zlib are only supported with compatibility level 1.1",
};
const OLD_DATA_FILE: Reason = Reason {
    qemu: "External data files are only supported with compatibility level 1.1",
    bds: "external data files are only supported with compatibility level 1.1",
};
const SMALL_EXTENDED: Reason = Reason {
    qemu: "Extended L2 entries are only supported with cluster sizes of at least 16384",
    bds: "extended L2 entries are only supported with cluster sizes of at least 16384",
};

impl Cell {
    /// Every combination, forbidden ones too, in a fixed order.
    pub(crate) fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for version in [2, 3] {
            for cluster in [512, 4 << 10, 64 << 10, 2 << 20] {
                for refcount_bits in [1, 16, 64] {
                    for codec in [Codec::None, Codec::Zlib, Codec::Zstd] {
                        for switches in 0..8_u8 {
                            let [extended, backing, data_file] =
                                [1, 2, 4].map(|bit| switches & bit != 0);
                            cells.push(Self {
                                version,
                                cluster,
                                refcount_bits,
                                extended,
                                codec,
                                backing,
                                data_file,
                            });
                        }
                    }
                }
            }
        }
        cells
    }

    /// Why the format does not have this cell; nothing: it does.
    pub(crate) fn forbidden_by(&self) -> Vec<Reason> {
        let is_old = self.version == 2;
        [
            (is_old && self.refcount_bits != 16, REFCOUNTS),
            (is_old && self.extended, OLD_EXTENDED),
            (is_old && self.codec == Codec::Zstd, OLD_ZSTD),
            (is_old && self.data_file, OLD_DATA_FILE),
            (self.extended && self.cluster < 16 << 10, SMALL_EXTENDED),
        ]
        .into_iter()
        .filter_map(|(is_so, why)| is_so.then_some(why))
        .collect()
    }

    /// What `-o` gets.
    pub(crate) fn options(&self, data_file: &str) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let Self { cluster, refcount_bits, .. } = self;
        let mut out =
            format!("compat={compat},cluster_size={cluster},refcount_bits={refcount_bits}");
        if self.extended {
            out += ",extended_l2=on";
        }
        match self.codec {
            Codec::None => {}
            Codec::Zlib => out += ",compression_type=zlib",
            Codec::Zstd => out += ",compression_type=zstd",
        }
        if self.data_file {
            out += &format!(",data_file={data_file}");
            // A backing file and a raw data file exclude each other. With 2-MiB clusters the disk
            // is so long that qemu-img would read a raw data file, of which it believes every byte
            // to be data, for minutes.
            if !self.backing && self.refcount_bits == 64 && self.cluster < 2 << 20 {
                out += ",data_file_raw=on";
            }
        }
        out
    }

    /// Are clusters written compressed? With a data file they cannot be.
    pub(crate) fn compresses(&self) -> bool {
        self.codec != Codec::None && !self.data_file
    }

    /// Guest bytes that one L2 table describes.
    pub(crate) fn l2_reach(&self) -> u64 {
        self.cluster / if self.extended { 16 } else { 8 } * self.cluster
    }

    /// Length of the disk: past the first L2 table, ending inside a cluster.
    pub(crate) fn disk_len(&self) -> u64 {
        let tail = if self.cluster == 512 { 0 } else { 3 * 512 };
        self.l2_reach() + 9 * self.cluster + tail
    }

    /// The unit in which the disk is zeroed without writing bytes.
    pub(crate) fn subcluster(&self) -> u64 {
        if self.extended { self.cluster / 32 } else { self.cluster }
    }

    fn values(&self) -> [u64; 7] {
        [
            u64::from(self.version),
            self.cluster,
            u64::from(self.refcount_bits),
            u64::from(self.extended),
            self.codec as u64,
            u64::from(self.backing),
            u64::from(self.data_file),
        ]
    }

    fn pairs(&self) -> BTreeSet<(usize, u64, usize, u64)> {
        let values = self.values();
        let mut pairs = BTreeSet::new();
        for (i, a) in values.iter().enumerate() {
            for (j, b) in values.iter().enumerate().skip(i + 1) {
                pairs.insert((i, *a, j, *b));
            }
        }
        pairs
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, cluster, refcount_bits, .. } = self;
        let word = |is_so: bool, word| if is_so { word } else { "" };
        write!(
            f,
            "v{version} {cluster} rc{refcount_bits}{} {:?}{}{}",
            word(self.extended, " ext"),
            self.codec,
            word(self.backing, " backing"),
            word(self.data_file, " data-file"),
        )
    }
}

/// Cells among which every pair of values occurs that occurs in `cells` at all: each time the one
/// that brings most new pairs.
pub(crate) fn pairwise(cells: &[Cell]) -> Vec<Cell> {
    let mut open: BTreeSet<_> = cells.iter().flat_map(Cell::pairs).collect();
    let mut chosen = Vec::new();
    while !open.is_empty() {
        let gain = |cell: &&Cell| cell.pairs().intersection(&open).count();
        // The first of the best: `max_by_key` would take the last.
        let Some(best) = cells.iter().rev().max_by_key(gain) else { break };
        open = open.difference(&best.pairs()).copied().collect();
        chosen.push(*best);
    }
    chosen
}

/// One cell for every set of reasons for which cells are forbidden.
pub(crate) fn one_of_each_kind(forbidden: &[Cell]) -> Vec<Cell> {
    let mut seen = BTreeSet::new();
    forbidden.iter().filter(|cell| seen.insert(cell.forbidden_by())).copied().collect()
}

#[test]
fn a_sample_has_every_pair() {
    let valid: Vec<Cell> =
        Cell::all().into_iter().filter(|cell| cell.forbidden_by().is_empty()).collect();
    let sample = pairwise(&valid);
    let pairs = |cells: &[Cell]| cells.iter().flat_map(Cell::pairs).collect::<BTreeSet<_>>();
    assert_eq!(pairs(&sample), pairs(&valid));
    assert!(sample.len() * 4 < valid.len(), "{} of {}", sample.len(), valid.len());
}

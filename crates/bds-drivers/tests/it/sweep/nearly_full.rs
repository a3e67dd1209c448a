//! Kinds of image whose tables are nearly full, and counters of the growth of tables, read from the
//! image file.

use serde_json::json;

use crate::kit::{ImageKind, TestEnv};

const CLUSTER: u64 = 512;
/// Clusters that one L2 table of the kinds below maps.
const REACH: u64 = 64;

/// Nearly full refcount blocks: one of 64-bit counts covers 64 clusters, so that a workload adds
/// some.
pub(crate) fn blocks() -> Vec<ImageKind> {
    vec![
        block("512-rc64-full-20", 20),
        block("512-rc64-full-26", 26),
        block("512-rc64-full-32", 32),
        block("512-rc64-full-38", 38),
        block("512-rc64-full-44", 44),
        block("512-rc64-full-50", 50),
        block("512-rc64-full-56", 56),
    ]
}

/// One of [`blocks`], with so many clusters of data.
pub(crate) fn block(name: &'static str, clusters: u64) -> ImageKind {
    ImageKind::qcow2(name, CLUSTER)
        .create("refcount_bits", 64)
        .sized(CLUSTER * 160, CLUSTER * 240)
        .filled(CLUSTER * clusters)
}

/// An L1 table without space for one more L2 table: each growth of the disk moves it.
pub(crate) fn l1(name: &'static str) -> ImageKind {
    ImageKind::qcow2(name, CLUSTER)
        .sized(CLUSTER * (3 * REACH - 2), CLUSTER * (6 * REACH))
        .filled(CLUSTER * 100)
        .growing(CLUSTER * REACH)
}

/// Both: a nearly full refcount block, and an L1 table that moves.
pub(crate) fn growing(name: &'static str) -> ImageKind {
    l1(name).create("refcount_bits", 64)
}

/// A refcount table without space for one more block: 64 slots of blocks that cover 64 clusters
/// each, so 2 MiB. The L1 table moves too.
pub(crate) fn table(name: &'static str) -> ImageKind {
    ImageKind::qcow2(name, CLUSTER)
        .create("refcount_bits", 64)
        .sized(CLUSTER * (65 * REACH - 2), CLUSTER * (68 * REACH))
        .filled(CLUSTER * 3962)
        .growing(CLUSTER * REACH)
}

/// A fragmented disk: its discards free so many runs of clusters that they are released before a
/// flush request.
pub(crate) fn in_pieces(name: &'static str) -> ImageKind {
    ImageKind::qcow2(name, CLUSTER)
        .sized(CLUSTER * 4224, CLUSTER * 4224)
        .filled_in_pieces(CLUSTER * 4200)
        .open("pass-discard-request", json!(false))
}

/// Positions of an image's tables, and how much of them is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tables {
    l1_at: u64,
    table_at: u64,
    pub(crate) blocks: u64,
}

impl Tables {
    /// Reads the file of an image of any format; `None` if there are no tables.
    pub(crate) fn of(env: &TestEnv, kind: &ImageKind) -> Option<Tables> {
        let TestEnv::Sim(sim) = env else { return None };
        if kind.format != "qcow2" {
            return None;
        }
        let bytes = sim.snapshot_file(env.path("disk"));
        let number = |at: u64, len: u64| {
            let at = usize::try_from(at).expect("images here are small");
            let len = usize::try_from(len).expect("small");
            bytes.get(at..at + len).map_or(0, |bytes| {
                bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
            })
        };
        let (table_at, clusters) = (number(48, 8), number(56, 4));
        let slots = (table_at..table_at + clusters * kind.cluster).step_by(8);
        let blocks = slots.filter(|slot| number(*slot, 8) != 0).count() as u64;
        Some(Tables { l1_at: number(40, 8), table_at, blocks })
    }
}

/// Growth of tables.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Growth {
    /// New refcount blocks: each is a write of rank Directory.
    pub(crate) new_blocks: u64,
    pub(crate) moved_l1: u64,
    pub(crate) moved_tables: u64,
}

impl Growth {
    /// Adds the growth between `before` and `after`.
    pub(crate) fn add(&mut self, before: Option<Tables>, after: Option<Tables>) {
        let (Some(before), Some(after)) = (before, after) else { return };
        self.new_blocks += after.blocks.saturating_sub(before.blocks);
        self.moved_l1 += u64::from(after.l1_at != before.l1_at);
        self.moved_tables += u64::from(after.table_at != before.table_at);
    }
}

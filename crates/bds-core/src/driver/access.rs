//! What a parent does with a node, and what it lets others do meanwhile.
//!
//! Pure arithmetic on small sets. The graph cumulates and checks them (`graph::perm`); a driver says what it needs of its
//! children ([`super::Driver::child_access`]).

use std::fmt;

use super::Role;

bitflags::bitflags! {
    /// Things that can be done to a node through an edge.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Perm: u32 {
        /// Reads see a consistent image.
        const CONSISTENT_READ = 1;
        /// Writes.
        const WRITE = 2;
        /// Writes that do not change what a reader sees.
        const WRITE_UNCHANGED = 4;
        /// Changes of the length.
        const RESIZE = 8;
    }
}

/// QEMU's words, joined by commas; "nothing" for none.
impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<&str> = self.words().collect();
        f.write_str(if words.is_empty() { "nothing" } else { "" })?;
        f.write_str(&words.join(", "))
    }
}

impl Perm {
    /// QEMU's words for what is in the set.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        let all = [
            (Self::CONSISTENT_READ, "consistent-read"),
            (Self::WRITE, "write"),
            (Self::WRITE_UNCHANGED, "write-unchanged"),
            (Self::RESIZE, "resize"),
        ];
        all.into_iter().filter_map(move |(perm, word)| self.contains(perm).then_some(word))
    }

    /// All that changes what a reader sees.
    pub const fn changes() -> Self {
        Self::WRITE.union(Self::RESIZE)
    }
}

/// The permissions of an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What this parent does.
    pub perm: Perm,
    /// What other parents may do meanwhile.
    pub shared: Perm,
}

/// What is asked of a node from above, and how it is opened: what its use of its children follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeUse {
    /// What its parents do with it, all together; and what every one of them lets others do.
    pub above: Access,
    /// May the node be written?
    pub is_writable: bool,
    /// Is the node in charge of its bytes (see [`super::Driver::inactivate`])?
    pub is_active: bool,
    /// Was it opened to take no locks and to share everything?
    pub force_share: bool,
}

impl Access {
    /// Does nothing, lets others do all.
    pub const NONE: Self = Self { perm: Perm::empty(), shared: Perm::all() };

    /// Does nothing but read consistently, lets others do all.
    pub const READ: Self = Self { perm: Perm::CONSISTENT_READ, shared: Perm::all() };

    /// Does everything, lets others do all.
    pub const ALL: Self = Self { perm: Perm::all(), shared: Perm::all() };

    /// What a node does with a child of this role, unless its driver says otherwise:
    ///
    /// | role | does | lets others |
    /// |---|---|---|
    /// | `FILTERED` | what its parents do with it | what its parents let others do |
    /// | `COW` | reads, if the parents read | write and resize only if the parents bear that |
    /// | `METADATA` | reads; writes and resizes if it is writable | read |
    /// | `DATA` | what its parents do; any writer also writes for good and resizes | what its parents bear, but not resize |
    ///
    /// Reading and rewriting the same is always borne.
    pub fn of_child(role: Role, node: &NodeUse) -> Self {
        let harmless = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        let NodeUse { above, is_writable, is_active, force_share } = *node;
        let may_write = is_writable && is_active;
        let mut access = if role.contains(Role::COW) {
            let borne =
                if above.shared.contains(Perm::WRITE) { Perm::changes() } else { Perm::empty() };
            Self { perm: above.perm & Perm::CONSISTENT_READ, shared: borne | harmless }
        } else {
            let mut perm = above.perm;
            let mut shared = above.shared | harmless;
            if role.contains(Role::METADATA) {
                perm |= Perm::CONSISTENT_READ;
                perm |= if may_write { Perm::changes() } else { Perm::empty() };
                shared &= !Perm::changes();
            }
            if role.contains(Role::DATA) {
                // Where nothing lies yet, a rewrite of the same is a first write; and it may lie behind the end.
                if perm.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED) {
                    perm |= Perm::changes();
                }
                shared &= !Perm::RESIZE;
            }
            Self { perm, shared }
        };
        if !may_write {
            access.perm &= Perm::CONSISTENT_READ;
        }
        // Without charge of the bytes there is nothing to protect from others, as there is not if nothing is protected at all.
        if force_share || !is_active {
            access.shared = Perm::all();
        }
        access
    }

    /// Does the parent change what a reader sees?
    pub fn writes(self) -> bool {
        self.perm.intersects(Perm::changes())
    }

    /// Both parents' use together: what either does, and what both let others do.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { perm: self.perm | other.perm, shared: self.shared & other.shared }
    }

    /// What one of two does that the other does not bear. Empty: they get along.
    pub fn clash(self, other: Self) -> Perm {
        self.perm - other.shared
    }
}

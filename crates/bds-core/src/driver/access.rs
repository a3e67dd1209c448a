//! Permissions of an edge: what a parent does with a node and what it shares with other parents.
//!
//! Arithmetic on small sets. The graph cumulates and checks them; a driver computes those on its
//! children ([`super::Driver::child_access`]).

use std::fmt;

use super::Role;

bitflags::bitflags! {
    /// Permissions: what can be done to a node through an edge.
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

/// QEMU's names, joined by commas; "nothing" for none.
impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<&str> = self.words().collect();
        f.write_str(if words.is_empty() { "nothing" } else { "" })?;
        f.write_str(&words.join(", "))
    }
}

impl Perm {
    /// QEMU's names of the permissions in the set.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        let all = [
            (Self::CONSISTENT_READ, "consistent-read"),
            (Self::WRITE, "write"),
            (Self::WRITE_UNCHANGED, "write-unchanged"),
            (Self::RESIZE, "resize"),
        ];
        all.into_iter().filter_map(move |(perm, word)| self.contains(perm).then_some(word))
    }

    /// The permissions to change what a reader sees.
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

/// How a node is used from above and how it is opened: determines its use of its children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeUse {
    /// Union of what its parents do with it, and intersection of what they share.
    pub above: Access,
    /// True if the node may be written.
    pub is_writable: bool,
    /// False if the node is inactive: see [`super::Driver::inactivate`].
    pub is_active: bool,
    /// True if it was opened to take no locks and to share everything.
    pub force_share: bool,
}

impl Access {
    /// Does nothing, shares everything.
    pub const NONE: Self = Self { perm: Perm::empty(), shared: Perm::all() };

    /// Reads consistently, shares everything.
    pub const READ: Self = Self { perm: Perm::CONSISTENT_READ, shared: Perm::all() };

    /// Does everything, shares everything.
    pub const ALL: Self = Self { perm: Perm::all(), shared: Perm::all() };

    /// Permissions of a node on a child of this role, unless its driver computes others:
    ///
    /// | role | does | shares |
    /// |---|---|---|
    /// | `FILTERED` | what its parents do with it | what its parents share |
    /// | `COW` | reads, if the parents read | write and resize only if the parents share writing |
    /// | `METADATA` | reads; writes and resizes if it is writable | read |
    /// | `DATA` | what its parents do; any writer also gets write and resize | what its parents share, but not resize |
    ///
    /// Consistent read and write-unchanged are always shared.
    pub fn of_child(role: Role, node: &NodeUse) -> Self {
        let harmless = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        let NodeUse { above, is_writable, is_active, force_share } = *node;
        let may_write = is_writable && is_active;
        let mut access = if role.contains(Role::COW) {
            let writes =
                if above.shared.contains(Perm::WRITE) { Perm::changes() } else { Perm::empty() };
            Self { perm: above.perm & Perm::CONSISTENT_READ, shared: writes | harmless }
        } else {
            let mut perm = above.perm;
            let mut shared = above.shared | harmless;
            if role.contains(Role::METADATA) {
                perm |= Perm::CONSISTENT_READ;
                perm |= if may_write { Perm::changes() } else { Perm::empty() };
                shared &= !Perm::changes();
            }
            if role.contains(Role::DATA) {
                // Rewriting unallocated bytes allocates, possibly behind the end.
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
        // An inactive node has nothing to protect from other users.
        if force_share || !is_active {
            access.shared = Perm::all();
        }
        access
    }

    /// True if the parent changes what a reader sees.
    pub fn writes(self) -> bool {
        self.perm.intersects(Perm::changes())
    }

    /// Combines two parents: what either does, and what both share.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { perm: self.perm | other.perm, shared: self.shared & other.shared }
    }

    /// What this parent does that the other does not share. Empty: no conflict.
    pub fn clash(self, other: Self) -> Perm {
        self.perm - other.shared
    }
}

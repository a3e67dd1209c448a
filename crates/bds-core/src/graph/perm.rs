//! What a parent does with a node, and what it lets others do: recorded on each edge.
//!
//! Here they are only derived from role and flags. Cumulating and checking them over the whole graph belongs to
//! graph changes as transactions.

use crate::driver::Role;

bitflags::bitflags! {
    /// Things that can be done to a node through an edge.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// The permissions of an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What this parent does.
    pub perm: Perm,
    /// What other parents may do meanwhile.
    pub shared: Perm,
}

impl Access {
    /// What a node of these flags does with a child of this role.
    pub(crate) fn of_child(role: Role, is_writable: bool, force_share: bool) -> Self {
        let mut perm = Perm::CONSISTENT_READ;
        let mut shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        if role.contains(Role::COW) {
            // A backing node is only read; who else only reads it does no harm.
        } else if role.contains(Role::FILTERED) {
            shared = Perm::all();
            if is_writable {
                perm |= Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE;
            }
        } else if is_writable {
            perm |= Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        }
        if force_share {
            shared = Perm::all();
        }
        Self { perm, shared }
    }

    /// Does the parent change what a reader sees?
    pub(crate) fn writes(self) -> bool {
        self.perm.intersects(Perm::WRITE | Perm::RESIZE)
    }
}

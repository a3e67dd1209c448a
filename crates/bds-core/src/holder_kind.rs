//! Kinds of holders that a graph knows: the labels under which references to nodes are listed.
//!
//! The arena takes any label; this is the fixed set of this crate, so that code can match on it.

use std::fmt;

/// Kind of a node's holder.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum HolderKind {
    /// The creator, or the code it passed the node on to.
    Owner,
    /// A parent's edge to its child.
    Edge,
    /// The monitor's list of nodes that the user made.
    Monitor,
    /// A backend's root.
    Backend,
    /// A job.
    Job,
    /// An export.
    Export,
    /// A drained section.
    Drain,
    /// An iteration that stands at this node.
    Iterator,
    /// A graph change being staged.
    Change,
    /// A user of the library.
    User,
    /// Any other, with its label.
    Other(&'static str),
}

impl HolderKind {
    const KNOWN: [Self; 10] = [
        Self::Owner,
        Self::Edge,
        Self::Monitor,
        Self::Backend,
        Self::Job,
        Self::Export,
        Self::Drain,
        Self::Iterator,
        Self::Change,
        Self::User,
    ];

    /// The label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Edge => "edge",
            Self::Monitor => "monitor",
            Self::Backend => "backend",
            Self::Job => "job",
            Self::Export => "export",
            Self::Drain => "drain",
            Self::Iterator => "iterator",
            Self::Change => "change",
            Self::User => "user",
            Self::Other(label) => label,
        }
    }
}

impl fmt::Display for HolderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<HolderKind> for bds_refcount::HolderKind {
    fn from(kind: HolderKind) -> Self {
        Self::new(kind.as_str())
    }
}

impl From<bds_refcount::HolderKind> for HolderKind {
    fn from(kind: bds_refcount::HolderKind) -> Self {
        let label = kind.as_str();
        let known = Self::KNOWN.into_iter().find(|known| known.as_str() == label);
        known.unwrap_or(Self::Other(label))
    }
}

impl PartialEq<HolderKind> for bds_refcount::HolderKind {
    fn eq(&self, other: &HolderKind) -> bool {
        self.as_str() == other.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_come_back_from_their_labels() {
        for kind in HolderKind::KNOWN.into_iter().chain([HolderKind::Other("migration")]) {
            let label = bds_refcount::HolderKind::from(kind);
            assert!(label == kind);
            assert_eq!(HolderKind::from(label), kind);
            assert_eq!(label.to_string(), kind.to_string());
        }
    }
}

//! Names of nodes and backends: one namespace. A name is claimed before its node is opened, and
//! free from the moment the last reference is gone.
//!
//! A claim by a node is only an id, a claim by a backend a weak reference. Each lookup checks the
//! id or the reference, so no release has to free the name.

use std::sync::{Arc, Weak};

use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::graph::model::node::NodeId;
use crate::graph::model::node_ref::NodeRef;
use crate::graph::name_table::{BackendEntry, Claim, NameTable};

/// Longest node name, in bytes.
pub const MAX_NAME_LEN: usize = 31;

/// A name claimed for a node that is being opened, or a backend that is being made. Dropped: the
/// name is free again.
pub(crate) struct Reservation {
    graph: Graph,
    name: Arc<str>,
    is_published: bool,
}

impl Reservation {
    pub(in crate::graph) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The name now denotes the node.
    pub(in crate::graph) fn publish(self, id: NodeId) {
        self.denote(Claim::Node(id));
    }

    /// The name now denotes the backend.
    pub(crate) fn publish_backend(self, entry: Weak<dyn BackendEntry>) {
        self.denote(Claim::Backend(entry));
    }

    fn denote(mut self, claim: Claim) {
        self.is_published = true;
        self.graph.lock_names().claims.insert(Arc::clone(&self.name), claim);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.is_published {
            self.graph.lock_names().claims.remove(&self.name);
        }
    }
}

impl Graph {
    /// A reference to the node of this name.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// assert_eq!(graph.find("disk")?.id(), disk.id());
    ///
    /// drop(disk);
    /// let error = graph.find("disk").unwrap_err();
    /// assert_eq!(error.to_string(), "there is no node 'disk'");
    /// let options = "driver=mem,node-name=disk";
    /// let again = graph.open(Options::parse(options)?).await?; // the name was free at once
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `NotFound` if no open node has it (a node that is still being opened does not have it yet).
    #[track_caller]
    pub fn find(&self, name: &str) -> Result<NodeRef> {
        let claim = self.lock_names().claims.get(name).cloned();
        let found = match claim {
            Some(Claim::Node(id)) => self.acquire(id).ok(),
            Some(Claim::Opening | Claim::Backend(_)) | None => None,
        };
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no node '{name}'")))
    }

    /// Claims `wanted`, or a generated name (`#block000`), which no user can type.
    pub(crate) fn reserve_name(&self, wanted: Option<&str>) -> Result<Reservation> {
        let mut names = self.lock_names();
        if names.is_shut_down {
            return Err(Error::new(ErrorKind::Cancelled, "the graph has been shut down"));
        }
        let name: Arc<str> = match wanted {
            Some(name) => {
                check_name(name)?;
                if self.is_taken(&names, name) {
                    return Err(Error::new(
                        ErrorKind::AlreadyExists,
                        format!("the name '{name}' is taken by another node or backend"),
                    ));
                }
                name.into()
            }
            None => loop {
                let name = format!("#block{:03}", names.auto_names);
                names.auto_names += 1;
                if !self.is_taken(&names, &name) {
                    break name.into();
                }
            },
        };
        names.claims.insert(Arc::clone(&name), Claim::Opening);
        Ok(Reservation { graph: self.clone(), name, is_published: false })
    }
}

impl Graph {
    pub(in crate::graph) fn is_taken(&self, names: &NameTable, name: &str) -> bool {
        match names.claims.get(name) {
            None => false,
            Some(Claim::Opening) => true,
            Some(Claim::Backend(entry)) => entry.strong_count() > 0,
            Some(Claim::Node(id)) => self.0.core.arena.check(id.0).is_ok(),
        }
    }
}

/// QEMU's rule for names that users give: a letter, then letters, digits, `-`, `.` and `_`.
pub(in crate::graph) fn check_name(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let starts_well = bytes.next().is_some_and(|b| b.is_ascii_alphabetic());
    let goes_on_well = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if !starts_well || !goes_on_well {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "a node name is a letter followed by letters, digits, '-', '.' and '_'",
        )
        .field("node-name", name));
    }
    if name.len() > MAX_NAME_LEN {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("a node name is at most {MAX_NAME_LEN} bytes long"),
        )
        .field("node-name", name));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_and_length() {
        let ok_31 = "a".repeat(31);
        for name in ["a", "disk0", "A-b.c_9", &ok_31] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        let long_32 = "a".repeat(32);
        for name in ["", "0a", "#block000", "a b", "a/b", "ä", "-a", "a\0", &long_32] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}

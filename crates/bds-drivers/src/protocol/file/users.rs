//! Lists the nodes of this process that hold image locks, so that a conflict can name the node.
//!
//! A lock of an open file description does not name its owner: the kernel reports "no process" for
//! all of them, and the user would look for another process that does not exist. Used for messages
//! only; conflicts are decided by the locks.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bds_io::File;

/// Device and inode.
type Identity = (u64, u64);

/// Lock holders of this process by file.
static USERS: Mutex<Option<Users>> = Mutex::new(None);

#[derive(Default)]
struct Users {
    next: u64,
    by_file: HashMap<Identity, Vec<(u64, String)>>,
}

/// One entry of the list, removed when dropped.
#[derive(Debug)]
pub(super) struct User {
    identity: Identity,
    number: u64,
}

impl User {
    /// Adds a node. `None` if the file cannot be identified: messages then stay general.
    pub(super) fn enter(file: &File, node_name: &str) -> Option<Self> {
        let identity = identity(file)?;
        let mut users = users();
        let users = users.get_or_insert_default();
        let number = users.next;
        users.next += 1;
        users.by_file.entry(identity).or_default().push((number, node_name.to_owned()));
        Some(Self { identity, number })
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut users = users();
        let Some(users) = users.as_mut() else { return };
        if let Some(of_file) = users.by_file.get_mut(&self.identity) {
            of_file.retain(|(number, _)| *number != self.number);
            if of_file.is_empty() {
                users.by_file.remove(&self.identity);
            }
        }
    }
}

/// The name of a node of this process that has the file locked, other than `own`.
pub(super) fn other_user(file: &File, own: Option<&User>) -> Option<String> {
    let identity = identity(file)?;
    let users = users();
    let of_file = users.as_ref()?.by_file.get(&identity)?;
    let is_other = |number: u64| own.is_none_or(|own| own.number != number);
    of_file.iter().find(|(number, _)| is_other(*number)).map(|(_, name)| name.clone())
}

/// Identity of a file of the host. Files of different simulated disks may share numbers.
fn identity(file: &File) -> Option<Identity> {
    if file.is_simulated() { None } else { file.identity().ok() }
}

fn users() -> MutexGuard<'static, Option<Users>> {
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}

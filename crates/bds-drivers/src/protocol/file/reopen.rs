//! Reopens a file in another mode, and inactivates and activates it for use by another process.
//!
//! A reopen opens the name again, locks the new description beside the old one (`lock.rs`), and
//! exchanges the two at commit. Until then all requests use the old one.
//!
//! Invariants:
//! - The file stays the same file: another inode under the name is refused.
//! - There is no moment at which neither description holds the locks.
//! - A failed write-back is not forgotten. The kernel reports it once to each description, so the
//!   old one is synced before it is closed, and a failure is kept in the node (`broken_flush`).

use std::sync::atomic::Ordering;

use bds_core::driver::{OpenFlags, RcuCell, Reopen, ReopenContext};
use bds_core::{Error, ErrorKind, Result};

use super::lock::{LockMode, Locks, Widened};
use super::open::{strip_scheme, take_mode, wants_write};
use super::{FileNode, Mode, Opened};

/// A second description, prepared to replace the first. Dropped without commit it closes, and the
/// first one's locks are restored.
struct Prepared<'a> {
    node: &'a FileNode,
    /// `None` after the commit.
    new: Option<Opened>,
    /// The locks of the first description before.
    before: Option<Widened>,
}

impl Reopen for Prepared<'_> {
    fn commit(mut self: Box<Self>) {
        let Some(new) = self.new.take() else { return };
        let node = self.node;
        {
            let old = node.opened();
            // An operation whose future was dropped may keep the old description open for a while.
            old.locks.release(&old.file);
        }
        let file = new.file.clone();
        match node.reopened.get() {
            Some(reopened) => reopened.replace(new),
            // No request is in flight at commit, so this is still empty.
            None => drop(node.reopened.set(RcuCell::new(new))),
        }
        // The first state lives as long as the node, but its description must be closed now.
        if let Err(error) = node.first.file.redirect(&file) {
            let node = &node.node_name;
            tracing::warn!(%error, node, "a former descriptor stays open until the node is closed");
        }
    }

    fn request_alignment(&self) -> Option<u32> {
        self.new.as_ref().map(|new| new.limits.request_alignment)
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        if self.new.is_some()
            && let Some(before) = self.before.take()
        {
            let old = self.node.opened();
            old.locks.narrow(&old.file, before);
        }
    }
}

impl FileNode {
    /// See [`bds_core::Driver::prepare_reopen`].
    pub(super) async fn prepare<'a>(
        &'a self,
        context: &mut ReopenContext<'_>,
    ) -> Result<Box<dyn Reopen + 'a>> {
        let named = |e: Error| e.node(&self.node_name).file(&self.path);
        let mode = self.parse(context).map_err(named)?;
        if self.is_like(mode, &context.flags) {
            return Ok(Box::new(()));
        }
        let prepared = self.open_beside(mode, context).map_err(named)?;
        let now = self.opened();
        let is_flushed = now.is_read_only || context.current.cache.no_flush;
        if !is_flushed && self.refuse_if_flush_broke().is_ok() {
            self.flush().await?;
        }
        Ok(Box::new(prepared))
    }

    fn parse(&self, context: &mut ReopenContext<'_>) -> Result<Mode> {
        let name = context.options.take_path("filename")?.map(strip_scheme);
        if let Some(name) = name.filter(|name| self.path.as_os_str() != name.as_os_str()) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "option 'filename' cannot change while the node is open; open another node",
            )
            .field("filename", name.display()));
        }
        take_mode(&mut context.options, self.opened().mode)
    }

    /// Is the file open in this mode already?
    fn is_like(&self, mode: Mode, flags: &OpenFlags) -> bool {
        let now = self.opened();
        mode == now.mode
            && wants_write(flags) != now.is_read_only
            && flags.cache.direct == now.is_direct
            && now.permissions(flags) == now.locks.wanted()
    }

    fn open_beside(&self, mode: Mode, context: &ReopenContext<'_>) -> Result<Prepared<'_>> {
        let flags = context.flags;
        let mut new = Opened::new(self.flavour, context.fs, &self.path, mode, flags)?;
        let now = self.opened();
        let identity = |opened: &Opened| {
            opened.file.identity().map_err(|e| Error::io(e, "cannot identify the file"))
        };
        if identity(&new)? != identity(&now)? {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the name belongs to another file by now; a node stays with its file",
            ));
        }
        let wanted = new.permissions(&flags);
        let is_active = self.is_active.load(Ordering::Acquire);
        let needed = if is_active { wanted } else { wanted.idle() };
        let before = now.locks.widen(&now.file, needed, new.locking(&flags))?;
        // From here on the locks are restored if anything fails.
        let is_locked = before.is_some();
        let mut prepared = Prepared { node: self, new: None, before };
        let new_locks = match is_locked {
            true => Locks::take_untested(&new.file, needed, wanted),
            false => Locks::take(&new.file, wanted, LockMode::Off),
        };
        prepared.new = Some(match new_locks {
            Ok(locks) => {
                new.locks = locks.held_by(&new.file, &self.node_name);
                new
            }
            Err(error) => {
                prepared.new = Some(new);
                return Err(error);
            }
        });
        Ok(prepared)
    }

    /// Inactivates: lets another process use the file.
    pub(super) fn set_inactive(&self) {
        let now = self.opened();
        now.locks.relax(&now.file);
        self.is_active.store(false, Ordering::Release);
    }

    /// Activates: uses the file again, which may be longer or shorter now.
    pub(super) fn set_active(&self) -> Result<()> {
        let named = |e: Error| e.node(&self.node_name).file(&self.path);
        let now = self.opened();
        now.locks.restore(&now.file).map_err(named)?;
        if let Err(error) = self.current_len() {
            now.locks.relax(&now.file);
            return Err(named(error));
        }
        self.forget_data_run();
        self.is_active.store(true, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests;

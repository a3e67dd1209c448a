//! Manifests: proof of what an image contained, as one BLAKE3 hash for each 64 KiB.
//!
//! A backup writes one while it copies; [`Manifest::verify`] reads the image again and names the
//! ranges that differ. The root hash of a manifest names a content: an increment keeps the root of
//! the backup that it was made on ([`Manifest::parent`]), so that a wrong base under the right name
//! is found out before anything is restored ([`Manifest::check_parent`]).

mod build;
mod format;
mod read;
mod verify;

pub use build::ManifestBuilder;
pub use format::{ContentHash, MAX_NOTE_LEN, Manifest};
pub(crate) use read::hash_chunks_of;
pub use verify::VerifyReport;

use bds_core::{Error, ErrorKind, Result};

impl Manifest {
    /// Checks that `base` describes the content that this one was made on.
    ///
    /// # Errors
    /// `InvalidInput` names both: the base has another content, or this one is no increment.
    pub fn check_parent(&self, base: &Manifest) -> Result<()> {
        let Some(parent) = self.parent() else {
            return Err(Error::new(ErrorKind::InvalidInput, "the manifest is not of an increment"));
        };
        let found = base.root();
        if found == parent {
            return Ok(());
        }
        let message = format!(
            "the base has the content {found}, but the increment was made on {parent}; find the \
             backup with that root"
        );
        Err(Error::new(ErrorKind::InvalidInput, message))
    }
}

#[cfg(test)]
mod tests;

//! What stream and commit share: images of a chain and their overlays, the backing files that
//! images record, write access to read-only images, a filter that hides changes from permissions.
//!
//! ```text
//! nodes     images of a chain, overlays of an image, links
//! names     how an image records another one
//! last_run  remembers the last run of a block status
//! headers   rewrites records; writes the old ones back if the job fails
//! writable  makes read-only images writable, and read-only again
//! take_out  removes a job's filters; what hangs below them does not keep the job
//! shield    a filter that uses nothing of its child and lets others do everything
//! ```

pub(crate) mod headers;
pub(crate) mod last_run;
pub(crate) mod names;
pub(crate) mod nodes;
pub(crate) mod shield;
pub(crate) mod take_out;
pub(crate) mod writable;

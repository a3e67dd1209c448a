//! Operations on an image as a whole: create and measure, resize, amend, reopen and inactivate, the
//! recorded backing file, snapshots (read only), info.

pub(super) mod amend;
pub(super) mod backing_record;
pub(super) mod create;
pub(super) mod create_layout;
pub(super) mod create_options;
pub(super) mod info;
pub(super) mod measure;
pub(super) mod reopen;
pub(super) mod resize;
pub(super) mod snapshot;

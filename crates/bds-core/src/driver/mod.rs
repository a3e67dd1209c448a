//! The driver contract: what a driver implements, what it is given, and what it may rely on.
//!
//! A driver sees its own state and its children, nothing else: it cannot name its parents or
//! siblings. When a driver method is called, the request path (`request/`) has checked range,
//! permission and alignment and registered the request. A driver sends its own I/O through its
//! [`Child`]ren, which is the same request path one node further down.
//!
//! Every future may be dropped at any await, or kept without being polled. A change, a flush or a
//! resize that was polled once runs to completion: if its request is dropped, the request path
//! moves it to a task and keeps it in flight until it ends. A driver runs what others may wait for
//! in tasks of its own.

mod access;
mod amend;
mod backing_record;
mod bitmap_store;
mod child;
mod contract;
mod foreign;
mod limits;
mod open;
mod probe;
mod rcu;
mod registry;
mod reopen;
mod reports;
mod requests;
mod status;
mod types;

pub use access::{Access, NodeUse, Perm};
pub use amend::{AmendControl, Amendment};
pub use backing_record::BackingRecord;
pub use bitmap_store::{BitmapSpec, BitmapStore, BitmapToStore, StoredBitmap};
// For drivers that count per thread.
pub use bds_refcount::own_shard;
pub use child::{Child, ChildPort};
pub use contract::Driver;
pub use foreign::{TAIL_LEN, foreign_format};
pub use limits::Limits;
pub use open::{
    CacheMode, ChildOpener, ChildRequest, CreateContext, DetectZeroes, OpenContext, OpenFlags,
    Reference, ReferenceKind, Role,
};
pub use probe::{Candidate, PROBE_LEN, probe};
pub use rcu::{RcuCell, RcuGuard};
pub use registry::Registry;
pub use reopen::{Reopen, ReopenContext};
pub use reports::{CheckReport, ImageInfo};
pub use requests::{Attempt, BoxFuture, Prealloc, ReadFlags, Truncate, WriteFlags, ZeroFlags};
pub use status::{HostMap, Precision, StatusFlags, StatusRun};
pub use types::{Category, ClaimedFile, CreateFacts, DriverType, MeasureReport, MeasureSource};

//! Dirty bitmaps of nodes: which bytes of a node changed since some moment.
//!
//! A bitmap belongs to one node and no graph change moves it. A *named* one belongs to the node: it
//! lives until it is removed or the node ends. An *anonymous* one belongs to its creator, which
//! must drop it before the node ends. A user takes a lease; there is one at a time. A node that
//! ends while a bitmap is leased, or while an anonymous one is left, reports that as a failed
//! close, and closes all the same.
//!
//! ```text
//! recorder ──► list ──► info ──► persist, intent, edit ──► lease ──► verbs
//! ```
//! * `recorder`: marks what requests changed, without a lock.
//! * `list`: a node's bitmaps and their states.
//! * `info`: options, ids, facts for queries.
//! * `edit`: several edits, all or nothing; also a part of graph changes.
//! * `intent`: the write-intent log, before changes of data and after edits.
//! * `persist`: loads bitmaps from images and stores them there.
//! * `lease`: exclusive use, split into a frozen bitmap and a recording successor.
//! * `verbs`: what users call.
//!
//! The bits themselves are [`crate::bitmap`].

pub(super) mod edit;
pub(super) mod info;
pub(crate) mod intent;
pub(super) mod lease;
pub(super) mod list;
pub(super) mod persist;
mod recorder;
mod verbs;

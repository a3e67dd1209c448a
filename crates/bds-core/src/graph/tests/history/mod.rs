//! Bugs that block layers really had, as tests: each tells a story of QEMU's history in our own words and shows what prevents it here.
//!
//! `docs/lifecycle-bugs.md` is the table: number, commit, what happened, what prevents it, which test. The numbers in the comments are
//! its rows. Where a story is about something that is not part of this crate (a job, an export), its pattern of ownership is re-created
//! with what is there, and the comment says what stands for what. Sorted by what went wrong: [`first_refcount`] is the first reference count's own
//! five defects.

mod backend;
mod deadlock;
mod double_release;
mod first_refcount;
mod identity;
mod qemu_10_defects;
mod scripted_graph;
mod use_after_free;
mod walks;

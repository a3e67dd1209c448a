//! Bugs that block layers really had, as tests: each tells a story of QEMU's history in our own words and shows what prevents it here.
//!
//! `docs/lifecycle-bugs.md` is the table: number, commit, what happened, what prevents it, which test. The numbers in the comments are
//! its rows. Where a story is about something that is not part of this crate (a job, an export), its pattern of ownership is re-created
//! with what is there, and the comment says what stands for what. Sorted by what went wrong: [`series`] is the first reference count's own
//! five defects.

mod deadlock;
mod double_release;
mod identity;
mod not_like_qemu;
mod series;
mod use_after_free;
mod walks;
mod world;

//! Tests built from lifetime bugs of QEMU: each shows what prevents the bug here.
//!
//! `docs/lifecycle-bugs.md` is the table: row, commit, what happened, what prevents it, which test.
//! Where a bug involves something that is not part of this crate (a job, an export), a small
//! stand-in re-creates its ownership, and its comment says what it stands for. Sorted by kind of
//! failure; [`first_refcount`] has the five defects of the first reference count.

mod backend;
mod deadlock;
mod double_release;
mod first_refcount;
mod identity;
mod qemu_10_defects;
mod scripted_graph;
mod use_after_free;
mod walks;

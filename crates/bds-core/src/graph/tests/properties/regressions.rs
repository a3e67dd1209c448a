//! Sequences that found a defect, named after it.

use std::sync::Arc;

use super::commands::Command::{self, Activate, Change, Inactivate, Open};
use super::commands::CommitMode::{Commit, Sweep};
use super::commands::Step::{
    Append, Disown, DropFilter, Own, ReadOnly, Remove, Replace, Root, SetBacking,
};
use super::commands::{Body, Child, Fault, Tree};
use super::model::{ALL, Access};
use super::play;

fn replay(script: &[Command]) {
    play(0, None, script, &Arc::default());
}

fn tree(body: Body) -> Tree {
    Tree { name: None, ro: None, discard: false, transfer: 0, fault: Fault::None, body }
}

fn file() -> Command {
    Open(tree(Body::File))
}

/// A filter on a node, or on a file of its own.
fn filter(on: Option<usize>) -> Command {
    let child = on.map_or_else(|| Child::Inline(tree(Body::File)), Child::Node);
    Open(tree(Body::Filter(Box::new(child))))
}

/// An image on a file of its own.
fn image() -> Command {
    Open(tree(Body::Image(Box::new(Child::Inline(tree(Body::File))), None)))
}

#[test]
fn open_drain_and_release_agree_with_the_model() {
    replay(&[file(), filter(Some(0)), Command::Drain(1), Command::Release(0), Command::Reap]);
}

#[test]
fn a_change_does_not_block_its_own_removals() {
    // The change's other edits hold the node too, under the name of the change's owner.
    replay(&[filter(None), Change(vec![DropFilter(0), Remove(0)], Commit)]);
    replay(&[filter(None), Change(vec![ReadOnly(0, false), Remove(0)], Commit)]);
}

#[test]
fn nothing_is_opened_on_an_inactive_node() {
    replay(&[file(), Inactivate(None, Commit), filter(Some(0))]);
}

#[test]
fn reopens_of_one_change_build_on_each_other() {
    replay(&[filter(None), Change(vec![ReadOnly(0, true), ReadOnly(0, false)], Commit)]);
}

#[test]
fn an_activation_that_fails_at_its_last_step_is_undone() {
    replay(&[file(), Inactivate(None, Commit), Activate(None, Sweep)]);
}

#[test]
fn a_change_sees_its_own_edits_of_the_monitors_list() {
    replay(&[file(), Change(vec![Own(0), Own(0)], Commit)]);
    replay(&[file(), Change(vec![Own(0), Disown(0), Own(0)], Commit)]);
    replay(&[file(), Change(vec![Own(0), Disown(0), Disown(0)], Commit)]);
}

#[test]
fn a_frozen_link_of_a_closed_node_blocks_no_drain() {
    let freeze = Command::Freeze(1, 0);
    replay(&[
        file(),
        filter(Some(0)),
        freeze,
        Command::Release(1),
        Command::Reap,
        Command::Drain(0),
    ]);
}

#[test]
fn a_failed_change_keeps_gates_closed_for_other_sections() {
    // The drivers' gates are opened while they prepare; below, another section goes on.
    let change = Change(vec![ReadOnly(1, true)], Sweep);
    replay(&[file(), filter(Some(0)), filter(Some(1)), Command::Drain(0), change]);
}

#[test]
fn an_edge_added_by_a_change_can_be_moved_and_dropped_in_it() {
    let opened = [image(), file(), file()];
    for last in [SetBacking(0, Some(2)), SetBacking(0, None), Replace(1, 2)] {
        let change = Change(
            vec![SetBacking(0, Some(1)), SetBacking(0, Some(2)), SetBacking(0, Some(1)), last],
            Commit,
        );
        replay(&[opened.as_slice(), &[change]].concat());
    }
}

#[test]
fn inheritance_ends_wherever_the_path_is_cut() {
    // The filter's file gets an overlay, and is then detached from it: it is not below the filter
    // any more.
    let cut = [Change(vec![Append(1, 2)], Commit), Change(vec![SetBacking(2, None)], Commit)];
    replay(&[&[filter(None), Command::Acquire(1), image()], cut.as_slice()].concat());
}

#[test]
fn a_node_that_a_walk_found_is_not_removed_while_its_finder_keeps_it() {
    let share_all = Access { perm: 0, shared: ALL };
    let attached = Command::Attach(Some(0), share_all, false);
    let change = Change(vec![Remove(0), Root(0, None)], Commit);
    replay(&[file(), attached, Command::Walk, Command::WalkOn, change]);
}

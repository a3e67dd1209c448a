//! The table of states and verbs: what each state allows, alone and in a change; what is refused
//! leaves everything as it was.

use super::{fine, persistent, snapshot};
use crate::error::{ErrorKind, Result};
use crate::graph::{BitmapLease, BitmapOptions, MAX_BITMAP_NAME_LEN, NodeRef};
use crate::options::Options;
use crate::test_kit::bitmap_store::{FakeStore, InImage};
use crate::test_kit::disk::{Config, DiskGraph};
use crate::test_kit::run;

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Missing,
    Enabled,
    Disabled,
    Persistent,
    Leased,
    Split,
    Readonly,
    Inconsistent,
    ReadonlyInconsistent,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Verb {
    Clear,
    MergeInto,
    MergeNothing,
    MergeFrom,
    Enable,
    Disable,
    Lease,
    Remove,
    AddAgain,
}

const STATES: [State; 9] = [
    State::Missing,
    State::Enabled,
    State::Disabled,
    State::Persistent,
    State::Leased,
    State::Split,
    State::Readonly,
    State::Inconsistent,
    State::ReadonlyInconsistent,
];

const VERBS: [Verb; 9] = [
    Verb::Clear,
    Verb::MergeInto,
    Verb::MergeNothing,
    Verb::MergeFrom,
    Verb::Enable,
    Verb::Disable,
    Verb::Lease,
    Verb::Remove,
    Verb::AddAgain,
];

const BUSY: &str = "Bitmap 'b' is currently in use by another operation and cannot be used";
const READONLY: &str = "Bitmap 'b' is readonly and cannot be modified";
const INCONSISTENT: &str = "Bitmap 'b' is inconsistent and cannot be used";
const MISSING: &str = "Dirty bitmap 'b' not found";
const EXISTS: &str = "Bitmap already exists: b";

/// What the state makes of the verb: nothing, or the error.
fn wanted(state: State, verb: Verb) -> Result<(), (ErrorKind, &'static str)> {
    let refusal = match (state, verb) {
        (State::Missing, Verb::AddAgain) => return Ok(()),
        (State::Missing, _) => (ErrorKind::NotFound, MISSING),
        (_, Verb::AddAgain) => (ErrorKind::AlreadyExists, EXISTS),
        (State::Leased | State::Split, _) => (ErrorKind::InUse, BUSY),
        (
            State::Readonly | State::ReadonlyInconsistent,
            Verb::Clear | Verb::MergeInto | Verb::MergeNothing | Verb::Remove,
        ) => (ErrorKind::ReadOnly, READONLY),
        (State::Inconsistent, Verb::Remove) => return Ok(()),
        (State::Inconsistent | State::ReadonlyInconsistent, _) => {
            (ErrorKind::InvalidInput, INCONSISTENT)
        }
        (State::Enabled | State::Disabled | State::Persistent | State::Readonly, _) => {
            return Ok(());
        }
    };
    Err(refusal)
}

/// A disk with the bitmap 'b' in this state, and others for the merges; and the lease.
async fn disk(disks: &DiskGraph, state: State) -> (NodeRef, Option<BitmapLease>) {
    let image = match state {
        State::Inconsistent | State::ReadonlyInconsistent => vec![InImage::in_use("b")],
        State::Readonly => {
            vec![InImage {
                granularity: 512,
                len: 4096,
                stream: vec![1],
                is_in_use: false,
                ..InImage::in_use("b")
            }]
        }
        _ => Vec::new(),
    };
    let is_readonly = matches!(state, State::Readonly | State::ReadonlyInconsistent);
    let config = Config {
        store: Some(FakeStore::with(image)),
        options: Options::new().with("read-only", is_readonly),
        ..Config::default()
    };
    let (node, _) = disks.node("disk", vec![0; 4096], config).await;
    node.add_bitmap(fine("other")).await.unwrap();
    let options = match state {
        State::Enabled | State::Leased | State::Split => fine("b"),
        State::Disabled => BitmapOptions { disabled: true, ..fine("b") },
        State::Persistent => persistent("b"),
        _ => return (node, None),
    };
    node.add_bitmap(options).await.unwrap();
    let lease = matches!(state, State::Leased | State::Split)
        .then(|| node.lease_bitmap("b", "a job").unwrap());
    if state == State::Split {
        lease.as_ref().unwrap().split().unwrap();
    }
    (node, lease)
}

async fn alone(node: &NodeRef, verb: Verb) -> Result<()> {
    match verb {
        Verb::Clear => node.clear_bitmap("b").await,
        Verb::MergeInto => node.merge_bitmaps("b", &[(node, "other")]).await,
        Verb::MergeNothing => node.merge_bitmaps("b", &[]).await,
        Verb::MergeFrom => node.merge_bitmaps("other", &[(node, "b")]).await,
        Verb::Enable => node.enable_bitmap("b").await,
        Verb::Disable => node.disable_bitmap("b").await,
        Verb::Lease => node.lease_bitmap("b", "another").map(drop),
        Verb::Remove => node.remove_bitmap("b").await,
        Verb::AddAgain => node.add_bitmap(fine("b")).await.map(drop),
    }
}

/// The verb beside another that is allowed.
async fn in_change(node: &NodeRef, verb: Verb) -> Result<()> {
    let change = node.graph().change().add_bitmap(node, fine("beside"));
    let change = match verb {
        Verb::Clear => change.clear_bitmap(node, "b"),
        Verb::MergeInto => change.merge_bitmaps(node, "b", &[(node, "other")]),
        Verb::MergeNothing => change.merge_bitmaps(node, "b", &[]),
        Verb::MergeFrom => change.merge_bitmaps(node, "other", &[(node, "b")]),
        Verb::Enable => change.enable_bitmap(node, "b"),
        Verb::Disable => change.disable_bitmap(node, "b"),
        Verb::Remove => change.remove_bitmap(node, "b"),
        Verb::AddAgain => change.add_bitmap(node, fine("b")),
        Verb::Lease => return node.lease_bitmap("b", "another").map(drop),
    };
    let report = change.clear_bitmap(node, "other").commit().await?;
    assert!(report.stored_bitmaps_left.is_empty());
    Ok(())
}

fn check(state: State, verb: Verb, found: Result<()>) {
    let wanted = wanted(state, verb);
    let case = format!("{verb:?} of a bitmap that is {state:?}");
    match (found, wanted) {
        (Ok(()), Ok(())) => {}
        (Err(error), Err((kind, text))) => {
            assert_eq!(error.kind(), kind, "{case}: {error}");
            assert!(error.message().starts_with(text), "{case}: {error}");
            assert_eq!(error.node_name(), Some("disk"));
        }
        (found, wanted) => panic!("{case}: {found:?}, not {wanted:?}"),
    }
}

#[test]
fn each_state_allows_its_verbs() {
    for state in STATES {
        for verb in VERBS {
            for is_alone in [true, false] {
                run(1, async {
                    let disks = DiskGraph::new();
                    let (node, lease) = disk(&disks, state).await;
                    let before = snapshot(&node);
                    let found = match is_alone {
                        true => alone(&node, verb).await,
                        false => in_change(&node, verb).await,
                    };
                    if found.is_err() {
                        assert_eq!(snapshot(&node), before, "{state:?} {verb:?}");
                    }
                    check(state, verb, found);
                    drop(lease);
                });
            }
        }
    }
}

#[test]
fn names_and_granularities_are_checked() {
    run(1, async {
        let (node, _) = DiskGraph::new().node("disk", vec![0; 4096], Config::default()).await;
        let longest = "x".repeat(MAX_BITMAP_NAME_LEN);
        let too_long = format!("{longest}x");
        let table = [
            ("", 512, "Bitmap name cannot be empty".to_owned()),
            (&*too_long, 512, format!("Bitmap name too long: {too_long}")),
            ("b", 0, "Granularity must be power of 2 and at least 512".to_owned()),
            ("b", 256, "Granularity must be power of 2 and at least 512".to_owned()),
            ("b", 1000, "Granularity must be power of 2 and at least 512".to_owned()),
        ];
        for (name, granularity, text) in table {
            let granularity = Some(granularity);
            let options = BitmapOptions { granularity, ..BitmapOptions::named(name) };
            let error = node.add_bitmap(options).await.unwrap_err();
            assert_eq!((error.kind(), error.message()), (ErrorKind::InvalidInput, &*text));
        }
        assert!(node.bitmaps().is_empty());
        node.add_bitmap(fine(&longest)).await.unwrap();
    });
}

#[test]
fn merges_of_other_sizes_do_nothing_at_all() {
    run(1, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 4096], Config::default()).await;
        let (long, _) = disks.node("long", vec![0; 8192], Config::default()).await;
        for (node, name) in [(&node, "sum"), (&node, "part"), (&long, "part")] {
            node.add_bitmap(fine(name)).await.unwrap();
        }
        let disk = crate::test_kit::disk::backend(&node);
        disk.write_at(0, &[1; 512]).unwrap();
        node.clear_bitmap("sum").await.unwrap();
        let sources = [(&node, "part"), (&long, "part")];
        let error = node.merge_bitmaps("sum", &sources).await.unwrap_err();
        let text = "Bitmaps are of different sizes (destination size is 4096, source size is 8192) \
                    and can't be merged";
        assert_eq!((error.kind(), error.message()), (ErrorKind::InvalidInput, text));
        assert_eq!(super::info(&node, "sum").count, 0, "the first source was not merged either");
        node.merge_bitmaps("sum", &sources[..1]).await.unwrap();
        assert_eq!(super::info(&node, "sum").count, 512);
    });
}

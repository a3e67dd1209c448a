//! Releases references in any order: by call, by drop, while unwinding, on other threads, with a
//! name or without. Properties 8, 9 and 10 of the lifecycle contract; the type system rules out a
//! second release.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in helpers too")]

use std::{panic::AssertUnwindSafe, thread};

use bds_refcount::{Arena, ArenaConfig, Handle, Held, Holder, Kind, Release, Stale, Strong};
use proptest::{collection::vec, prelude::*};

const NODE: Kind = Kind::new(1);

/// How a reference is released. `true`: it has a named holder.
#[derive(Clone, Copy, Debug)]
enum Way {
    Call(bool),
    Drop(bool),
    Unwind(bool),
    OtherThread(bool),
}

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![
        any::<bool>().prop_map(Way::Call),
        any::<bool>().prop_map(Way::Drop),
        any::<bool>().prop_map(Way::Unwind),
        any::<bool>().prop_map(Way::OtherThread),
    ]
}

fn named(strong: Strong<u8>) -> Held<u8> {
    strong.held_by(Holder::new("user", "test"))
}

fn unwind(reference: impl Sized) {
    let unwound = std::panic::catch_unwind(AssertUnwindSafe(move || {
        let _owned = reference;
        std::panic::resume_unwind(Box::new("unwinding"));
    }));
    assert!(unwound.is_err());
}

/// Releases it; the result, if the way has one.
fn release(strong: Strong<u8>, way: Way) -> Option<Release> {
    match way {
        Way::Call(false) => return Some(strong.release()),
        Way::Call(true) => return Some(named(strong).release()),
        Way::Drop(false) => drop(strong),
        Way::Drop(true) => drop(named(strong)),
        Way::Unwind(false) => unwind(strong),
        Way::Unwind(true) => unwind(named(strong)),
        Way::OtherThread(false) => return Some(thread::spawn(|| strong.release()).join().unwrap()),
        Way::OtherThread(true) => {
            return Some(thread::spawn(|| named(strong).release()).join().unwrap());
        }
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn only_the_last_of_all_releases_is_last(ways in vec((way(), any::<usize>()), 1..12)) {
        let arena =
            Arena::with_config(ArenaConfig { kind: NODE, generation_bits: 2, index_bits: 0 });
        let first = arena.insert(7).unwrap();
        let handle: Handle<u8> = first.handle();
        let mut references = vec![first];
        references.extend((1..ways.len()).map(|_| arena.acquire(handle).unwrap()));
        for (way, place) in ways {
            let strong = references.swap_remove(place % references.len());
            let answer = release(strong, way);
            let left = references.len();
            let wanted = if left == 0 { Release::Last } else { Release::NotLast };
            prop_assert_eq!(answer.unwrap_or(wanted), wanted, "P9");
            prop_assert_eq!(arena.count(handle), left, "P8, P10: no other reference was released");
            prop_assert_eq!(arena.graveyard_len(), usize::from(left == 0), "P10: nothing is closed");
            prop_assert_eq!(arena.check(handle).is_ok(), left > 0, "P9");
        }
        // P9: between the last release and the end nothing brings it back.
        prop_assert_eq!(arena.acquire(handle).err(), Some(Stale::Dying));
        prop_assert_eq!(arena.reap_all(), 1);
        prop_assert!(arena.acquire(handle).is_err(), "P1");
    }
}

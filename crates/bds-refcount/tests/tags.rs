//! Handles stay unique across arenas: of dropped ones whose tag is used again, and of more live
//! ones than there are tags.

#![forbid(unsafe_code)]
#![cfg(not(loom))]

use bds_refcount::{Arena, Handle, Kind, Stale};

/// Arenas one after another, more than twice as many as there are tags.
const ARENAS: usize = 10_000;
/// Arenas at once, more than there are tags.
const LIVE_ARENAS: usize = 4500;

#[test]
fn a_handle_of_a_dropped_arena_is_stale_in_every_later_one() {
    let kind = Kind::new(1);
    let first: Arena<String> = Arena::new(kind);
    let object = first.insert("the first object".to_owned()).unwrap();
    let stale = object.handle();
    drop(object);
    first.reap_all();
    let tag = first.tag();
    drop(first);

    let mut reuses = 0;
    for number in 0..ARENAS {
        let next: Arena<String> = Arena::new(kind);
        assert_eq!(next.check(stale), Err(Stale::WrongArena), "before there is a slot");
        let object = next.insert(format!("another object, arena {number}")).unwrap();
        assert_ne!(object.handle(), stale);
        assert_eq!(next.acquire(stale).err(), Some(Stale::WrongArena), "arena {number}");
        assert_eq!((next.count(stale), next.holders(stale).len()), (0, 0));
        assert!(next.watch(stale).has_fired());
        reuses += usize::from(next.tag() == tag);
    }
    assert!(reuses >= 2, "the tag came back {reuses} times");
}

#[test]
fn handles_of_more_live_arenas_than_there_are_tags_are_different() {
    let kind = Kind::new(2);
    let arenas: Vec<Arena<usize>> = (0..LIVE_ARENAS).map(|_| Arena::new(kind)).collect();
    let objects: Vec<_> =
        arenas.iter().enumerate().map(|(n, arena)| arena.insert(n).unwrap()).collect();
    let mut handles: Vec<Handle<usize>> = objects.iter().map(|object| object.handle()).collect();
    for (number, object) in objects.iter().enumerate() {
        assert_eq!(arenas[number].acquire(object.handle()).map(|found| *found), Ok(number));
        let other = &arenas[(number + 4095) % LIVE_ARENAS];
        let refused = other.acquire(object.handle()).err();
        assert!(matches!(refused, Some(Stale::WrongArena | Stale::NeverIssued)), "{refused:?}");
    }
    handles.sort_unstable();
    handles.dedup();
    assert_eq!(handles.len(), LIVE_ARENAS);
}

#[test]
fn an_arena_says_the_kind_and_the_tag_of_its_handles() {
    for number in [3, 11] {
        let arenas: Vec<Arena<u8>> = (0..3).map(|_| Arena::new(Kind::new(number))).collect();
        for arena in &arenas {
            let object = arena.insert(0).unwrap();
            let handle = object.handle();
            assert_eq!((arena.kind(), Some(arena.kind())), (Kind::new(number), handle.kind()));
            assert_eq!(arena.tag(), handle.tag());
            assert_ne!(arena.tag(), 0);
        }
        assert_ne!(arenas[0].tag(), arenas[1].tag());
    }
}

//! Events, thresholds, and what a handle is.

use bds_refcount::Release;

use super::fake::{Config, House};
use super::{iov, run};
use crate::driver::{WriteFlags, ZeroFlags};
use crate::event::{Event, QUEUE_LEN};
use crate::request::{Backend, BackendOptions};

const NONE: WriteFlags = WriteFlags::empty();

#[test]
fn the_last_handle_gives_the_node_up_at_once() {
    run(1, async {
        let house = House::new();
        let (node, _) = house.node("disk", vec![0; 1024], Config::default()).await;
        let guest = Backend::new(&node, BackendOptions::default()).unwrap();
        let again = guest.clone();
        let drained = again.drain().await;
        assert_eq!(node.count(), 2, "handles are references to the backend, not to the node");
        drop((guest, again));
        assert_eq!(node.count(), 2, "the drained section holds the backend");
        drop(drained);
        assert_eq!(node.release(), Release::Last);
    });
}

/// Inline and waiting, through a layer above: once, at the first write past the mark.
#[test]
fn a_write_past_the_threshold_is_told_once() {
    for inline in [false, true] {
        run(2, async {
            let house = House::new();
            let config = || Config { inline, ..Config::default() };
            let (node, _) = house.node("disk", vec![0; 1024], config()).await;
            let options = crate::Options::new().with("file", "disk");
            let top = Config { options, passes: true, is_filter: true, ..config() };
            let (top, _) = house.node("top", vec![], top).await;
            let options = BackendOptions { writable: true, ..Default::default() };
            let guest = Backend::new(&top, options).unwrap();
            let mut events = house.graph().events();
            node.set_write_threshold(Some(512));
            guest.write(496, iov(&[1; 16], 1), NONE).await.unwrap();
            guest.read(512, iov(&[0; 16], 1)).await.unwrap();
            assert_eq!(events.try_next(), None, "up to the mark, and reads, are fine");
            assert_eq!(node.write_threshold(), Some(512));
            guest.write(500, iov(&[1; 100], 1), NONE).await.unwrap();
            let told =
                Event::WriteThreshold { node: "disk".into(), threshold: 512, amount_exceeded: 88 };
            let json = told.to_json();
            assert_eq!(json["event"], "BLOCK_WRITE_THRESHOLD");
            assert_eq!(json["data"]["amount-exceeded"], 88);
            assert_eq!(events.try_next(), Some(told));
            assert_eq!(node.write_threshold(), None, "it is passed");
            guest.write(600, iov(&[1; 16], 1), NONE).await.unwrap();
            assert_eq!(events.try_next(), None);

            node.set_write_threshold(Some(100));
            let options = BackendOptions { writable: true, ..Default::default() };
            Backend::new(&node, options).unwrap().discard(512, 16).await.unwrap();
            assert_eq!(events.try_next(), None, "a discard writes nothing");
            drop(guest.write_zeroes(512, 16, ZeroFlags::empty()).await);
            assert!(matches!(events.try_next(), Some(Event::WriteThreshold { .. })));
            node.set_write_threshold(Some(100));
            node.set_write_threshold(None);
            guest.write(600, iov(&[1; 16], 1), NONE).await.unwrap();
            assert_eq!(events.try_next(), None);
        });
    }
}

#[test]
fn nodes_and_changes_are_told_in_order() {
    run(3, async {
        let house = House::new();
        let mut events = house.graph().events();
        let (node, _) = house.node("disk", vec![0; 1024], Config::default()).await;
        let driver = || "fake".to_owned();
        let opened = Event::NodeOpened { node: "disk".into(), driver: driver() };
        assert_eq!(events.next().await, Some(opened));
        drop(node);
        assert_eq!(events.try_next(), None, "a release tells nothing");
        house.graph().reap().await;
        let closed = Event::NodeClosed {
            node: "disk".into(),
            driver: driver(),
            flush_error: None,
            close_error: None,
        };
        assert_eq!(events.next().await, Some(closed));
        drop(house);
        assert_eq!(events.next().await, None, "the graph is gone");
    });
}

#[test]
fn a_slow_reader_is_told_how_much_he_missed() {
    run(4, async {
        let house = House::new();
        let mut events = house.graph().events();
        let drive = Backend::empty(house.graph(), BackendOptions::default()).unwrap();
        let rounds = QUEUE_LEN / 2 + 5;
        for _ in 0..rounds {
            drop(drive.attach_device("d").unwrap());
        }
        let missed = (2 * rounds - QUEUE_LEN) as u64;
        assert_eq!(events.next().await, Some(Event::EventsLost { count: missed }));
        let rest = std::iter::from_fn(|| events.try_next()).count();
        assert_eq!(rest, QUEUE_LEN);
        drop(events);
        // Without a subscriber nothing is kept.
        drop(drive.attach_device("d").unwrap());
        assert_eq!(house.graph().events().try_next(), None);
    });
}

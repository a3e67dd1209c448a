//! Tests events, write thresholds, and references of handles.

use bds_refcount::Release;

use crate::driver::{WriteFlags, ZeroFlags};
use crate::event::{Event, QUEUE_LEN};
use crate::request::{Backend, BackendOptions};
use crate::test_kit::disk::{Config, DiskGraph};
use crate::test_kit::{iov, run};

const NONE: WriteFlags = WriteFlags::empty();

#[test]
fn the_last_handle_releases_the_node_at_once() {
    run(1, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let backend = Backend::new(&node, BackendOptions::default()).unwrap();
        let again = backend.clone();
        let drained = again.drain().await;
        assert_eq!(node.count(), 2, "handles are references to the backend, not to the node");
        drop((backend, again));
        assert_eq!(node.count(), 2, "the drained section holds the backend");
        drop(drained);
        assert_eq!(node.release(), Release::Last);
    });
}

/// Inline and waiting, through a layer above: once, at the first write past the threshold.
#[test]
fn a_write_past_the_threshold_is_reported_once() {
    for inline in [false, true] {
        run(2, async {
            let disks = DiskGraph::new();
            let config = || Config { inline, ..Config::default() };
            let (node, _) = disks.node("disk", vec![0; 1024], config()).await;
            let options = crate::Options::new().with("file", "disk");
            let top = Config { options, forwards: true, is_filter: true, ..config() };
            let (top, _) = disks.node("top", vec![], top).await;
            let options = BackendOptions { writable: true, ..Default::default() };
            let backend = Backend::new(&top, options).unwrap();
            let mut events = disks.graph().events();
            node.set_write_threshold(Some(512));
            backend.write(496, iov(&[1; 16], 1), NONE).await.unwrap();
            backend.read(512, iov(&[0; 16], 1)).await.unwrap();
            assert_eq!(events.try_next(), None, "no event up to the threshold, nor for reads");
            assert_eq!(node.write_threshold(), Some(512));
            backend.write(500, iov(&[1; 100], 1), NONE).await.unwrap();
            let event =
                Event::WriteThreshold { node: "disk".into(), threshold: 512, amount_exceeded: 88 };
            let json = event.to_json();
            assert_eq!(json["event"], "BLOCK_WRITE_THRESHOLD");
            assert_eq!(json["data"]["amount-exceeded"], 88);
            assert_eq!(events.try_next(), Some(event));
            assert_eq!(node.write_threshold(), None, "the threshold is reset");
            backend.write(600, iov(&[1; 16], 1), NONE).await.unwrap();
            assert_eq!(events.try_next(), None);

            node.set_write_threshold(Some(100));
            let options = BackendOptions { writable: true, ..Default::default() };
            Backend::new(&node, options).unwrap().discard(512, 16).await.unwrap();
            assert_eq!(events.try_next(), None, "a discard writes nothing");
            drop(backend.write_zeroes(512, 16, ZeroFlags::empty()).await);
            assert!(matches!(events.try_next(), Some(Event::WriteThreshold { .. })));
            node.set_write_threshold(Some(100));
            node.set_write_threshold(None);
            backend.write(600, iov(&[1; 16], 1), NONE).await.unwrap();
            assert_eq!(events.try_next(), None);
        });
    }
}

#[test]
fn node_events_are_in_order() {
    run(3, async {
        let disks = DiskGraph::new();
        let mut events = disks.graph().events();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let driver = || "fake".to_owned();
        let opened = Event::NodeOpened { node: "disk".into(), driver: driver() };
        assert_eq!(events.next().await, Some(opened));
        drop(node);
        assert_eq!(events.try_next(), None, "a release emits no event");
        disks.graph().reap().await;
        let closed = Event::NodeClosed {
            node: "disk".into(),
            driver: driver(),
            flush_error: None,
            close_error: None,
        };
        assert_eq!(events.next().await, Some(closed));
        drop(disks);
        assert_eq!(events.next().await, None, "the graph is gone");
    });
}

#[test]
fn a_slow_subscriber_gets_the_count_of_lost_events() {
    run(4, async {
        let disks = DiskGraph::new();
        let mut events = disks.graph().events();
        let drive = Backend::empty(disks.graph(), BackendOptions::default()).unwrap();
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
        assert_eq!(disks.graph().events().try_next(), None);
    });
}

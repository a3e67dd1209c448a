//! Tests order, exclusion and wake-ups of the request tracker, on futures polled by hand.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use super::{RequestTracker, Tracked};
use crate::error::{Error, ErrorKind};

#[derive(Default)]
struct CountWakes(AtomicUsize);

impl Wake for CountWakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn poll<F: Future>(future: Pin<&mut F>, wakes: &Arc<CountWakes>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(&Waker::from(wakes.clone())))
}

/// Tracks a range; the flag says whether the request may proceed at once.
fn track(
    tracker: &RequestTracker,
    range: std::ops::Range<u64>,
    serialising: bool,
) -> (Tracked<'_>, bool) {
    let mut tracked = tracker.track(tracker.enter(), range, serialising);
    let wakes = Arc::default();
    let ready = poll(std::pin::pin!(tracked.wait_turn()), &wakes).is_ready();
    (tracked, ready)
}

#[test]
fn conflicts_need_an_overlap_and_a_serialising_side() {
    // (first range, serialising), (second range, serialising), may the second proceed?
    let table = [
        ((0..10, false), (5..15, false), true),
        ((0..10, true), (5..15, false), false),
        ((0..10, false), (5..15, true), false),
        ((0..10, true), (5..15, true), false),
        ((0..10, true), (10..15, true), true),
        ((0..10, true), (10..15, false), true),
        ((10..15, false), (0..10, true), true),
    ];
    for ((a, a_serialising), (b, b_serialising), expected) in table {
        let tracker = RequestTracker::new();
        let (_first, ready) = track(&tracker, a.clone(), a_serialising);
        assert!(ready);
        let (_second, ready) = track(&tracker, b.clone(), b_serialising);
        assert_eq!(ready, expected, "{a:?} {a_serialising} then {b:?} {b_serialising}");
    }
}

#[test]
fn a_waiting_request_is_not_overtaken_and_dropping_it_unblocks_others() {
    let tracker = RequestTracker::new();
    let inside = tracker.enter();
    let (_plain, ready) = track(&tracker, 0..10, false);
    assert!(ready);
    let mut serialising = tracker.track(inside, 5..20, true);
    let (mut later, ready) = track(&tracker, 15..25, false);
    assert!(!ready, "the later request overlaps a waiting one");

    let wakes = Arc::<CountWakes>::default();
    let mut later = Box::pin(later.wait_turn());
    {
        let mut waiting = Box::pin(serialising.wait_turn());
        assert!(poll(waiting.as_mut(), &wakes).is_pending());
        assert!(poll(later.as_mut(), &wakes).is_pending());
    }
    drop(serialising);
    assert!(wakes.0.load(Ordering::SeqCst) > 0);
    assert!(poll(later.as_mut(), &wakes).is_ready());
}

#[test]
fn a_plain_request_precedes_a_later_serialising_one() {
    let tracker = RequestTracker::new();
    let inside = tracker.enter();
    let mut plain = tracker.track(inside, 0..10, false);
    let mut serialising = tracker.track(inside, 0..10, true);
    let wakes = Arc::<CountWakes>::default();
    assert!(poll(std::pin::pin!(plain.wait_turn()), &wakes).is_ready());
    assert!(serialising.has_conflict());
    let mut waiting = Box::pin(serialising.wait_turn());
    assert!(poll(waiting.as_mut(), &wakes).is_pending());
    drop(plain);
    assert!(wakes.0.load(Ordering::SeqCst) > 0);
    assert!(poll(waiting.as_mut(), &wakes).is_ready());
}

#[test]
fn a_serialising_request_waits_for_inline_requests_and_blocks_new_ones() {
    let tracker = RequestTracker::new();
    let inline = tracker.try_inline().expect("no serialising request");
    let inside = tracker.enter();
    let mut serialising = tracker.track(inside, 0..1, true);
    assert!(tracker.try_inline().is_none());
    let wakes = Arc::<CountWakes>::default();
    let mut waiting = Box::pin(serialising.wait_turn());
    assert!(poll(waiting.as_mut(), &wakes).is_pending());
    drop(inline);
    assert!(wakes.0.load(Ordering::SeqCst) > 0);
    assert!(poll(waiting.as_mut(), &wakes).is_ready());
    drop(waiting);
    drop(serialising);
    assert!(tracker.try_inline().is_some());
}

#[test]
fn wait_idle_waits_for_tracked_and_inline_requests() {
    let tracker = RequestTracker::new();
    let wakes = Arc::<CountWakes>::default();
    let inside = tracker.enter();
    let inline = tracker.try_inline();
    assert_eq!(tracker.in_flight(), 2);
    let mut idle = Box::pin(tracker.wait_idle());
    assert!(poll(idle.as_mut(), &wakes).is_pending());
    drop(inline);
    assert!(poll(idle.as_mut(), &wakes).is_pending());
    tracker.leave(inside);
    assert!(wakes.0.load(Ordering::SeqCst) >= 2);
    assert!(poll(idle.as_mut(), &wakes).is_ready());
}

#[test]
fn a_flush_covers_writes_that_ended_before_it_began() {
    let tracker = RequestTracker::new();
    let wakes = Arc::<CountWakes>::default();
    let begin = || match poll(Box::pin(tracker.begin_flush()).as_mut(), &wakes) {
        Poll::Ready(flushing) => flushing,
        Poll::Pending => panic!("no flush in progress"),
    };
    assert!(begin().is_clean());
    let inside = tracker.enter();
    let during = tracker.writing(inside);
    drop(tracker.writing(inside));
    let mut flushing = begin();
    assert!(!flushing.is_clean());
    drop(during);
    flushing.succeeded();
    drop(flushing);
    assert!(!begin().is_clean(), "the write that ended during the flush is not covered");
    begin().succeeded();
    assert!(begin().is_clean());
}

#[test]
fn the_first_flush_failure_is_kept() {
    let tracker = RequestTracker::new();
    tracker.flush_failed(&Error::new(ErrorKind::Io, "first"));
    tracker.flush_failed(&Error::new(ErrorKind::NoSpace, "second"));
    assert_eq!(tracker.flush_failure().expect("it failed").message(), "first");
}

#[test]
fn a_detached_range_keeps_its_place_in_the_order() {
    for is_serialising in [false, true] {
        let tracker = RequestTracker::new();
        let inside = tracker.enter();
        let gone = tracker.track(inside, 0..10, is_serialising);
        let (mut waits, ready) = track(&tracker, 5..15, true);
        assert!(!ready);
        let kept = gone.detach();
        drop(gone);
        let wakes = Arc::<CountWakes>::default();
        let mut waiting = Box::pin(waits.wait_turn());
        assert!(
            poll(waiting.as_mut(), &wakes).is_pending(),
            "a request that waited for the dropped one still waits"
        );
        tracker.release_detached(kept);
        assert!(wakes.0.load(Ordering::SeqCst) > 0);
        assert!(poll(waiting.as_mut(), &wakes).is_ready());
    }
}

#[test]
fn a_detached_range_blocks_only_overlapping_requests() {
    let tracker = RequestTracker::new();
    let inside = tracker.enter();
    let (gone, _) = track(&tracker, 0..10, false);
    let (_beside, _) = track(&tracker, 0..10, false);
    let kept = gone.detach();
    drop(gone);
    assert!(tracker.try_inline().is_none());
    let (_elsewhere, ready) = track(&tracker, 10..20, false);
    assert!(ready);
    let mut later = tracker.track(inside, 9..11, false);
    assert!(later.has_conflict() && !later.may_go());
    tracker.release_detached(kept);
    assert!(later.may_go() && tracker.try_inline().is_some());
}

#[test]
fn detached_ops_are_waited_for_unless_given_up() {
    let tracker = RequestTracker::new();
    let wakes = Arc::<CountWakes>::default();
    let first = tracker.inc_detached();
    let mut alone = Box::pin(tracker.wait_no_detached());
    assert!(poll(alone.as_mut(), &wakes).is_pending());
    tracker.dec_detached(first);
    assert!(poll(alone.as_mut(), &wakes).is_ready());
    let _second = tracker.inc_detached();
    let mut alone = Box::pin(tracker.wait_no_detached());
    assert!(poll(alone.as_mut(), &wakes).is_pending());
    tracker.give_up();
    assert!(poll(alone.as_mut(), &wakes).is_ready());
}

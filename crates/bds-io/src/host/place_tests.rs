//! Where `File::write` executes long writes, by what else its Context has under way.

use std::pin::pin;
use std::task::Poll;

use futures_util::future::join_all;
use futures_util::poll;

use super::{Place, place};
use crate::long_write::InlineLimit;
use crate::{Context, ContextOptions, EngineKind};

const KIB: usize = 1 << 10;

fn context() -> Context {
    let options = ContextOptions { engine: EngineKind::Pool, ..ContextOptions::default() };
    Context::new(options).expect("a Context with threads")
}

async fn measured(len: usize) -> Place {
    place(InlineLimit::Measured, len).await
}

/// How many of so many writes that start at once go to the engine.
async fn to_engine(count: usize, len: usize) -> usize {
    let places = join_all((0..count).map(|_| measured(len))).await;
    places.iter().filter(|place| matches!(place, Place::Engine(_))).count()
}

#[test]
fn writes_that_start_together_go_to_the_engine() {
    let context = context();
    context.block_on(async {
        for (count, expected) in [(1, 0), (2, 0), (3, 3), (8, 8), (32, 32), (1, 0)] {
            assert_eq!(to_engine(count, 64 * KIB).await, expected, "{count} together");
        }
        assert_eq!(to_engine(8, 32 * KIB).await, 0, "short ones");
    });
}

#[test]
fn a_write_that_finds_the_engine_busy_starts_at_once() {
    let context = context();
    context.block_on(async {
        let long = || measured(1 << 20);
        // Longer ones count too.
        let held = (long().await, long().await);
        let mut next = pin!(measured(64 * KIB));
        assert!(matches!(poll!(&mut next), Poll::Ready(Place::Engine(Some(_)))));
        drop(held);
        assert_eq!(to_engine(1, 64 * KIB).await, 0, "it is idle again");
    });
}

#[test]
fn forgotten_and_dropped_writes_leave_no_count() {
    let context = context();
    context.block_on(async {
        for _ in 0..8 {
            let mut kept = Box::pin(measured(64 * KIB));
            assert!(poll!(&mut kept).is_pending());
            std::mem::forget(kept);
            let mut dropped = pin!(measured(64 * KIB));
            assert!(poll!(&mut dropped).is_pending());
        }
        assert_eq!(to_engine(1, 64 * KIB).await, 0);
    });
}

#[test]
fn a_write_that_moved_to_another_context_runs_inline() {
    let (first, second) = (context(), context());
    let mut moved = Box::pin(measured(64 * KIB));
    first.block_on(async { assert!(poll!(&mut moved).is_pending()) });
    // So many arrive at the second one that its numbers are past those of the first.
    second.block_on(async { assert_eq!(to_engine(3, 64 * KIB).await, 3) });
    assert!(matches!(second.block_on(moved), Place::Inline));
}

#[test]
fn without_a_context_it_runs_inline() {
    let mut place = pin!(measured(64 * KIB));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(matches!(place.as_mut().poll(&mut cx), Poll::Ready(Place::Inline)));
}

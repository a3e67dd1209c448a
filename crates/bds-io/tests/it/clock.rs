//! Timers complete in order and never early.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_io::{block_on, now, sleep, spawn};

use crate::support::on_every_engine;

#[test]
fn sleeps_end_in_the_order_of_their_deadlines() {
    on_every_engine(|context| {
        let order = Arc::new(Mutex::new(Vec::new()));
        context.block_on(async {
            let tasks: Vec<_> = [30u64, 10, 20, 0, 10]
                .into_iter()
                .map(|ms| {
                    let order = order.clone();
                    spawn(async move {
                        sleep(Duration::from_millis(ms)).await;
                        order.lock().unwrap().push(ms);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
        });
        assert_eq!(*order.lock().unwrap(), [0, 10, 10, 20, 30]);
    });
}

#[test]
fn no_sleep_ends_early() {
    on_every_engine(|context| {
        for us in [1, 100, 1500, 2999] {
            let start = now();
            context.block_on(sleep(Duration::from_micros(us)));
            assert!(now() - start >= Duration::from_micros(us), "{us}");
        }
    });
}

#[test]
fn abandoned_sleeps_are_removed() {
    on_every_engine(|context| {
        context.block_on(async {
            for _ in 0..10_000 {
                let mut long = Box::pin(sleep(Duration::from_secs(3600)));
                assert!(futures_util::poll!(long.as_mut()).is_pending());
            }
            sleep(Duration::from_millis(1)).await;
        });
    });
}

/// The timer was set on one thread's own ring; that thread then never drives it again.
#[test]
fn a_sleep_may_complete_on_another_thread_than_it_began() {
    let mut nap = Box::pin(sleep(Duration::from_millis(10)));
    block_on(async { assert!(futures_util::poll!(nap.as_mut()).is_pending()) });
    std::thread::spawn(move || block_on(nap)).join().unwrap();
}

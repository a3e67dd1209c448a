//! Use without an own Context: from plain threads, from tokio, from an event loop around poll(2).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bds_io::{Buf, File, block_on, sleep, spawn, spawn_cpu};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::support::{bytes, on_every_engine, pattern, scratch};

/// Uses a file, a task, a sleep and CPU work.
async fn exercise(file: File, seed: u8) {
    let data = pattern(50_000, seed);
    let offset = u64::from(seed) << 20;
    file.write(offset, data.clone().into(), true).await.unwrap();
    let reader = spawn(async move {
        let buf = Buf::zeroed(50_000, 1);
        file.read(offset, buf.iov()).await.unwrap();
        sleep(Duration::from_millis(1)).await;
        file.sync_data().await.unwrap();
        bytes(&buf.iov())
    });
    let (read, sum) = futures_util::join!(reader, spawn_cpu(|| (0..100u32).sum::<u32>()));
    assert_eq!((read, sum), (data, 4950));
}

#[test]
fn plain_threads_need_no_context() {
    let (_dir, file) = scratch();
    let threads: Vec<_> = (0..4)
        .map(|seed| {
            let file = file.clone();
            std::thread::spawn(move || {
                block_on(exercise(file.clone(), seed));
                block_on(exercise(file, seed));
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn tasks_spawned_by_a_plain_thread_continue_after_it() {
    let (sender, receiver) = std::sync::mpsc::channel();
    block_on(async move {
        spawn(async move {
            sleep(Duration::from_millis(5)).await;
            sender.send(7).unwrap();
        })
        .detach();
    });
    assert_eq!(receiver.recv().unwrap(), 7);
}

#[test]
fn tokio_drives_our_futures() {
    let (_dir, file) = scratch();
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    tokio.block_on(async {
        let tasks: Vec<_> = (0..8).map(|seed| tokio::spawn(exercise(file.clone(), seed))).collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn block_on_works_inside_a_tokio_task() {
    let (_dir, file) = scratch();
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    tokio.block_on(async {
        tokio::spawn(async move { block_on(exercise(file, 1)) }).await.unwrap()
    });
}

fn wait_readable(fd: i32) {
    // SAFETY: the Context that owns the descriptor outlives this call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    assert!(
        poll(&mut fds, PollTimeout::from(20_000u16)).unwrap() > 0,
        "the descriptor stays silent"
    );
}

#[test]
fn a_foreign_loop_polls_the_descriptor_and_turns() {
    on_every_engine(|context| {
        let fd = context.fd();
        let (_dir, file) = scratch();
        let done = Arc::new(AtomicBool::new(false));
        let is_done = done.clone();
        let handle = context.handle();
        let inner = handle.clone();
        handle
            .spawn(async move {
                exercise(file.clone(), 1).await;
                // A task from another thread, while the loop sleeps in poll.
                let from_outside = std::thread::spawn(move || inner.spawn(exercise(file, 2)));
                from_outside.join().unwrap().await;
                is_done.store(true, Ordering::Relaxed);
            })
            .detach();
        while !done.load(Ordering::Relaxed) {
            wait_readable(fd);
            context.turn(Some(Duration::ZERO)).unwrap();
        }
    });
}

#[test]
fn the_descriptor_is_not_readable_when_there_is_nothing_to_do() {
    on_every_engine(|context| {
        let fd = context.fd();
        for _ in 0..3 {
            context.turn(Some(Duration::ZERO)).unwrap();
        }
        // SAFETY: as in `wait_readable`.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 0);
        context.spawn(async {}).detach();
        assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 1);
    });
}

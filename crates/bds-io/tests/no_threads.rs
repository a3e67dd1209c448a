//! A process that can start no thread (RLIMIT_NPROC): nothing panics, no operation fails as
//! cancelled, everything is done on the existing threads.
//!
//! Its own process and without a harness: the limit holds for the whole process and not for root,
//! and a harness starts threads.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test without a harness: it fails by panic and says what it skips"
)]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context as Cx, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use bds_io::{
    Buf, Context, ContextOptions, EngineKind, File, Fs, OpenOptions, ZeroMode, block_on,
    ensure_context, sleep, spawn, spawn_cpu,
};

const UNPRIVILEGED_UID: libc::uid_t = 65534;

/// Forbids this process to start threads. False if that cannot be done here.
fn forbid_threads() -> bool {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: three system calls with plain values; the process has one thread, so that all of it
    // changes its user.
    unsafe {
        if libc::geteuid() == 0
            && (libc::setresgid(UNPRIVILEGED_UID, UNPRIVILEGED_UID, UNPRIVILEGED_UID) != 0
                || libc::setresuid(UNPRIVILEGED_UID, UNPRIVILEGED_UID, UNPRIVILEGED_UID) != 0)
        {
            return false;
        }
        if libc::setrlimit(libc::RLIMIT_NPROC, &raw const none) != 0 {
            return false;
        }
    }
    thread::Builder::new().spawn(|| ()).is_err()
}

/// A foreign executor: polls, and parks between.
fn foreign<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Cx::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park_timeout(Duration::from_secs(60)),
        }
    }
}

/// Every operation that the kernel executes on a thread of its own, and those of our pool.
async fn use_file(file: &File, round: u8) {
    let len = 1 << 20;
    let buf = Buf::zeroed(len, 4096);
    buf.iov().fill(0..len, round);
    // Durable, and too long to be done inline.
    assert_eq!(file.write(0, buf.iov(), true).await.unwrap(), len);
    file.sync_data().await.unwrap();
    file.zero_range(4096..8192, ZeroMode::Extend).await.unwrap();
    file.zero_range(0..4096, ZeroMode::PunchHole).await.unwrap();
    file.set_len(len as u64 / 2).await.unwrap();
    let back = Buf::zeroed(len, 4096);
    assert_eq!(file.read(0, back.iov()).await.unwrap(), len / 2);
    assert!(back.iov().is_zero(0..4096));
    assert_eq!(back.iov().to_vec(8192..len / 2), vec![round; len / 2 - 8192]);
    // Many at once, more than a thread's ring has entries.
    let reads = (0..200u64).map(|at| file.read(at * 1000, Buf::zeroed(1000, 1).iov()));
    for read in futures_util::future::join_all(reads).await {
        assert_eq!(read.unwrap(), 1000);
    }
}

async fn use_tasks(file: &File) {
    let count = Arc::new(AtomicU32::new(0));
    let (file, counted) = (file.clone(), count.clone());
    let task = spawn(async move {
        for _ in 0..10 {
            file.sync_data().await.unwrap();
            sleep(Duration::from_millis(1)).await;
            counted.fetch_add(1, Ordering::Relaxed);
        }
        spawn_cpu(|| 7).await
    });
    assert_eq!(task.await, 7);
    assert_eq!(count.load(Ordering::Relaxed), 10);
}

/// Spawns from its drop, as an abandoned request does.
struct SpawnsWhenDropped(Arc<AtomicU32>);

impl Drop for SpawnsWhenDropped {
    fn drop(&mut self) {
        let count = self.0.clone();
        spawn(async move {
            sleep(Duration::from_millis(1)).await;
            count.fetch_add(1, Ordering::Relaxed);
        })
        .detach();
    }
}

fn main() {
    let open = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    let dir = tempfile::tempdir().unwrap();
    let file = Fs::Host.open(&dir.path().join("file"), &open).unwrap();
    // Open descriptions stay; the name is not needed any more, and could not be removed later.
    drop(dir);
    if !forbid_threads() {
        println!("skipped: threads can be started in spite of RLIMIT_NPROC");
        return;
    }
    assert!(ensure_context().is_err(), "early, and no panic");
    block_on(async { ensure_context().unwrap() });

    println!("foreign executor");
    foreign(use_file(&file, 1));
    foreign(use_tasks(&file));
    println!("plain thread");
    block_on(use_file(&file, 2));
    block_on(use_tasks(&file));
    for engine in [EngineKind::Uring, EngineKind::Pool] {
        println!("{engine:?}");
        match Context::new(ContextOptions { engine, ..ContextOptions::default() }) {
            Ok(context) => {
                context.block_on(use_file(&file, 3));
                context.block_on(use_tasks(&file));
            }
            Err(error) => println!("skipped: {error}"),
        }
    }
    println!("drops");
    let count = Arc::new(AtomicU32::new(0));
    drop(SpawnsWhenDropped(count.clone()));
    assert_eq!(count.load(Ordering::Relaxed), 1, "outside any Context it is done at once");
    block_on(async {
        drop(SpawnsWhenDropped(count.clone()));
        while count.load(Ordering::Relaxed) < 2 {
            sleep(Duration::from_millis(1)).await;
        }
    });
    println!("ok");
}

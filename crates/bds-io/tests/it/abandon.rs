//! Dropped and forgotten futures: at any await, with their buffers released at once.
//!
//! The kernel (or a thread) still reads and writes that memory then. AddressSanitizer sees what our
//! own code does wrong but not what the kernel writes, so the tests also check whether the memory
//! still has an owner, and whether memory allocated anew stays untouched.
//!
//! With AddressSanitizer (nightly; forgotten futures are leaks on purpose; `bds_byte_copies`
//! chooses the copies in Rust, because sanitizers do not see the assembly of `buf/raw/wide.rs`):
//! ```sh
//! ASAN_OPTIONS=detect_leaks=0 RUSTFLAGS="-Zsanitizer=address --cfg bds_byte_copies" \
//!     cargo +nightly test -p bds-io --test it \
//!     --target x86_64-unknown-linux-gnu --target-dir target/asan
//! ```

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bds_io::{
    Buf, BufPool, Context, ContextOptions, EngineKind, File, IoVec, OpenOptions, ZeroMode,
};

use crate::support::{bytes, on_every_engine, pattern, scratch_with};

/// Drives `future` until it has returned `Pending` `polls` times. Ready: it ended before.
fn poll_times<F: Future + ?Sized>(
    context: &Context,
    mut future: Pin<&mut F>,
    polls: usize,
) -> Poll<F::Output> {
    let mut left = polls;
    context.block_on(poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Poll::Ready(output)),
        Poll::Pending => {
            left -= 1;
            if left == 0 { Poll::Ready(Poll::Pending) } else { Poll::Pending }
        }
    }))
}

/// Every leaf operation, one after the other, each with memory that no other owner keeps.
async fn everything(file: File, pool: BufPool) {
    let write = |offset, len| {
        let buf = pool.take(len);
        buf.iov().fill(0..len, 7);
        (offset, buf.iov())
    };
    let (offset, iov) = write(0, 65_536);
    file.write(offset, iov, true).await.unwrap();
    let mut scattered = IoVec::new();
    for _ in 0..4 {
        scattered.push(write(0, 16_384).1);
    }
    file.write(65_536, scattered, false).await.unwrap();
    file.read(0, pool.take(65_536).iov()).await.unwrap();
    let into: IoVec = (0..4).map(|_| pool.take(16_384).iov()).collect();
    file.read(0, into).await.unwrap();
    file.sync_data().await.unwrap();
    file.zero_range(0..4096, ZeroMode::PunchHole).await.unwrap();
    file.set_len(1 << 20).await.unwrap();
    let _ = file.copy_range_to(0, &file.clone(), 1 << 19, 4096).await;
    bds_io::spawn_cpu(|| ()).await;
    bds_io::sleep(Duration::from_nanos(1)).await;
    bds_io::yield_now().await;
}

fn sweep(direct: bool, abandon: fn(Pin<Box<dyn Future<Output = ()>>>)) {
    on_every_engine(|context| {
        let options =
            OpenOptions { direct, inline_write_max_bytes: Some(0), ..OpenOptions::default() };
        let (_dir, file) = scratch_with(&options);
        let (_dir2, other) = scratch_with(&options);
        let mut polls = 1;
        loop {
            // Budget 0: memory returns to the allocator with its last owner.
            let pool = BufPool::new(0);
            let mut future: Pin<Box<dyn Future<Output = ()>>> =
                Box::pin(everything(file.clone(), pool));
            if poll_times(context, future.as_mut(), polls).is_ready() {
                break;
            }
            abandon(future);
            // Memory that was freed too early is allocated here: a late write of the kernel would
            // show in it.
            let canaries: Vec<_> = (0..16).map(|_| vec![0xaa; 16_384]).collect();
            // BlockOps in flight still complete, and the Context still works.
            let data = pattern(4096, 1);
            context.block_on(async {
                other.write(0, Buf::from_slice(&data).iov(), false).await.unwrap();
                let buf = Buf::zeroed(4096, 4096);
                other.read(0, buf.iov()).await.unwrap();
                assert!(bytes(&buf.iov()) == data);
                other.sync_data().await.unwrap();
            });
            assert!(canaries.iter().flatten().all(|byte| *byte == 0xaa), "memory freed too early");
            polls += 1;
        }
        assert!(polls > 3, "the sweep met too few awaits: {polls}");
    });
}

#[test]
fn buffered_operations_may_be_dropped_at_every_await() {
    sweep(false, drop);
}

#[test]
fn buffered_operations_may_be_forgotten_at_every_await() {
    sweep(false, std::mem::forget);
}

#[test]
fn direct_operations_may_be_dropped_at_every_await() {
    sweep(true, drop);
}

#[test]
fn direct_operations_may_be_forgotten_at_every_await() {
    sweep(true, std::mem::forget);
}

/// A read of an empty pipe stays in flight until it is written to.
fn empty_pipe() -> (File, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    (File::from_fd(reader.into(), &OpenOptions::default()).unwrap(), writer)
}

#[test]
fn memory_lives_until_the_operation_ends_not_until_the_future_is_dropped() {
    use std::io::Write;
    on_every_engine(|context| {
        let (file, mut writer) = empty_pipe();
        let buf = Buf::zeroed(4096, 1);
        {
            let mut read = pin!(file.read(0, buf.iov()));
            assert!(poll_times(context, read.as_mut(), 1).is_pending());
        }
        let mut buf = buf;
        // Pipes have no offsets: pool threads get ESPIPE at once, the ring waits for data.
        if context.engine() == EngineKind::Uring {
            assert!(buf.get_mut().is_none(), "the dropped read still points at it");
        }
        writer.write_all(b"late").unwrap();
        for _ in 0..1000 {
            context.turn(Some(Duration::from_millis(10))).unwrap();
            if buf.get_mut().is_some() {
                return;
            }
        }
        panic!("the operation never ended");
    });
}

#[test]
fn dropping_a_context_cancels_an_abandoned_operation() {
    let options = ContextOptions { engine: EngineKind::Uring, ..ContextOptions::default() };
    let context = match Context::new(options) {
        Ok(context) => context,
        Err(error) => return println!("skipped: no io_uring here: {error}"),
    };
    let (file, _writer) = empty_pipe();
    let mut buf = Buf::zeroed(4096, 1);
    {
        let mut read = pin!(file.read(0, buf.iov()));
        assert!(poll_times(&context, read.as_mut(), 1).is_pending());
    }
    drop(context);
    assert!(buf.get_mut().is_some(), "the end of the Context is the end of its operations");
}

#[test]
fn a_future_may_complete_on_another_thread_than_it_began() {
    on_every_engine(|context| {
        let (_dir, file) = scratch_with(&OpenOptions::default());
        let buf = Buf::zeroed(4096, 1);
        let iov = buf.iov();
        let mut read = Box::pin(async move {
            file.write(0, pattern(4096, 9).into(), true).await.unwrap();
            file.read(0, iov).await.unwrap()
        });
        assert!(poll_times(context, read.as_mut(), 1).is_pending());
        let other = std::thread::spawn(move || bds_io::block_on(read));
        while !other.is_finished() {
            context.turn(Some(Duration::from_millis(1))).unwrap();
        }
        assert_eq!(other.join().unwrap(), 4096);
        assert!(bytes(&buf.iov()) == pattern(4096, 9));
    });
}

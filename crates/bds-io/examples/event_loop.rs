//! Reads a file through io_uring from a foreign event loop: one poll(2) over the Context's
//! descriptor and another one.
//!
//! This is how a VMM or a server embeds bds-io without an extra thread: its loop polls
//! `Context::fd` beside its own descriptors and calls `turn` when it is readable. Here the other
//! descriptor is a pipe that a thread writes to.
//!
//! `cargo run -p bds-io --example event_loop [file]` prints the length of the file and a checksum.
#![expect(clippy::print_stdout, reason = "an example that shows a result")]

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc;
use std::time::Duration;

use bds_io::{BufPool, Context, ContextOptions, File, Fs, OpenOptions};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Bytes of one read.
const CHUNK_LEN: usize = 64 << 10;
/// Reads in flight at once.
const DEPTH: usize = 8;

/// Reads the whole file with several reads in flight; returns its length and the sum of its bytes.
async fn checksum(file: File) -> io::Result<(u64, u64)> {
    let pool = BufPool::new(DEPTH * CHUNK_LEN);
    let len = file.len()?;
    let (mut offset, mut sum) = (0, 0u64);
    while offset < len {
        // The reads run as tasks of the Context; awaiting them in order keeps the file's order.
        let reads: Vec<_> = (offset..len).step_by(CHUNK_LEN).take(DEPTH).collect();
        let tasks: Vec<_> = reads
            .iter()
            .map(|&at| {
                let (file, buf) = (file.clone(), pool.take(CHUNK_LEN));
                bds_io::spawn(async move { file.read(at, buf.iov()).await.map(|n| (buf, n)) })
            })
            .collect();
        for task in tasks {
            let (buf, n) = task.await?;
            // Shared memory is read by copying: nothing may change a byte between check and use.
            sum += buf.iov().to_vec(0..n).into_iter().map(u64::from).sum::<u64>();
        }
        offset = reads.last().map_or(len, |at| at + CHUNK_LEN as u64);
    }
    Ok((len, sum))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or_else(|| file!().to_owned());
    let file = Fs::Host.open(path.as_ref(), &OpenOptions::default())?;

    // io_uring where the kernel has it, else threads.
    let context = Context::new(ContextOptions::default())?;
    println!("engine: {:?}", context.engine());
    // SAFETY: the descriptor belongs to `context`, which lives until the end of this function.
    let context_fd = unsafe { BorrowedFd::borrow_raw(context.fd()) };

    // The loop's other descriptor: a pipe that another thread writes to.
    let (mut reader, mut writer) = io::pipe()?;
    let ticker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        writer.write_all(b"x")
    });

    let (sender, receiver) = mpsc::channel();
    context
        .spawn(async move {
            // Fails only if the loop below has ended.
            let _ = sender.send(checksum(file).await);
        })
        .detach();

    let (mut result, mut has_ticked) = (None, false);
    while result.is_none() || !has_ticked {
        let mut fds = vec![PollFd::new(context_fd, PollFlags::POLLIN)];
        if !has_ticked {
            fds.push(PollFd::new(reader.as_fd(), PollFlags::POLLIN));
        }
        poll(&mut fds, PollTimeout::NONE)?;
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        let (is_context_ready, is_pipe_ready) = (is_ready(&fds[0]), fds[1..].iter().any(is_ready));
        if is_context_ready {
            // Submits, reaps and runs tasks; never waits.
            context.turn(Some(Duration::ZERO))?;
        }
        if is_pipe_ready {
            reader.read_exact(&mut [0])?;
            println!("the other descriptor was readable");
            has_ticked = true;
        }
        if let Ok(done) = receiver.try_recv() {
            result = Some(done?);
        }
    }
    ticker.join().map_err(|_| "the other thread panicked")??;
    if let Some((len, sum)) = result {
        println!("{path}: {len} bytes, sum of bytes {sum}");
    }
    Ok(())
}

//! `bench`: measures how fast an image is read or written.
//!
//! `depth` workers a thread keep one request each in flight, with one buffer each for the whole
//! run. A worker tries the inline request first; only a request that has to wait becomes a future.
//! The threads share the requests.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use bds_core::driver::{CacheMode, WriteFlags};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Buf, Context, ContextOptions, IoVec};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::json;

use crate::args::Bench;
use crate::image;
use crate::image_spec::{self, Spec};
use crate::printer;

/// Inline answers after which a worker lets the others run.
const TURN_LEN: u32 = 64;

/// The checked arguments.
#[derive(Clone, Debug)]
struct Plan {
    count: u64,
    depth: u32,
    offset: u64,
    len: u64,
    step: u64,
    is_write: bool,
    pattern: u8,
    flush_interval: u32,
    drains: bool,
    threads: u32,
    cache: CacheMode,
}

pub(crate) fn run(args: &Bench) -> Result<()> {
    let plan = plan(args)?;
    let mut spec = Spec::read(&args.filename, &args.source)?.cache(plan.cache);
    if plan.is_write {
        spec = spec.writable();
    }
    let context =
        Context::new(ContextOptions::default()).map_err(|e| Error::io(e, "cannot start"))?;
    let graph = image::trusting_graph();
    let node = context.block_on(image::open(&graph, &spec))?;
    let backend = Arc::new(image::backend(&node, plan.is_write)?);
    check_size(&plan, backend.len())?;
    if !args.quiet && !args.json {
        announce(&plan)?;
    }
    let took = if plan.threads == 1 {
        let began = Instant::now();
        context.block_on(run_share(&backend, &plan, 0))?;
        began.elapsed()
    } else {
        on_threads(&backend, &plan)?
    };
    if args.json {
        print_result(&plan, took)?;
    } else if !args.quiet {
        printer::line(format_args!("Run completed in {:.3} seconds.", took.as_secs_f64()))?;
    }
    let backend = Arc::into_inner(backend).expect("all workers have ended");
    context.block_on(image::close(backend, node))
}

fn plan(args: &Bench) -> Result<Plan> {
    if let Some(aio) = args.aio.as_deref()
        && !matches!(aio, "threads" | "native" | "io_uring")
    {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "invalid aio option: use threads, native or io_uring",
        )
        .field("aio", aio));
    }
    let len = super::size("buffer size", &args.buffer_size)?;
    // 0 means the default, as in qemu-img.
    let step = args.step_size.as_deref().map_or(Ok(len), |text| super::size("step size", text))?;
    let refuse = |words: &str| Err(Error::new(ErrorKind::InvalidInput, words));
    if args.count == 0 || args.depth == 0 || args.threads == 0 || len == 0 || len > 1 << 30 {
        return refuse(
            "count, depth, threads and buffer size must be at least 1, the buffer at most 1G",
        );
    }
    if !args.write && args.flush_interval > 0 {
        return refuse("--flush-interval is only available in write tests");
    }
    if args.flush_interval > 0 && args.flush_interval < args.depth {
        return refuse("Flush interval can't be smaller than depth");
    }
    if args.source.image_opts && args.source.format.is_some() {
        return refuse("--image-opts and --format are mutually exclusive");
    }
    Ok(Plan {
        count: args.count,
        depth: args.depth,
        offset: super::size("offset", &args.offset)?,
        len,
        step: if step == 0 { len } else { step },
        is_write: args.write,
        pattern: args.pattern,
        flush_interval: args.flush_interval,
        drains: !args.no_drain,
        threads: args.threads,
        cache: image_spec::cache_mode("-t", &args.cache)?,
    })
}

fn check_size(plan: &Plan, image_len: u64) -> Result<()> {
    let fits = plan.offset.checked_add(plan.len).is_some_and(|end| end <= image_len);
    if fits {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidInput, "the first request lies past the end of the image")
        .field("image size", image_len))
}

fn announce(plan: &Plan) -> Result<()> {
    let kind = if plan.is_write { "write" } else { "read" };
    printer::line(format_args!(
        "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
        plan.count, plan.len, plan.depth, plan.offset, plan.step
    ))?;
    if plan.flush_interval == 0 {
        return Ok(());
    }
    printer::line(format_args!("Sending flush every {} requests", plan.flush_interval))
}

#[expect(clippy::cast_precision_loss, reason = "rates")]
fn print_result(plan: &Plan, took: Duration) -> Result<()> {
    let seconds = took.as_secs_f64();
    printer::json(&json!({
        "requests": plan.count,
        "bytes": plan.len,
        "depth": plan.depth,
        "threads": plan.threads,
        "write": plan.is_write,
        "seconds": seconds,
        "iops": plan.count as f64 / seconds,
        "mib-per-second": plan.count as f64 * plan.len as f64 / seconds / 1_048_576.0,
    }))
}

/// Runs the requests on several threads with a Context each, which begin at the same moment.
fn on_threads(backend: &Arc<Backend>, plan: &Plan) -> Result<Duration> {
    let barrier = Arc::new(Barrier::new(plan.threads as usize + 1));
    let threads: Vec<_> = (0..plan.threads)
        .map(|number| {
            let (backend, plan, barrier) = (backend.clone(), plan.clone(), barrier.clone());
            std::thread::spawn(move || {
                let context = Context::new(ContextOptions::default());
                barrier.wait();
                let context = context.map_err(|e| Error::io(e, "cannot start a thread"))?;
                context.block_on(run_share(&backend, &plan, number))
            })
        })
        .collect();
    barrier.wait();
    let began = Instant::now();
    let mut outcome = Ok(());
    for thread in threads {
        let ended = thread.join().unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Io, "a thread of the benchmark has panicked"))
        });
        outcome = outcome.and(ended);
    }
    outcome.map(|()| began.elapsed())
}

/// Generates the offsets of requests, for the workers of one thread.
struct RequestOffsets {
    left: Cell<u64>,
    next: Cell<u64>,
    step: u64,
    len: u64,
    image_len: u64,
}

impl RequestOffsets {
    #[inline]
    fn next(&self) -> Option<u64> {
        let left = self.left.get().checked_sub(1)?;
        self.left.set(left);
        let at = self.next.get();
        let mut next = at + self.step;
        if next + self.len > self.image_len {
            next %= self.image_len;
            if next + self.len > self.image_len {
                next = 0;
            }
        }
        self.next.set(next);
        Some(at)
    }
}

/// Runs one thread's share of the requests.
async fn run_share(backend: &Backend, plan: &Plan, number: u32) -> Result<()> {
    let threads = u64::from(plan.threads);
    let each = plan.count / threads;
    let extra = u64::from(u64::from(number) < plan.count % threads);
    let image_len = backend.len();
    // Each share begins where the one before it ends, so that threads do not access the same
    // blocks.
    let ahead = u128::from(number) * u128::from(each) * u128::from(plan.step);
    let span = u128::from((image_len - plan.len).max(1));
    let begin = (u128::from(plan.offset) + ahead) % span;
    let begin = u64::try_from(begin).expect("below the image's length");
    let begin = if number == 0 { plan.offset } else { begin / plan.len * plan.len };
    let offsets = RequestOffsets {
        left: Cell::new(each + extra),
        next: Cell::new(begin),
        step: plan.step,
        len: plan.len,
        image_len,
    };
    if plan.flush_interval > 0 {
        return flushing(backend, plan, &offsets).await;
    }
    let mut workers: FuturesUnordered<_> =
        (0..plan.depth).map(|_| work(backend, plan, &offsets)).collect();
    while let Some(ended) = workers.next().await {
        ended?;
    }
    Ok(())
}

fn buffer(plan: &Plan) -> IoVec {
    let len = usize::try_from(plan.len).expect("checked against 1 GiB");
    let iov = Buf::zeroed(len, 4096).iov();
    iov.fill(0..len, if plan.is_write { plan.pattern } else { 0 });
    iov
}

async fn work(backend: &Backend, plan: &Plan, offsets: &RequestOffsets) -> Result<()> {
    let iov = buffer(plan);
    let mut inline_run = 0;
    while let Some(at) = offsets.next() {
        let at_once =
            if plan.is_write { backend.try_write(at, &iov) } else { backend.try_read(at, &iov) };
        match at_once {
            Some(outcome) => outcome?,
            None if plan.is_write => {
                backend.write_waiting(at, iov.clone(), WriteFlags::empty()).await?;
            }
            None => backend.read_waiting(at, iov.clone()).await?,
        }
        inline_run += 1;
        if inline_run == TURN_LEN {
            inline_run = 0;
            bds_io::yield_now().await;
        }
    }
    Ok(())
}

/// Writes with a flush after every interval: once earlier writes have completed, or (`--no-drain`)
/// at once.
async fn flushing(backend: &Backend, plan: &Plan, offsets: &RequestOffsets) -> Result<()> {
    let buffers = Rc::new(std::cell::RefCell::new(vec![buffer(plan); plan.depth as usize]));
    let mut in_flight = FuturesUnordered::new();
    let mut since_flush = 0;
    loop {
        let is_due = since_flush == plan.flush_interval;
        if is_due && (in_flight.is_empty() || !plan.drains) {
            since_flush = 0;
            backend.flush().await?;
            continue;
        }
        let spare = if is_due { None } else { buffers.borrow_mut().pop() };
        let next = spare.and_then(|iov| offsets.next().map(|at| (at, iov)));
        match next {
            Some((at, iov)) => {
                since_flush += 1;
                let buffers = Rc::clone(&buffers);
                in_flight.push(async move {
                    backend.write(at, iov.clone(), WriteFlags::empty()).await?;
                    buffers.borrow_mut().push(iov);
                    Ok::<(), Error>(())
                });
            }
            None => match in_flight.next().await {
                Some(ended) => ended?,
                None => return Ok(()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_offsets_wrap_inside_the_image() {
        let offsets = RequestOffsets {
            left: Cell::new(6),
            next: Cell::new(0),
            step: 4096,
            len: 4096,
            image_len: 3 * 4096 + 100,
        };
        let offsets: Vec<u64> = std::iter::from_fn(|| offsets.next()).collect();
        assert_eq!(offsets, [0, 4096, 8192, 0, 4096, 8192]);
    }
}

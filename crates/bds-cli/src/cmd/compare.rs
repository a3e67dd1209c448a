//! `compare`: compares the contents of two images.
//!
//! Zeros may be stored differently: only ranges where one side has data are read. Exit codes are
//! qemu-img's: 0 same, 1 different, 2 cannot open, 3 cannot query block status, 4 cannot read.

use std::process::ExitCode;
use std::sync::Arc;

use bds_core::driver::StatusFlags;
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Buf, BufPool, Context, ContextOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;

use crate::args::Compare;
use crate::image;
use crate::image_spec::{self, Spec};
use crate::interrupt::{self, Interrupt};
use crate::progress::Progress;
use crate::{printer, report};

/// Bytes compared at once: both sides of a piece stay in a core's cache between reading and
/// comparing.
const PIECE_LEN: u64 = 256 << 10;
/// Idle buffers kept for the next pieces.
const POOL_BYTES: usize = 4 << 20;
/// Pieces in flight. Enough to keep a disk and a decompressor busy.
const DEPTH: usize = 8;
/// Differences are reported at the begin of their sector, as qemu-img does.
const SECTOR_LEN: usize = 512;

/// Exit code when the result could not be printed; 1 would mean "different".
const NOT_PRINTED: u8 = 2;

/// The result of a comparison.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    Different(String),
}

/// An error, by the step that failed: each has an exit code.
enum Failure {
    Open(Error),
    Print(Error),
    Status(Error),
    Read(Error),
}

pub(crate) fn run(args: &Compare) -> ExitCode {
    let context = match Context::new(ContextOptions::default()) {
        Ok(context) => context,
        Err(e) => {
            report::failure(&Error::io(e, "cannot start"));
            return ExitCode::from(2);
        }
    };
    match context.block_on(compare(args)) {
        Ok(verdict) => {
            let (message, code) = match verdict {
                Verdict::Same => ("Images are identical.".to_owned(), 0),
                Verdict::Different(message) => (message, 1),
            };
            let printed = if args.quiet { Ok(()) } else { printer::line(message) };
            match printed {
                Ok(()) => ExitCode::from(code),
                Err(error) => {
                    report::failure(&error);
                    ExitCode::from(NOT_PRINTED)
                }
            }
        }
        Err(failure) => {
            let (error, code) = match &failure {
                Failure::Open(error) => (error, 2),
                Failure::Print(error) => (error, NOT_PRINTED),
                Failure::Status(error) => (error, 3),
                Failure::Read(error) => (error, 4),
            };
            report::failure(error);
            let of_signal = interrupt::exit_code().filter(|_| error.kind() == ErrorKind::Cancelled);
            ExitCode::from(of_signal.unwrap_or(code))
        }
    }
}

async fn compare(args: &Compare) -> Result<Verdict, Failure> {
    let (first, second) = specs(args).map_err(Failure::Open)?;
    let graph = image::trusting_graph();
    let first = image::open(&graph, &first).await.map_err(Failure::Open)?;
    let second = image::open(&graph, &second).await.map_err(Failure::Open)?;
    let a = Arc::new(image::backend(&first, false).map_err(Failure::Open)?);
    let b = Arc::new(image::backend(&second, false).map_err(Failure::Open)?);
    if args.strict && a.len() != b.len() {
        return Ok(Verdict::Different("Strict mode: Image size mismatch!".to_owned()));
    }
    let interrupt = Interrupt::watch().map_err(Failure::Open)?;
    let mut progress = Progress::new(args.progress && !args.quiet);
    let total = a.len().max(b.len());
    let pool = BufPool::new(POOL_BYTES);
    let mut comparison =
        Comparison { a, b, at: 0, total, is_strict: args.strict, pool, known: [None, None] };
    let verdict = comparison.run(args.quiet, &interrupt, &mut progress).await;
    match &verdict {
        Ok(Verdict::Same) => progress.finish(total),
        _ => progress.abandon(),
    }
    verdict
}

fn specs(args: &Compare) -> Result<(Spec<'_>, Spec<'_>)> {
    let cache = image_spec::cache_mode("-T", &args.cache)?;
    let first = Spec::read(&args.first, &args.source)?.cache(cache);
    let mut second = Spec::read(&args.second, &args.source)?.cache(cache);
    second.format = args.second_format.as_deref();
    Ok((first, second))
}

/// Compares two images from start to end.
struct Comparison {
    a: Arc<Backend>,
    b: Arc<Backend>,
    at: u64,
    total: u64,
    is_strict: bool,
    pool: BufPool,
    /// The last block status of each image, valid up to its end.
    known: [Option<Side>; 2],
}

/// The result of one step, found without reading data.
enum Step {
    /// Nothing to read up to here.
    Skip(u64),
    /// Read and compare this.
    Read(Piece),
    /// Already different.
    Different(String),
}

/// Bytes to be read and compared. A side that is `None` is zeros there.
struct Piece {
    offset: u64,
    len: u64,
    a: Option<Arc<Backend>>,
    b: Option<Arc<Backend>>,
    pool: BufPool,
}

impl Comparison {
    async fn run(
        &mut self,
        is_quiet: bool,
        interrupt: &Interrupt,
        progress: &mut Progress,
    ) -> Result<Verdict, Failure> {
        let common = self.a.len().min(self.b.len());
        let mut is_warned = self.total == common;
        let mut pieces = FuturesOrdered::new();
        progress.show(0, self.total);
        loop {
            while self.at < self.total && pieces.len() < DEPTH {
                if interrupt.has_arrived() {
                    let message =
                        format!("interrupted: {} of {} bytes compared", self.at, self.total);
                    return Err(Failure::Read(Error::new(ErrorKind::Cancelled, message)));
                }
                if self.at >= common && !is_warned && pieces.is_empty() {
                    is_warned = true;
                    if !is_quiet {
                        printer::line("Warning: Image size mismatch!").map_err(Failure::Print)?;
                    }
                } else if self.at >= common && !is_warned {
                    // The common part must be compared first.
                    break;
                }
                match self.step(common).await.map_err(Failure::Status)? {
                    Step::Skip(end) => self.at = end,
                    Step::Read(piece) => {
                        self.at = piece.offset + piece.len;
                        pieces.push_back(piece.compare());
                    }
                    // Earlier pieces may differ as well and are reported first.
                    Step::Different(message) => {
                        while let Some(found) = pieces.next().await {
                            if let Some(at) = found.map_err(Failure::Read)? {
                                return Ok(mismatch(at));
                            }
                        }
                        return Ok(Verdict::Different(message));
                    }
                }
            }
            match pieces.next().await {
                None if self.at >= self.total => return Ok(Verdict::Same),
                None => {}
                Some(found) => {
                    if let Some(at) = found.map_err(Failure::Read)? {
                        return Ok(mismatch(at));
                    }
                    progress.show(self.at, self.total);
                }
            }
        }
    }

    /// Returns the block status of image `number` at the current offset; cached, because a long run
    /// is cut into many pieces.
    async fn side(&mut self, number: usize, end: u64) -> Result<Side> {
        if let Some(side) = self.known[number]
            && side.end > self.at
        {
            return Ok(side);
        }
        let backend = if number == 0 { &self.a } else { &self.b };
        let side = if self.at >= backend.len() {
            // A shorter image shows zeros behind its end.
            Side { end, is_zero: true, facts: StatusFlags::empty() }
        } else {
            let run = backend.block_status(self.at, end - self.at, true).await?;
            Side {
                end: self.at + run.len,
                is_zero: run.flags.contains(StatusFlags::ZERO),
                // Where a run ends depends on the layout, not on the content.
                facts: run.flags.difference(StatusFlags::EOF),
            }
        };
        self.known[number] = Some(side);
        Ok(side)
    }

    async fn step(&mut self, common: u64) -> Result<Step> {
        let end = if self.at < common { common } else { self.total };
        let (a, b) = (self.side(0, end).await?, self.side(1, end).await?);
        if self.is_strict && a.facts != b.facts {
            let message = format!("Strict mode: Offset {} block status mismatch!", self.at);
            return Ok(Step::Different(message));
        }
        let len = a.end.min(b.end) - self.at;
        if a.is_zero && b.is_zero {
            return Ok(Step::Skip(self.at + len));
        }
        let data = |side: &Side, backend: &Arc<Backend>| (!side.is_zero).then(|| backend.clone());
        Ok(Step::Read(Piece {
            offset: self.at,
            len: len.min(PIECE_LEN),
            a: data(&a, &self.a),
            b: data(&b, &self.b),
            pool: self.pool.clone(),
        }))
    }
}

/// The block status of one image at an offset.
#[derive(Clone, Copy)]
struct Side {
    end: u64,
    is_zero: bool,
    /// What must agree in strict mode.
    facts: StatusFlags,
}

impl Piece {
    /// The offset of the first difference, if there is one.
    async fn compare(self) -> Result<Option<u64>> {
        let read = async |backend: &Option<Arc<Backend>>| match backend {
            None => Ok(None),
            Some(backend) => read(backend, &self.pool, self.offset, self.len).await.map(Some),
        };
        let (a, b) = futures_util::try_join!(read(&self.a), read(&self.b))?;
        let found = match (a, b) {
            (Some(mut a), Some(mut b)) => first_difference(bytes(&mut a)?, bytes(&mut b)?),
            (Some(mut one), None) | (None, Some(mut one)) => first_nonzero(bytes(&mut one)?),
            (None, None) => None,
        };
        Ok(found.map(|at| self.offset + (at / SECTOR_LEN * SECTOR_LEN) as u64))
    }
}

async fn read(backend: &Backend, pool: &BufPool, offset: u64, len: u64) -> Result<Buf> {
    let buf = pool.take(usize::try_from(len).expect("a piece fits into memory"));
    backend.read(offset, buf.iov()).await?;
    Ok(buf)
}

/// The bytes of a buffer whose read is over.
fn bytes(buf: &mut Buf) -> Result<&mut [u8]> {
    buf.get_mut()
        .ok_or_else(|| Error::new(ErrorKind::Io, "a buffer is still in use after its read"))
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    // Whole slices compare at memory speed; only an unequal piece is looked at closely.
    if a == b { None } else { a.iter().zip(b).position(|(x, y)| x != y) }
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    let is_zero = |chunk: &[u8]| chunk.iter().fold(0, |all, byte| all | byte) == 0;
    let chunk = bytes.chunks(4096).position(|chunk| !is_zero(chunk))?;
    bytes[chunk * 4096..].iter().position(|byte| *byte != 0).map(|at| chunk * 4096 + at)
}

fn mismatch(at: u64) -> Verdict {
    Verdict::Different(format!("Content mismatch at offset {at}!"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_nonzero_byte_is_found_in_any_chunk() {
        for at in [0, 1, 4095, 4096, 9999] {
            let mut bytes = vec![0; 10_000];
            assert_eq!(first_nonzero(&bytes), None);
            bytes[at] = 1;
            assert_eq!(first_nonzero(&bytes), Some(at));
        }
    }
}

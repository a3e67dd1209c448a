//! The codecs of compressed clusters: raw deflate and zstd.
//!
//! Decoding fills exactly the buffer it is given and never more; what follows in the input is
//! ignored, because the length in a descriptor is rounded up to sectors. Encoding gives at most a
//! cluster less one byte, or says that the cluster is better stored as it is. Contexts are kept by
//! thread, so a cluster costs no allocation. Nothing here does I/O.
//!
//! **Deflate** is written with a window of 2^12, which is all that QEMU's decoder promises, and
//! read with 2^15, which is what other writers use. **zstd** may come in several
//! frames; a frame's window is bounded, so a small input cannot ask for much memory.
//!
//! Levels, by 64-KiB clusters of a mixed 48 MiB sample (programs, text, sources, a few archives; MB
//! of input a second of CPU; size against zlib 1.2.13 at its default level and zstd at level 3,
//! which are what QEMU uses):
//!
//! ```text
//! deflate  zlib       default 34 MB/s 100 %          zstd  3  234 MB/s 100.0 %
//!          zlib-rs 6           88     102.0          zstd  2  295      101.4
//!                  4          100     102.9  <-      zstd  1  302      103.7  <- no faster than 2 in use
//!                  3          110     103.7
//!                  2          132     106.6
//! ```
//!
//! Level 4 is 2.9 times as fast as QEMU's choice for 2.9 % of size; zstd takes level 2.
//!
//! zlib-rs 0.6.8 panics, at several levels, when the output buffer is too short for data that does
//! not compress. So deflate always gets a buffer of its own that holds any result
//! ([`deflate_bound`]). Whatever makes a codec panic, the panic ends here: an encoder's means
//! "store it as it is", a decoder's fails the request, and the codec's state is thrown away.
//!
//! Reading, same sample: zlib 350 MB/s, zlib-rs 560, libdeflate 730. libdeflate would save another
//! quarter but is C code, which this crate keeps to zstd alone, and it cannot stop early:
//! [`decode`] into a part of a cluster inflates only up to that part, which saves half on average.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bds_core::error::{Error, ErrorKind, Result};
use bds_io::Buf;
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::format::qcow2::layout::header::Compression;

const DEFLATE_LEVEL: u32 = 4;
/// What QEMU's decoder is set up for.
const DEFLATE_WRITE_WINDOW_BITS: u8 = 12;
/// The most that deflate has.
const DEFLATE_READ_WINDOW_BITS: u8 = 15;
const ZSTD_LEVEL: i32 = 2;
/// Largest window a zstd frame may ask for: four times the largest cluster.
const ZSTD_MAX_WINDOW_LOG: u32 = 23;

/// Inputs from this length on are worth the way to a worker thread.
pub(crate) const OFFLOAD_FROM_LEN: usize = 16 * 1024;

#[derive(Default)]
struct Encoders {
    deflate: Option<Compress>,
    zstd: Option<CCtx<'static>>,
    /// Where deflate writes: never shorter than the longest result.
    deflated: Vec<u8>,
}

#[derive(Default)]
struct Decoders {
    deflate: Option<Decompress>,
    zstd: Option<DCtx<'static>>,
}

thread_local! {
    static ENCODERS: RefCell<Encoders> = const { RefCell::new(Encoders { deflate: None, zstd: None, deflated: Vec::new() }) };
    static DECODERS: RefCell<Decoders> = const { RefCell::new(Decoders { deflate: None, zstd: None }) };
}

/// Fills `out` from the start of a compressed cluster. `out` may be shorter than the cluster: the
/// rest is not decoded.
///
/// Fails with `Corrupt` if the input ends or breaks before `out` is full.
pub(crate) fn decode(kind: Compression, input: &[u8], out: &mut [u8]) -> Result<()> {
    let wanted = out.len();
    let decoded = DECODERS.with_borrow_mut(|decoders| {
        contain(decoders, |decoders| match kind {
            Compression::Deflate => inflate(&mut decoders.deflate, input, out),
            Compression::Zstd => unzstd(&mut decoders.zstd, input, out),
        })
    });
    decoded.unwrap_or_else(|| Err(corrupt("the decoder broke down over it", 0, wanted)))
}

/// Compresses a cluster into `out`, which must be one byte shorter than `cluster` (longer is not
/// used).
///
/// `None`: it does not get smaller, store it as it is.
pub(crate) fn encode(kind: Compression, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
    let limit = cluster.len().checked_sub(1)?.min(out.len());
    let out = &mut out[..limit];
    let encoded = ENCODERS.with_borrow_mut(|encoders| {
        contain(encoders, |encoders| match kind {
            Compression::Deflate => {
                if looks_random(cluster) && zstd(&mut encoders.zstd, cluster, out).is_none() {
                    return None;
                }
                deflate(encoders, cluster, out)
            }
            Compression::Zstd => zstd(&mut encoders.zstd, cluster, out),
        })
    });
    encoded.flatten()
}

/// Runs `work` on the codecs. If it panics: `None`, and the codecs, which may be in any state, are
/// replaced by new ones.
fn contain<C: Default, T>(codecs: &mut C, work: impl FnOnce(&mut C) -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(|| work(codecs))) {
        Ok(result) => Some(result),
        Err(_) => {
            // The panic hook has printed what it was.
            tracing::error!("qcow2: a codec panicked; its state is thrown away");
            *codecs = C::default();
            None
        }
    }
}

/// [`decode`] on a worker thread if the input is long. Gives `out` back, filled; both buffers must
/// have no other holder.
pub(crate) async fn decode_buf(kind: Compression, input: Buf, out: Buf) -> Result<Buf> {
    let is_long = out.len() >= OFFLOAD_FROM_LEN;
    let work = move || {
        let (mut input, mut out) = (input, out);
        let (Some(from), Some(to)) = (input.get_mut(), out.get_mut()) else { return Err(shared()) };
        decode(kind, from, to)?;
        Ok(out)
    };
    if is_long { bds_io::spawn_cpu(work).await } else { work() }
}

/// [`encode`] on a worker thread if the cluster is long. Gives back both buffers and the length in
/// `out`; both buffers must have no other holder.
pub(crate) async fn encode_buf(
    kind: Compression,
    cluster: Buf,
    out: Buf,
) -> Result<(Buf, Buf, Option<usize>)> {
    let is_long = cluster.len() >= OFFLOAD_FROM_LEN;
    let work = move || {
        let (mut cluster, mut out) = (cluster, out);
        let (Some(from), Some(to)) = (cluster.get_mut(), out.get_mut()) else {
            return Err(shared());
        };
        let len = encode(kind, from, to);
        Ok((cluster, out, len))
    };
    if is_long { bds_io::spawn_cpu(work).await } else { work() }
}

fn shared() -> Error {
    Error::new(ErrorKind::InUse, "a codec's buffer has another holder")
}

fn corrupt(what: &str, filled: u64, wanted: usize) -> Error {
    Error::new(ErrorKind::Corrupt, format!("compressed cluster is damaged: {what}"))
        .field("decoded bytes", format!("{filled} of {wanted}"))
}

fn inflate(slot: &mut Option<Decompress>, input: &[u8], out: &mut [u8]) -> Result<()> {
    let wanted = out.len();
    let codec = slot
        .get_or_insert_with(|| Decompress::new_with_window_bits(false, DEFLATE_READ_WINDOW_BITS));
    codec.reset(false);
    // With all input and all output space present, one step goes as far as any number of steps.
    let result = codec.decompress(input, out, FlushDecompress::Finish);
    let filled = codec.total_out();
    if usize::try_from(filled) == Ok(wanted) && result.is_ok() {
        return Ok(());
    }
    let what = match result {
        Err(error) => return Err(corrupt("not deflate", filled, wanted).caused_by(error)),
        Ok(Status::StreamEnd) => "its deflate stream is too short",
        Ok(_) => "its deflate stream is cut off",
    };
    Err(corrupt(what, filled, wanted))
}

fn unzstd(slot: &mut Option<DCtx<'static>>, input: &[u8], out: &mut [u8]) -> Result<()> {
    let wanted = out.len();
    let codec = match slot {
        Some(codec) => codec,
        None => slot.insert(new_decoder()?),
    };
    let failed = |code, filled: usize| {
        let filled = u64::try_from(filled).unwrap_or(u64::MAX);
        corrupt("not zstd", filled, wanted).caused_by(zstd::zstd_safe::get_error_name(code))
    };
    codec.reset(ResetDirective::SessionOnly).map_err(|code| failed(code, 0))?;
    let mut from = InBuffer::around(input);
    let mut to = OutBuffer::around(out);
    while to.pos() < wanted {
        let before = (from.pos(), to.pos());
        codec.decompress_stream(&mut to, &mut from).map_err(|code| failed(code, to.pos()))?;
        if (from.pos(), to.pos()) == before {
            let filled = u64::try_from(to.pos()).unwrap_or(u64::MAX);
            return Err(corrupt("its zstd frames are cut off", filled, wanted));
        }
    }
    Ok(())
}

fn new_decoder() -> Result<DCtx<'static>> {
    let no_memory = || Error::new(ErrorKind::NoMemory, "no memory for a zstd decoder");
    let mut codec = DCtx::try_create().ok_or_else(no_memory)?;
    codec
        .set_parameter(DParameter::WindowLogMax(ZSTD_MAX_WINDOW_LOG))
        .map_err(|code| no_memory().caused_by(zstd::zstd_safe::get_error_name(code)))?;
    Ok(codec)
}

/// The most bytes that deflate makes of `len` bytes: zlib's own conservative bound for any window
/// and memory level, and space for the empty block that a flush may add.
fn deflate_bound(len: usize) -> usize {
    len + len.div_ceil(8) + len.div_ceil(64) + 64
}

fn deflate(encoders: &mut Encoders, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
    let Encoders { deflate, deflated, .. } = encoders;
    let bound = deflate_bound(cluster.len());
    if deflated.len() < bound {
        deflated.resize(bound, 0);
    }
    let codec = deflate.get_or_insert_with(|| {
        let level = flate2::Compression::new(DEFLATE_LEVEL);
        Compress::new_with_window_bits(level, false, DEFLATE_WRITE_WINDOW_BITS)
    });
    codec.reset();
    let Ok(Status::StreamEnd) = codec.compress(cluster, deflated, FlushCompress::Finish) else {
        return None;
    };
    let len = usize::try_from(codec.total_out()).ok()?;
    out.get_mut(..len)?.copy_from_slice(deflated.get(..len)?);
    Some(len)
}

/// Any failure, also for want of memory, means: store it as it is, which is always right.
fn zstd(slot: &mut Option<CCtx<'static>>, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
    let codec = match slot {
        Some(codec) => codec,
        None => {
            let mut codec = CCtx::try_create()?;
            codec.set_parameter(CParameter::CompressionLevel(ZSTD_LEVEL)).ok()?;
            slot.insert(codec)
        }
    };
    codec.reset(ResetDirective::SessionOnly).ok()?;
    codec.compress2(out, cluster).ok()
}

/// Is a sample of the bytes spread as evenly as chance would? Then it may be compressed or
/// encrypted already, and zstd, which gives up on such data forty times as fast as deflate, is
/// tried first.
fn looks_random(cluster: &[u8]) -> bool {
    const PIECES: usize = 16;
    const PIECE_LEN: usize = 256;
    let stride = cluster.len() / PIECES;
    if stride < PIECE_LEN {
        return false; // too small for the sample to tell, and for the answer to matter
    }
    let mut counts = [0u32; 256];
    for piece in cluster.chunks_exact(stride).take(PIECES) {
        for byte in &piece[..PIECE_LEN] {
            counts[usize::from(*byte)] += 1;
        }
    }
    // Chance gives n + n(n-1)/256 = 69,616 on average for n = 4096, with a deviation of about 360.
    let squares: u32 = counts.iter().map(|c| c * c).sum();
    squares < 73_000
}

#[cfg(test)]
#[path = "tests/compress.rs"]
mod tests;

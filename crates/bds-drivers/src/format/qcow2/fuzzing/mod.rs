//! Entry points for fuzzers, and for tests with bytes as images. Not part of the library's stable
//! API.
//!
//! Each entry point takes any bytes and panics if a guarantee is broken; it never waits and does no
//! real I/O. The fuzz targets, the replay of their corpus and the hostile-image tests all call
//! these.

mod bitmap_log;
mod bitmaps;
mod port;
mod spec;

use bds_core::driver::{
    Attempt, BoxFuture, Child, ChildOpener, ChildRequest, CreateContext, Driver, DriverType,
    OpenContext, OpenFlags, Precision, ReadFlags, StatusFlags, WriteFlags, ZeroFlags,
};
use bds_core::error::{ErrorKind, Result};
use bds_core::options::Options;
use bds_io::Buf;
use futures_util::FutureExt;

use super::layout::cluster0::{Cluster0, Parsed, Strictness};
use super::layout::entry::{EntryRules, L2Entry};
use super::layout::extension::be64;
use super::layout::header::Compression;
pub use super::layout::space::{DataOffset, MetaOffset};
use super::layout::units::{Geometry, GuestOffset};
pub use super::nodes::{DataNode, MetaNode};
pub use bitmap_log::bitmap_log;
pub use bitmaps::bitmaps;
pub use port::{MemPort, PortEvent};

/// Creates an image in `file`, as `create` does with these options.
pub fn create(options: Options, file: &MemPort, data_file: Option<&MemPort>) -> Result<()> {
    let mut options = options;
    let context = CreateContext {
        file: file.child("file"),
        data_file: data_file.map(|d| d.child("data-file")),
        backing_len: None,
        options: &mut options,
    };
    super::manage::create::create(context).now_or_never().expect("memory never waits")?;
    options.finish("qcow2")
}

/// Facts about the image in `file`, as `info` gives them.
pub fn info(file: &MemPort) -> Result<bds_core::driver::ImageInfo> {
    let work = async {
        let image = super::file_read::read_cluster0(file, Strictness::Inspect).await?;
        super::manage::info::info(file, &image).await
    };
    work.now_or_never().expect("memory never waits")
}

/// Header and extensions: what is parsed can be written, and is the same when parsed again.
pub fn header(data: &[u8]) {
    for (mode, file_len) in [
        (Strictness::Use, data.len() as u64),
        (Strictness::Inspect, data.len() as u64),
        (Strictness::Use, u64::MAX),
    ] {
        let image = match Cluster0::parse(data, file_len, mode) {
            Ok(Parsed::Complete(image)) => image,
            Ok(Parsed::NeedMore(len)) => {
                assert!(len > data.len(), "needs {len} bytes and has {}", data.len());
                continue;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                continue;
            }
        };
        let bytes = match image.encode() {
            Ok(bytes) => bytes,
            Err(error) => {
                // The list may have used the place of the end mark, which a rewrite needs.
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                continue;
            }
        };
        match Cluster0::parse(&bytes, file_len.max(bytes.len() as u64), mode) {
            Ok(Parsed::Complete(again)) => assert_eq!(again, image),
            other => panic!("own bytes are not understood: {other:?}"),
        }
        let _ = image.check_writable(file_len);
    }
}

/// L2 entries against a plain reading of the specification. The first byte chooses the geometry.
pub fn l2(data: &[u8]) {
    let [shape, rest @ ..] = data else { return };
    let extended = shape & 1 != 0;
    let bits = 9 + u32::from(shape >> 3) % 13;
    let Some(geometry) = Geometry::new(bits, extended, 4) else { return };
    let rules =
        EntryRules { geometry, has_zero_flag: shape & 2 != 0, has_data_file: shape & 4 != 0 };
    for pair in rest.chunks_exact(16) {
        let bitmap = if extended { be64(pair, 8) } else { 0 };
        spec::compare(L2Entry { word: be64(pair, 0), bitmap }, &rules);
        let guest = GuestOffset(be64(pair, 8));
        let start = geometry.guest_offset(geometry.l1_index(guest), geometry.l2_index(guest));
        assert_eq!(start.0, geometry.cluster_floor(guest.0));
    }
}

/// Decoders: the output bound holds and an error is only an error. Encoders: what they accept
/// round-trips.
pub fn decompress(data: &[u8]) {
    let [choice, rest @ ..] = data else { return };
    let kind = if choice & 1 == 0 { Compression::Deflate } else { Compression::Zstd };
    let len = 1usize << (9 + (choice >> 1) % 8);
    let mut out = vec![0; len];
    let _ = super::io::compress::decode(kind, rest, &mut out);
    let mut cluster = rest[..rest.len().min(len)].to_vec();
    cluster.resize(len, *choice);
    let mut packed = vec![0; len - 1];
    if let Some(n) = super::io::compress::encode(kind, &cluster, &mut packed) {
        super::io::compress::decode(kind, &packed[..n], &mut out).expect("own bytes");
        assert!(out == cluster, "own bytes come back changed");
    }
}

/// Check and info on an image: they end, change nothing, and say the same twice.
pub fn check(data: &[u8]) {
    let file = MemPort::new(data.to_vec());
    let run =
        || super::check_image(&file, None, &|_, _| {}).now_or_never().expect("memory never waits");
    match (run(), run()) {
        (Ok(a), Ok(b)) => assert_eq!(a, b),
        (Err(a), Err(b)) => assert_eq!(a.to_string(), b.to_string()),
        other => panic!("two checks disagree: {other:?}"),
    }
    let _ = info(&file);
    assert_eq!(file.writes(), 0);
}

/// Opens files in memory as children, whatever name an image stores.
struct MemOpener<'a> {
    file: &'a MemPort,
    data_file: Option<&'a MemPort>,
    backing: Option<&'a MemPort>,
}

impl ChildOpener for MemOpener<'_> {
    fn open_child<'b>(&'b mut self, request: ChildRequest) -> BoxFuture<'b, Result<Option<Child>>> {
        let port = match request.name {
            "file" => Some(self.file),
            "data-file" => self.data_file.filter(|_| request.reference.is_some()),
            _ => self.backing.filter(|_| request.reference.is_some()),
        };
        let child = port.map(|port| port.child(request.name));
        Box::pin(std::future::ready(Ok(child)))
    }
}

/// Opens the image in `file`; what it names is found in the other files, if they are given.
pub async fn open_image(
    file: &MemPort,
    data_file: Option<&MemPort>,
    backing: Option<&MemPort>,
    flags: OpenFlags,
) -> Result<Box<dyn Driver>> {
    let mut opener = MemOpener { file, data_file, backing };
    let fs = bds_io::Fs::default();
    let mut context = OpenContext::new("image", Options::new(), flags, &fs, &mut opener);
    super::Qcow2Format.open(&mut context).await
}

/// Open, status, read, and on a second copy write: no request waits for ever, a read-only image is
/// not changed, zeros read as zeros, and what was written is read.
pub fn open(data: &[u8]) {
    let sim = bds_io::Sim::new(1, bds_io::SimConfig::calm());
    let backing = MemPort::new(vec![0xb5; 3000]);
    let external = MemPort::new(vec![0xd6; 5000]);
    let file = MemPort::new(data.to_vec());
    sim.block_on(async {
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        if let Ok(image) = open_image(&file, Some(&external), Some(&backing), flags).await {
            look(&*image).await;
            let _ = image.info().await;
            let _ = image.close().await;
        }
    });
    assert_eq!(file.writes() + backing.writes() + external.writes(), 0, "read-only wrote");
    sim.block_on(async {
        let flags = OpenFlags::default();
        if let Ok(image) = open_image(&file, Some(&external), Some(&backing), flags).await {
            scribble(&*image, data).await;
            look(&*image).await;
            let _ = image.close().await;
        }
    });
}

/// Parts of a disk that one look reads at most.
const MAX_RUNS: usize = 200;
/// Bytes read of each part.
const MAX_READ_LEN: u64 = 16 << 10;

/// Steps through the disk by its block status and reads the beginning of each part.
async fn look(image: &dyn Driver) {
    let mut at = 0;
    for _ in 0..MAX_RUNS {
        let left = image.len().saturating_sub(at);
        let Ok(run) = image.block_status(at, left, Precision::Exact).await else { break };
        assert!(run.len <= left, "status of {at:#x} is longer than the disk");
        if run.len == 0 {
            assert_eq!(left, 0, "status of {at:#x} is empty inside the disk");
            break;
        }
        let len = usize::try_from(run.len.min(MAX_READ_LEN)).expect("16 KiB");
        let iov = Buf::zeroed(len, 4096).iov();
        iov.fill(0..len, 0x77);
        let read = image.read(at, iov.clone(), ReadFlags::empty()).await;
        if run.flags.contains(StatusFlags::ZERO) && read.is_ok() {
            assert!(iov.is_zero(0..len), "status of {at:#x} says zeros, the bytes differ");
        }
        at += run.len;
    }
}

/// Writes, zeros and discards at places the input chooses.
async fn scribble(image: &dyn Driver, data: &[u8]) {
    for (step, chunk) in data.rchunks_exact(8).take(6).enumerate() {
        let len = u64::from(chunk[0]) * 37 + 1;
        let Some(left) = image.len().checked_sub(len).filter(|left| *left > 0) else { return };
        let at = be64(chunk, 0).rotate_left(17) % left;
        let done = match step % 3 {
            0 | 1 => {
                let bytes = vec![0x5a; usize::try_from(len).expect("10 KiB")];
                let write = image.write(at, Buf::from_slice(&bytes).iov(), WriteFlags::empty());
                write.await.map(|()| Some(0x5a))
            }
            _ => {
                let zero = image.write_zeroes(at, len, ZeroFlags::MAY_UNMAP).await;
                zero.map(|attempt| (attempt == Attempt::Done).then_some(0))
            }
        };
        let Ok(Some(byte)) = done else { continue };
        let len = usize::try_from(len).expect("10 KiB");
        let iov = Buf::zeroed(len, 4096).iov();
        if image.read(at, iov.clone(), ReadFlags::empty()).await.is_ok() {
            let mut bytes = vec![0; len];
            iov.copy_to(0, &mut bytes);
            assert!(bytes.iter().all(|b| *b == byte), "what was written at {at:#x} is lost");
        }
        let _ = image.flush_to_os().await;
        let _ = image.flush_to_disk().await;
    }
}

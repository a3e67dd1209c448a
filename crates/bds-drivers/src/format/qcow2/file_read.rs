//! Reads bytes of the image file for parsers (open, check, info): single ranges, tables of words,
//! cluster 0.
//!
//! Nothing is cached between calls of [`read_bytes`]; a [`Window`] keeps the last range, so that
//! small records of a table cost one read for many.

use bds_core::driver::{ChildPort, ReadFlags};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::Buf;

use super::layout::cluster0::{Cluster0, Parsed, Strictness};

/// Tables are read in pieces of this many bytes.
const READ_LEN: u64 = 1 << 20;

/// Reads `len` bytes; past the end of the file they are zeros. The caller bounds `len`.
pub(crate) async fn read_bytes(file: &dyn ChildPort, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    if len == 0 {
        return Ok(bytes);
    }
    let iov = Buf::zeroed(len, 4096).iov();
    file.read(offset, iov.clone(), ReadFlags::empty()).await.map_err(|e| e.at(offset))?;
    iov.copy_to(0, &mut bytes);
    Ok(bytes)
}

/// Reads a table of big-endian words piece by piece.
pub(crate) async fn for_words(
    file: &dyn ChildPort,
    offset: u64,
    len: u64,
    mut visit: impl FnMut(u64, u64) -> Result<()> + Send,
) -> Result<()> {
    let mut at = 0;
    while at < len {
        let piece = READ_LEN.min(len - at);
        let piece_len = usize::try_from(piece).expect("at most 1 MiB");
        let bytes = read_bytes(file, offset + at, piece_len).await?;
        for (i, word) in bytes.as_chunks().0.iter().enumerate() {
            visit(at / 8 + i as u64, u64::from_be_bytes(*word))?;
        }
        at += piece;
    }
    Ok(())
}

/// Reads and parses cluster 0. Errors name the file.
pub(crate) async fn read_cluster0(file: &dyn ChildPort, mode: Strictness) -> Result<Cluster0> {
    let named = |e: Error| match file.filename() {
        Some(name) => e.file(name),
        None => e.node(file.node_name()),
    };
    let file_len = file.len();
    let mut len = Cluster0::FIRST_READ_LEN;
    loop {
        len = len.min(usize::try_from(file_len).unwrap_or(usize::MAX));
        let bytes = read_bytes(file, 0, len).await.map_err(named)?;
        match Cluster0::parse(&bytes, file_len, mode).map_err(named)? {
            Parsed::Complete(image) => return Ok(*image),
            Parsed::NeedMore(more) => len = more,
        }
    }
}

/// A table of records of different lengths, read in order.
pub(crate) struct Window<'a> {
    file: &'a dyn ChildPort,
    base: u64,
    bytes: Vec<u8>,
}

impl<'a> Window<'a> {
    const STEP_LEN: usize = 64 * 1024;

    pub(crate) fn new(file: &'a dyn ChildPort) -> Self {
        Self { file, base: 0, bytes: Vec::new() }
    }

    /// `len` bytes at `offset`; an error if the file ends before.
    pub(crate) async fn get(&mut self, offset: u64, len: usize) -> Result<&[u8]> {
        let held = |w: &Self| {
            let start = usize::try_from(offset.checked_sub(w.base)?).ok()?;
            let end = start.checked_add(len)?;
            (end <= w.bytes.len()).then_some(start..end)
        };
        if held(self).is_none() {
            let file_len = self.file.len();
            let left = usize::try_from(file_len.saturating_sub(offset)).unwrap_or(usize::MAX);
            if left < len {
                return Err(Error::new(
                    ErrorKind::InvalidImage,
                    format!("a table reaches past the end of the file ({file_len} bytes)"),
                )
                .at(offset));
            }
            self.bytes = read_bytes(self.file, offset, Self::STEP_LEN.max(len).min(left)).await?;
            self.base = offset;
        }
        let range = held(self).expect("just read");
        Ok(&self.bytes[range])
    }
}

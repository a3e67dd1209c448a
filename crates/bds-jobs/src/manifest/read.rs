//! Reads chunks of an image, several at once, and hashes them in order.

use bds_core::driver::{Precision, StatusFlags};
use bds_core::request::Backend;
use bds_core::{Error, Result};
use bds_io::{Buf, IoVec};
use futures_util::StreamExt;
use futures_util::stream;

use super::format::ContentHash;

/// Chunks in flight: enough to keep a disk busy, and 1 MiB at the usual chunk size.
const DEPTH: usize = 16;

/// Alignment of the buffers, so that O_DIRECT files can be read without a copy.
const BUFFER_ALIGN: usize = 4096;

/// An image, in chunks.
pub(super) struct Chunks<'a> {
    pub(super) image: &'a Backend,
    pub(super) len: u64,
    pub(super) chunk_len: u64,
}

impl Chunks<'_> {
    async fn hash(&self, index: u64) -> Result<(u64, ContentHash)> {
        let offset = index * self.chunk_len;
        let len = self.chunk_len.min(self.len - offset);
        let hash = self.hash_range(offset, len).await;
        Ok((index, hash.map_err(|error: Error| error.field("offset", offset))?))
    }

    async fn hash_range(&self, offset: u64, len: u64) -> Result<ContentHash> {
        let run = self.image.block_status(offset, len, Precision::Cheap).await?;
        if run.len >= len && run.flags.contains(StatusFlags::ZERO) {
            return Ok(ContentHash::ZERO);
        }
        let len = usize::try_from(len).expect("a chunk is at most 16 MiB");
        let buf = IoVec::from(Buf::zeroed(len, BUFFER_ALIGN));
        self.image.read(offset, buf.clone()).await?;
        // Hashing outside of the caller's executor lets one thread read and another hash.
        Ok(bds_io::spawn_cpu(move || {
            let mut bytes = vec![0; len];
            buf.copy_to(0, &mut bytes);
            ContentHash::of_chunk(&bytes)
        })
        .await)
    }
}

/// Hashes the chunks of these indices and passes each hash on, in the order given.
pub(super) async fn hash_chunks(
    chunks: &Chunks<'_>,
    indices: impl Iterator<Item = u64>,
    mut each: impl FnMut(u64, ContentHash) -> Result<()>,
) -> Result<()> {
    let mut hashes = stream::iter(indices).map(|index| chunks.hash(index)).buffered(DEPTH);
    while let Some(hashed) = hashes.next().await {
        let (index, hash) = hashed?;
        each(index, hash)?;
    }
    Ok(())
}

/// As [`hash_chunks`], for the chunks of `chunk_len` bytes of an image of `len` bytes.
pub(crate) async fn hash_chunks_of(
    image: &Backend,
    len: u64,
    chunk_len: u64,
    indices: impl Iterator<Item = u64>,
    each: impl FnMut(u64, ContentHash) -> Result<()>,
) -> Result<()> {
    hash_chunks(&Chunks { image, len, chunk_len }, indices, each).await
}

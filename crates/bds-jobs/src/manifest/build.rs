//! Builds a manifest while an image is copied, or by reading it.
//!
//! A copy passes on what it read ([`ManifestBuilder::saw`], [`ManifestBuilder::saw_zeros`]), in any
//! order and from many tasks. A chunk that one call covers whole is hashed there; chunks that were
//! only seen in parts, or not at all, are read again at the end ([`ManifestBuilder::finish`]).

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::format::{ContentHash, DEFAULT_CHUNK_BITS, Manifest, chunk_count, other_length};
use super::read::{Chunks, hash_chunks};

/// What is known of a chunk.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// No part of it was seen.
    Nothing,
    /// Parts were seen: a base's hash does not hold for it.
    Part,
    Whole(ContentHash),
}

/// Collects the hashes of an image's chunks. May be used from many threads.
#[derive(Debug)]
pub struct ManifestBuilder {
    len: u64,
    chunks: Mutex<Vec<Seen>>,
}

impl ManifestBuilder {
    /// An empty builder for an image of `len` bytes.
    ///
    /// # Errors
    /// `LimitExceeded`: the hashes of such a length do not fit into memory.
    pub fn new(len: u64) -> Result<Self> {
        let mut chunks = Vec::new();
        let count = chunk_count(len, DEFAULT_CHUNK_BITS);
        if count.is_none_or(|count| chunks.try_reserve_exact(count).is_err()) {
            let message = "the image is too long for a manifest in memory";
            return Err(Error::new(ErrorKind::LimitExceeded, message).field("length", len));
        }
        chunks.resize(count.unwrap_or(0), Seen::Nothing);
        Ok(Self { len, chunks: Mutex::new(chunks) })
    }

    /// Bytes of a chunk. Copies of whole chunks need not be read again.
    pub const CHUNK_LEN: u64 = 1 << DEFAULT_CHUNK_BITS;

    /// Notes the bytes that are at `offset`: hashes the chunks that they cover whole, and notes
    /// those that they cover in part.
    pub fn saw(&self, offset: u64, data: &IoVec) {
        let end = offset + data.len() as u64;
        let mut chunk = vec![0; usize::try_from(Self::CHUNK_LEN).expect("64 KiB")];
        self.each_chunk(offset..end, |range, is_whole| {
            is_whole.then(|| {
                let at = usize::try_from(range.start - offset).expect("inside the buffer");
                let len = usize::try_from(range.end - range.start).expect("inside the buffer");
                data.copy_to(at, &mut chunk[..len]);
                ContentHash::of_chunk(&chunk[..len])
            })
        });
    }

    /// Notes that the range reads as zeros.
    pub fn saw_zeros(&self, range: Range<u64>) {
        self.each_chunk(range, |_, is_whole| is_whole.then_some(ContentHash::ZERO));
    }

    /// Copies the hashes of `base` for all chunks not seen so far: an increment, of which only the
    /// changes are copied, describes the whole image.
    ///
    /// # Errors
    /// `InvalidInput`: `base` has another chunk size. A base of another length gives its whole
    /// chunks.
    pub fn fill_from(&self, base: &Manifest) -> Result<()> {
        if base.chunk_len() != Self::CHUNK_LEN {
            let message = "the base's manifest has another chunk size";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let shared = base.len().min(self.len);
        let whole = if base.len() == self.len { u64::MAX } else { shared / Self::CHUNK_LEN };
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, (mine, theirs)) in chunks.iter_mut().zip(base.hashes()).enumerate() {
            if matches!(mine, Seen::Nothing) && (index as u64) < whole {
                *mine = Seen::Whole(*theirs);
            }
        }
        Ok(())
    }

    /// Calls `hash` for each chunk that the range touches; `None`: a part of it was seen.
    fn each_chunk(
        &self,
        range: Range<u64>,
        mut hash: impl FnMut(Range<u64>, bool) -> Option<ContentHash>,
    ) {
        let first = range.start / Self::CHUNK_LEN;
        let last = range.end.min(self.len).div_ceil(Self::CHUNK_LEN);
        for index in first..last {
            let chunk = index * Self::CHUNK_LEN..self.len.min((index + 1) * Self::CHUNK_LEN);
            let is_whole = range.start <= chunk.start && chunk.end <= range.end;
            let value = hash(chunk, is_whole);
            let place = usize::try_from(index).expect("an index of the vector");
            let seen = value.map_or(Seen::Part, Seen::Whole);
            self.chunks.lock().unwrap_or_else(PoisonError::into_inner)[place] = seen;
        }
    }

    /// Reads the chunks that were not seen whole from `image`, which holds the same content, and
    /// makes the manifest. `parent` is the root of the manifest that this content continues.
    /// `progress` is called with (done, total) bytes, and may stop it by returning false.
    ///
    /// # Errors
    /// A read failed; `InvalidInput`: the note is too long, or the image has another length;
    /// `Cancelled`: `progress` stopped it.
    pub async fn finish(
        self,
        image: &Backend,
        parent: Option<ContentHash>,
        note: &str,
        mut progress: impl FnMut(u64, u64) -> bool,
    ) -> Result<Manifest> {
        if image.len() != self.len {
            return Err(other_length(image.len(), self.len));
        }
        let chunks = self.chunks.into_inner().unwrap_or_else(PoisonError::into_inner);
        let known = |seen: &Seen| match seen {
            Seen::Whole(hash) => Some(*hash),
            Seen::Nothing | Seen::Part => None,
        };
        let mut hashes: Vec<Option<ContentHash>> = chunks.iter().map(known).collect();
        let missing = (0..).zip(&hashes).filter(|(_, hash)| hash.is_none());
        let missing: Vec<u64> = missing.map(|(index, _)| index).collect();
        let chunks = Chunks { image, len: self.len, chunk_len: Self::CHUNK_LEN };
        hash_chunks(&chunks, missing.into_iter(), |index, hash| {
            hashes[usize::try_from(index).expect("an index of the vector")] = Some(hash);
            match progress(self.len.min((index + 1) * Self::CHUNK_LEN), self.len) {
                true => Ok(()),
                false => Err(Error::new(ErrorKind::Cancelled, "the manifest was stopped")),
            }
        })
        .await?;
        let hashes = hashes.into_iter().map(|hash| hash.expect("each was seen or read")).collect();
        Manifest::new(self.len, DEFAULT_CHUNK_BITS, hashes, parent, note.to_owned())
    }
}

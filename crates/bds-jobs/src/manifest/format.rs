//! The manifest's bytes: header, note, one hash a chunk, and the root hash that covers them.
//!
//! ```text
//!   0  magic "bdsmanif"      8      48  root: BLAKE3 of all other bytes   32
//!   8  version (1)           4      80  length of the note                 4
//!  12  chunk size, log2      4      84  reserved, 0                        4
//!  16  length in bytes       8      88  parent: root of the manifest
//!  24  reserved, 0          24          that this one continues           32
//! 120  note (UTF-8), then a hash of 32 bytes a chunk
//! ```
//! Numbers are little-endian. A hash of zeros stands for a chunk of zeros; a parent of zeros for
//! none. Parsing allocates no more than the input holds.

use std::fmt;

use bds_core::{Error, ErrorKind, Result};

/// A BLAKE3 hash. All zeros: a chunk that reads as zeros, or no parent.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentHash(pub [u8; 32]);

impl ContentHash {
    /// Stands for a chunk of zeros.
    pub const ZERO: Self = Self([0; 32]);

    /// The hash of a chunk's bytes; [`ContentHash::ZERO`] if all are zeros.
    pub fn of_chunk(bytes: &[u8]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            return Self::ZERO;
        }
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Smallest and largest size of a chunk, as log2: 4 KiB and 16 MiB.
const CHUNK_BITS: std::ops::RangeInclusive<u32> = 12..=24;
/// Chunk size of new manifests: 32 bytes of hash for 64 KiB, 0.05 %.
pub(super) const DEFAULT_CHUNK_BITS: u32 = 16;
/// Longest note, in bytes.
pub const MAX_NOTE_LEN: usize = 64 << 10;
const MAGIC: &[u8; 8] = b"bdsmanif";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 120;
const HASH_LEN: usize = 32;
const ROOT_AT: usize = 48;

/// What an image contained at one point in time: a hash for each chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    len: u64,
    chunk_bits: u32,
    parent: Option<ContentHash>,
    note: String,
    hashes: Vec<ContentHash>,
}

impl Manifest {
    pub(crate) fn new(
        len: u64,
        chunk_bits: u32,
        hashes: Vec<ContentHash>,
        parent: Option<ContentHash>,
        note: String,
    ) -> Result<Self> {
        if note.len() > MAX_NOTE_LEN {
            let message = format!("a manifest's note is at most {MAX_NOTE_LEN} bytes long");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        debug_assert_eq!(Some(hashes.len()), chunk_count(len, chunk_bits));
        Ok(Self { len, chunk_bits, parent, note, hashes })
    }

    /// Length of the image in bytes.
    #[expect(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of a chunk; the last one may be shorter.
    pub fn chunk_len(&self) -> u64 {
        1 << self.chunk_bits
    }

    /// The hash of each chunk.
    pub fn hashes(&self) -> &[ContentHash] {
        &self.hashes
    }

    /// The root of the manifest of the content that this one was made on: the backup before an
    /// increment, the backing chain below an overlay.
    pub fn parent(&self) -> Option<ContentHash> {
        self.parent
    }

    /// Free text of the maker.
    pub fn note(&self) -> &str {
        &self.note
    }

    /// The hash that names this manifest: it covers everything in it.
    pub fn root(&self) -> ContentHash {
        ContentHash(root_of(&self.encode(ContentHash::ZERO)))
    }

    /// The manifest as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.encode(ContentHash::ZERO);
        let root = root_of(&bytes);
        bytes[ROOT_AT..ROOT_AT + HASH_LEN].copy_from_slice(&root);
        bytes
    }

    fn encode(&self, root: ContentHash) -> Vec<u8> {
        let note_len = u32::try_from(self.note.len()).expect("checked when it was made");
        let parent = self.parent.unwrap_or(ContentHash::ZERO);
        let rest = self.note.len() + self.hashes.len() * HASH_LEN;
        let mut bytes = Vec::with_capacity(HEADER_LEN + rest);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.chunk_bits.to_le_bytes());
        bytes.extend_from_slice(&self.len.to_le_bytes());
        bytes.extend_from_slice(&[0; 24]);
        bytes.extend_from_slice(&root.0);
        bytes.extend_from_slice(&note_len.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&parent.0);
        bytes.extend_from_slice(self.note.as_bytes());
        self.hashes.iter().for_each(|hash| bytes.extend_from_slice(&hash.0));
        bytes
    }

    /// Parses a manifest.
    ///
    /// # Errors
    /// `InvalidImage`: it is none, is cut off, has another version, or was changed since it was
    /// written (the root hash does not match).
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < HEADER_LEN || &bytes[..8] != MAGIC {
            return Err(invalid("this is not a manifest"));
        }
        let version = le32(bytes, 8);
        if version != VERSION {
            let words = format!("manifest version {version} is not known, only {VERSION} is");
            return Err(Error::new(ErrorKind::NotSupported, words));
        }
        let (chunk_bits, len) = (le32(bytes, 12), le64(bytes, 16));
        let count = CHUNK_BITS.contains(&chunk_bits).then(|| chunk_count(len, chunk_bits));
        let Some(count) = count.flatten() else {
            return Err(
                invalid("the manifest's chunk size or length is out of range").field("length", len)
            );
        };
        let note_len = le32(bytes, 80) as usize;
        let expected = count.checked_mul(HASH_LEN).and_then(|l| l.checked_add(HEADER_LEN));
        let expected = expected.and_then(|l| l.checked_add(note_len));
        if note_len > MAX_NOTE_LEN || expected != Some(bytes.len()) {
            return Err(invalid("the manifest is cut off, or longer than its header says")
                .field("file_length", bytes.len()));
        }
        check_root(bytes)?;
        let (note, hashes) = bytes[HEADER_LEN..].split_at(note_len);
        let note = std::str::from_utf8(note)
            .map_err(|_| invalid("the manifest's note is not valid UTF-8"))?;
        let parent = hash_at(bytes, 88);
        Ok(Self {
            len,
            chunk_bits,
            parent: (parent != ContentHash::ZERO).then_some(parent),
            note: note.to_owned(),
            hashes: (0..count).map(|index| hash_at(hashes, index * HASH_LEN)).collect(),
        })
    }
}

impl Manifest {
    /// The bytes with the root hash that belongs to them, for fuzzers.
    pub(crate) fn with_right_root(bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        if bytes.len() >= HEADER_LEN {
            bytes[ROOT_AT..ROOT_AT + HASH_LEN].fill(0);
            let root = root_of(&bytes);
            bytes[ROOT_AT..ROOT_AT + HASH_LEN].copy_from_slice(&root);
        }
        bytes
    }
}

/// Checks that nothing was changed since the manifest was written.
fn check_root(bytes: &[u8]) -> Result<()> {
    let mut hashed = bytes.to_vec();
    hashed[ROOT_AT..ROOT_AT + HASH_LEN].fill(0);
    if root_of(&hashed) == bytes[ROOT_AT..ROOT_AT + HASH_LEN] {
        return Ok(());
    }
    Err(invalid("the manifest was damaged: its root hash does not match"))
}

fn root_of(bytes: &[u8]) -> [u8; 32] {
    blake3::derive_key("bds 2026-11-30 manifest root", bytes)
}

/// Number of chunks of an image; `None`: more than memory can count.
pub(super) fn chunk_count(len: u64, chunk_bits: u32) -> Option<usize> {
    usize::try_from(len.div_ceil(1 << chunk_bits)).ok()
}

fn hash_at(bytes: &[u8], at: usize) -> ContentHash {
    let mut hash = [0; HASH_LEN];
    hash.copy_from_slice(&bytes[at..at + HASH_LEN]);
    ContentHash(hash)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

pub(super) fn other_length(image: u64, manifest: u64) -> Error {
    let message =
        format!("the image is {image} bytes long, its manifest is of an image of {manifest} bytes");
    Error::new(ErrorKind::InvalidInput, message)
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::*;

    fn sample() -> Manifest {
        let hashes = vec![ContentHash::of_chunk(b"x"), ContentHash::ZERO];
        Manifest::new(65_537, 16, hashes, Some(ContentHash([7; 32])), "disk0".into()).unwrap()
    }

    #[test]
    fn a_manifest_comes_back_from_its_bytes() {
        let bytes = sample().to_bytes();
        let back = Manifest::parse(&bytes).unwrap();
        assert_eq!(back, sample());
        assert_eq!((back.parent(), back.note()), (Some(ContentHash([7; 32])), "disk0"));
        assert_eq!(back.root(), hash_at(&bytes, ROOT_AT));
    }

    #[test]
    fn every_changed_byte_and_every_length_is_refused() {
        let bytes = sample().to_bytes();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert!(Manifest::parse(&changed).is_err(), "byte {at}");
            assert!(Manifest::parse(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(Manifest::parse(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_length_that_would_need_much_memory_is_refused() {
        let mut bytes = sample().to_bytes();
        bytes[16..24].fill(0xff);
        let error = Manifest::parse(&bytes).unwrap_err();
        assert!(error.to_string().contains("longer than its header says"), "{error}");
    }

    #[test]
    fn zeros_have_a_hash_of_their_own() {
        assert_eq!(ContentHash::of_chunk(&[0; 4096]), ContentHash::ZERO);
        assert_ne!(ContentHash::of_chunk(&[1; 4096]), ContentHash::ZERO);
    }

    proptest! {
        #[test]
        fn any_input_is_parsed_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Manifest::parse(&bytes);
            let mut with_magic = MAGIC.to_vec();
            with_magic.extend_from_slice(&VERSION.to_le_bytes());
            with_magic.extend_from_slice(&bytes);
            let _ = Manifest::parse(&with_magic);
        }
    }
}

//! Serialises a bitmap: bit n of the stream, counted from the lowest bit of the first byte, is
//! granule n. qcow2 stores bitmaps so (qcow2.txt, "Bitmap data"), and QEMU migrates them so. Bits
//! behind the last granule are zero.

use std::ops::Range;

use super::hbitmap::HBitmap;

/// What a part of the stream holds; qcow2 has short forms for two of these.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamState {
    /// No granule of it is dirty.
    Clean,
    /// Each granule of it is dirty, and there is at least one.
    Dirty,
    /// Some are, some are not.
    Mixed,
}

impl HBitmap {
    /// Bytes of the stream.
    pub fn stream_len(&self) -> u64 {
        self.granules().div_ceil(8)
    }

    /// What `len` bytes of the stream from byte `at` on hold. Bytes behind the end count as clean,
    /// and do not count beside others.
    pub fn stream_state(&self, at: u64, len: u64) -> StreamState {
        let granules = self.stream_granules(at, len);
        let total = granules.end - granules.start;
        let mut dirty = 0;
        self.each_word(granules, |page, word, mask| {
            dirty += u64::from((page.word(word) & mask).count_ones());
        });
        match dirty {
            0 => StreamState::Clean,
            _ if dirty == total => StreamState::Dirty,
            _ => StreamState::Mixed,
        }
    }

    /// Reads the stream from byte `at` on. Bytes behind the end are zero.
    pub fn read_stream(&self, at: u64, out: &mut [u8]) {
        out.fill(0);
        let granules = self.stream_granules(at, out.len() as u64);
        let mut granule = granules.start;
        while granule < granules.end {
            let end = (granule - granule % 64 + 64).min(granules.end);
            let mut bits = 0;
            self.each_word(granule..end, |page, word, mask| bits = page.word(word) & mask);
            let bytes = (bits >> (granule % 64)).to_le_bytes();
            let place = usize_of(granule / 8 - at);
            let count = usize_of((end - granule).div_ceil(8));
            out[place..place + count].copy_from_slice(&bytes[..count]);
            granule = end;
        }
    }

    /// Marks what is dirty in the stream from byte `at` on. Granules are never cleaned. Bits behind
    /// the last granule are ignored.
    pub fn merge_stream(&self, at: u64, bytes: &[u8]) {
        let granules = self.stream_granules(at, bytes.len() as u64);
        let bits = (granules.start..granules.end)
            .filter(|granule| bytes[usize_of(granule / 8 - at)] >> (granule % 8) & 1 != 0);
        // Runs of granules, so that a full cluster is a few words and not a bit each.
        let mut run: Option<Range<u64>> = None;
        for granule in bits {
            run = match run {
                Some(run) if run.end == granule => Some(run.start..granule + 1),
                other => {
                    other.into_iter().for_each(|run| self.set_granules(run));
                    Some(granule..granule + 1)
                }
            };
        }
        run.into_iter().for_each(|run| self.set_granules(run));
    }

    /// The granules of `len` bytes of the stream from byte `at` on.
    fn stream_granules(&self, at: u64, len: u64) -> Range<u64> {
        let granule = |byte: u64| byte.saturating_mul(8).min(self.granules());
        granule(at)..granule(at.saturating_add(len))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a place in a slice of the caller")]
fn usize_of(number: u64) -> usize {
    number as usize
}

//! Stamped blocks: what a disk under concurrent writes may hold, now, at an earlier moment, or
//! after a crash.
//!
//! Every write fills one block of [`BLOCK`] bytes with stamps (writer, number of the write, place,
//! checksum), so that each sector shows which write it is from. [`StampedDisk`] keeps for each
//! block all writes with the logical times at which they began and ended. A value is legal in a
//! window of time unless a later write had replaced it before the window. The same rule serves
//! reads under load, copies of one moment, and crashes, whose window begins with the last flush.
//!
//! Nothing here does I/O: tests send the bytes where they want.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::workload::SECTOR;

/// Length of a stamp: four words.
const LINE: usize = 32;
/// Length of a block in bytes.
pub const BLOCK: u64 = 4096;

/// A logical time: a count of beginnings and ends.
pub type Tick = u64;

/// A write that has begun.
#[derive(Clone, Debug)]
#[must_use = "report its end"]
pub struct StampedWrite {
    /// Offset in bytes.
    pub offset: u64,
    /// The bytes to write: [`BLOCK`] of them, or zeros.
    pub bytes: Vec<u8>,
    block: usize,
    index: usize,
}

#[derive(Clone, Copy, Debug)]
struct Write {
    /// 0: zeros.
    stamp: u64,
    begun: Tick,
    /// `Tick::MAX`: not yet, or it failed and may land at any time.
    ended: Tick,
}

#[derive(Debug)]
struct State {
    now: Tick,
    last_stamp: u64,
    /// Beginning of the last flush that succeeded.
    durable: Tick,
    blocks: Vec<Vec<Write>>,
}

/// What was written to a disk of blocks that were zeros at first.
#[derive(Debug)]
pub struct StampedDisk {
    writer: u64,
    state: Mutex<State>,
}

impl StampedDisk {
    /// A disk of `len` bytes (whole blocks) that reads as zeros. `writer` tells disks apart.
    pub fn new(writer: u64, len: u64) -> Self {
        let zeros = Write { stamp: 0, begun: 0, ended: 0 };
        let count = usize::try_from(len / BLOCK).expect("a test's disk fits into memory");
        let blocks = vec![vec![zeros]; count];
        Self { writer, state: Mutex::new(State { now: 0, last_stamp: 0, durable: 0, blocks }) }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.lock().blocks.len() as u64
    }

    /// The time now.
    pub fn now(&self) -> Tick {
        self.lock().now
    }

    /// Writes begun so far.
    pub fn writes(&self) -> u64 {
        self.lock().last_stamp
    }

    /// Begins a write of a block.
    pub fn begin_write(&self, block: u64) -> StampedWrite {
        let mut state = self.lock();
        state.last_stamp += 1;
        let stamp = state.last_stamp;
        let (block, index) = state.begin(block, stamp);
        let offset = block as u64 * BLOCK;
        let sectors = (0..BLOCK / SECTOR).map(|n| self.sector(stamp, offset + n * SECTOR));
        let bytes = sectors.collect::<Vec<_>>().concat();
        StampedWrite { offset, bytes, block, index }
    }

    /// Begins a zero write of a block, or a discard that reads as zeros.
    pub fn begin_zero(&self, block: u64) -> StampedWrite {
        let (block, index) = self.lock().begin(block, 0);
        let len = usize::try_from(BLOCK).expect("small");
        StampedWrite { offset: block as u64 * BLOCK, bytes: vec![0; len], block, index }
    }

    /// Ends a write. One that failed may have landed, or may land later.
    pub fn end_write(&self, write: &StampedWrite, is_ok: bool) {
        let mut state = self.lock();
        state.now += 1;
        if is_ok {
            let now = state.now;
            state.blocks[write.block][write.index].ended = now;
        }
    }

    /// Begins a flush.
    pub fn begin_flush(&self) -> Tick {
        let mut state = self.lock();
        state.now += 1;
        state.now
    }

    /// Ends a flush that succeeded: writes that ended before it began are durable.
    pub fn end_flush(&self, begun: Tick) {
        let mut state = self.lock();
        state.durable = state.durable.max(begun);
    }

    /// Beginning of the last flush that succeeded: a window from here to the crash is what a crash
    /// may leave.
    pub fn durable(&self) -> Tick {
        self.lock().durable
    }

    /// Checks that a block may read so in some moment from `from` to `to`.
    ///
    /// # Errors
    /// Says what was found instead, in words.
    pub fn check(&self, block: u64, bytes: &[u8], from: Tick, to: Tick) -> Result<(), String> {
        let state = self.lock();
        let index = usize::try_from(block).expect("a block of this disk");
        let writes = &state.blocks[index];
        let legal: Vec<u64> = legal(writes, from, to).map(|write| write.stamp).collect();
        let stamps = &legal;
        let sectors = bytes.chunks(usize::try_from(SECTOR).expect("small"));
        for (number, sector) in sectors.enumerate() {
            let offset = block * BLOCK + number as u64 * SECTOR;
            let legal: Vec<Vec<u8>> =
                legal.iter().map(|stamp| self.value(*stamp, offset)).collect();
            if legal.iter().any(|value| value == sector) {
                continue;
            }
            // A read beside a write may see it torn anywhere.
            let is_legal = |(place, byte): (usize, &u8)| {
                legal.iter().any(|value| value.get(place) == Some(byte))
            };
            if !sector.iter().enumerate().all(is_legal) {
                let found: Vec<String> = sector.chunks(LINE).map(describe).collect();
                return Err(format!(
                    "block {block}, sector {number} of writer {}: has {found:?}, legal from tick \
                     {from} to {to} are {stamps:?}; its writes {writes:?}",
                    self.writer
                ));
            }
        }
        Ok(())
    }

    /// The sector of a write; 0: zeros.
    fn value(&self, stamp: u64, offset: u64) -> Vec<u8> {
        match stamp {
            0 => vec![0; usize::try_from(SECTOR).expect("small")],
            _ => self.sector(stamp, offset),
        }
    }

    fn sector(&self, stamp: u64, offset: u64) -> Vec<u8> {
        let check = (stamp ^ offset.rotate_left(17) ^ self.writer.rotate_left(41))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let line = [self.writer, stamp, offset, check].map(u64::to_le_bytes).concat();
        line.repeat(usize::try_from(SECTOR).expect("small") / LINE)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin(&mut self, block: u64, stamp: u64) -> (usize, usize) {
        self.now += 1;
        let block = usize::try_from(block).expect("a block of this disk");
        let writes = &mut self.blocks[block];
        writes.push(Write { stamp, begun: self.now, ended: Tick::MAX });
        (block, writes.len() - 1)
    }
}

/// A line of a sector in words.
fn describe(line: &[u8]) -> String {
    let words: Vec<u64> =
        line.chunks(8).filter_map(|bytes| bytes.try_into().ok().map(u64::from_le_bytes)).collect();
    match words[..] {
        [0, 0, 0, 0] => "zeros".to_owned(),
        [writer, stamp, offset, _] => format!("{writer}.{stamp} at {offset:#x}"),
        _ => format!("{words:?}"),
    }
}

/// Writes that may be what the block holds in some moment of the window: those that had begun by
/// its end, but for those that another had replaced before its beginning.
fn legal(writes: &[Write], from: Tick, to: Tick) -> impl Iterator<Item = &Write> {
    // Of the writes that had ended before the window, the one that began last replaced all that had
    // ended before it began.
    let over = writes.iter().filter(|write| write.ended <= from);
    let replaced_until = over.map(|write| write.begun).max().unwrap_or(0);
    writes.iter().filter(move |value| value.begun <= to && value.ended >= replaced_until)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_legal(disk: &StampedDisk, bytes: &[u8], from: Tick, to: Tick) -> bool {
        disk.check(0, bytes, from, to).is_ok()
    }

    #[test]
    fn a_value_is_legal_until_it_is_replaced() {
        let disk = StampedDisk::new(7, 2 * BLOCK);
        let zeros = vec![0; 4096];
        let first = disk.begin_write(0);
        let during = disk.now();
        assert!(is_legal(&disk, &zeros, during, during) && is_legal(&disk, &first.bytes, 1, 1));
        disk.end_write(&first, true);
        let after = disk.now();
        assert!(!is_legal(&disk, &zeros, after, after), "it was replaced");
        assert!(is_legal(&disk, &first.bytes, after, after));
        assert!(is_legal(&disk, &zeros, during, after), "at the beginning of the window");
        let second = disk.begin_write(0);
        assert!(!is_legal(&disk, &second.bytes, after, after), "it comes later");
        disk.end_write(&second, false);
        let now = disk.now();
        assert!(
            is_legal(&disk, &first.bytes, now, now) && is_legal(&disk, &second.bytes, now, now)
        );
    }

    #[test]
    fn concurrent_writes_may_end_either_way_sector_by_sector() {
        let disk = StampedDisk::new(7, BLOCK);
        let (one, two) = (disk.begin_write(0), disk.begin_write(0));
        disk.end_write(&one, true);
        disk.end_write(&two, true);
        let mut mixed = one.bytes.clone();
        mixed[512..1024].copy_from_slice(&two.bytes[512..1024]);
        assert!(is_legal(&disk, &mixed, disk.now(), disk.now()));
        mixed[512..1024].copy_from_slice(&two.bytes[..512]);
        let error = disk.check(0, &mixed, disk.now(), disk.now()).unwrap_err();
        assert!(error.contains("block 0, sector 1"), "a sector in the wrong place: {error}");
        mixed[512..1024].copy_from_slice(&one.bytes[512..1024]);
        mixed[512..700].copy_from_slice(&two.bytes[512..700]);
        assert!(is_legal(&disk, &mixed, disk.now(), disk.now()), "torn inside a sector");
    }

    #[test]
    fn a_crash_may_lose_what_was_not_flushed() {
        let disk = StampedDisk::new(7, BLOCK);
        let first = disk.begin_write(0);
        disk.end_write(&first, true);
        let flush = disk.begin_flush();
        let second = disk.begin_zero(0);
        disk.end_write(&second, true);
        let late = is_legal(&disk, &[0; 4096], disk.durable(), disk.now());
        assert!(late && is_legal(&disk, &first.bytes, disk.durable(), disk.now()));
        disk.end_flush(flush);
        assert!(is_legal(&disk, &first.bytes, disk.durable(), disk.now()));
        let flush = disk.begin_flush();
        disk.end_flush(flush);
        assert!(!is_legal(&disk, &first.bytes, disk.durable(), disk.now()));
    }
}

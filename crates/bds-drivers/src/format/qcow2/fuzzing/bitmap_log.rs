//! Entry point for fuzzers of the write-intent log of bitmaps.

use std::path::Path;

use bds_core::bitmap::intent_log::page::{Header, PAGE_LEN, checksum, reseal};
use bds_core::bitmap::intent_log::{EndState, Facts, Found, IntentLog};
use bds_io::{File, IoVec, OpenOptions, Sim, SimConfig};

const LOG: &str = "log";

/// Reads a log file of any bytes, as they are and with the checksums that they should have, for its
/// own disk and for others; a log that can be read is continued, and read again with as much.
pub fn bitmap_log(data: &[u8]) {
    check(data);
    let mut sealed = data.to_vec();
    sealed.chunks_mut(PAGE_LEN).for_each(reseal);
    check(&sealed);
    seal_snapshots(&mut sealed);
    check(&sealed);
}

/// Gives each header the checksum of the snapshot that it names.
fn seal_snapshots(bytes: &mut [u8]) {
    for at in [0, PAGE_LEN] {
        let header = bytes.get(at..at + PAGE_LEN).and_then(Header::parse);
        let Some(header) = header else { continue };
        let range = header.snapshot_range();
        let range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let snapshot = range.and_then(|(start, end)| bytes.get(start..end));
        let Some(snapshot_checksum) = snapshot.map(checksum) else { continue };
        let page = Header { snapshot_checksum, ..header }.to_page();
        bytes[at..at + PAGE_LEN].copy_from_slice(&page);
    }
}

fn check(bytes: &[u8]) {
    let sim = Sim::new(1, SimConfig::calm());
    sim.block_on(async {
        let file = open(&sim);
        if file.write(0, IoVec::from(bytes.to_vec()), false).await.is_err() {
            return;
        }
        let Ok(Some(found)) = Found::read(&file).await else { return };
        let own = found.header.disk_len;
        for len in [own, 0, own / 2 + 512, own.saturating_mul(3).min(1 << 40)] {
            for is_foreign in [false, true] {
                let Ok(bitmaps) = found.bitmaps(len, is_foreign) else { continue };
                assert!(bitmaps.iter().all(|bitmap| bitmap.bits.len() == len));
            }
        }
        let _ = go_on(file, found, own).await;
    });
}

/// Starts the log with what was found.
async fn go_on(file: File, found: Found, len: u64) -> bds_core::Result<()> {
    // Hostile places would only make a large file.
    if found.header.log_range().end.max(found.header.snapshot_range().end) > 1 << 24 {
        return Ok(());
    }
    let bitmaps = found.bitmaps(len, false)?;
    let log = IntentLog::new(found.header.shape);
    let facts = Facts { disk_len: len, ..Facts::default() };
    let snapshots: Vec<_> = bitmaps
        .into_iter()
        .map(|it| bds_core::bitmap::intent_log::Snapshot {
            name: it.name,
            is_enabled: it.is_enabled,
            bits: it.bits.into(),
        })
        .collect();
    log.protect(true);
    log.start(file.clone(), Some(found), facts, &snapshots).await?;
    log.log(0..1).await?;
    let again = Found::read(&file).await?.expect("it was started");
    assert_eq!(again.header.end_state, EndState::Open);
    for (one, other) in snapshots.iter().zip(again.bitmaps(len, false)?) {
        let is_kept = one.bits.areas(0..len).all(|area| other.bits.is_dirty(area.start));
        assert!(is_kept && (len == 0 || !one.is_enabled || other.bits.is_dirty(0)));
    }
    Ok(())
}

fn open(sim: &Sim) -> File {
    let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    sim.fs().open(Path::new(LOG), &options).expect("a simulated disk has space")
}

//! `backup list`: shows the points of a directory.

use std::fs;

use bds_core::Result;
use serde_json::json;

use crate::args::{BackupList, Output};
use crate::backup_set::{BackupSet, Point};
use crate::human_size::human_size;
use crate::printer;

pub(super) fn run(args: &BackupList) -> Result<()> {
    let set = BackupSet::open(&args.directory)?;
    if args.output == Output::Json {
        let all: Vec<_> = set.points().iter().map(|point| as_json(&set, point)).collect();
        return printer::json(&all.into());
    }
    let mut text = String::from("POINT   KIND         TIME (UTC)           STORED      CONTENT\n");
    for point in set.points() {
        let kind = kind(&set, point);
        text += &format!(
            "{:06}  {kind:<11}  {}  {:>10}  {}\n",
            point.number,
            utc(point.note.time),
            stored_len(&set, point).map_or_else(|| "missing".to_owned(), human_size),
            &point.manifest.root().to_string()[..16],
        );
    }
    printer::text(&text)
}

fn as_json(set: &BackupSet, point: &Point) -> serde_json::Value {
    json!({
        "point": point.number,
        "kind": kind(set, point),
        "time": point.note.time,
        "source": point.note.source,
        "filename": set.image(point.number).to_string_lossy(),
        "length": point.manifest.len(),
        "stored": stored_len(set, point),
        "root": point.manifest.root().to_string(),
        "parent": point.manifest.parent().map(|parent| parent.to_string()),
    })
}

fn kind(set: &BackupSet, point: &Point) -> &'static str {
    if set.is_full(point) { "full" } else { "incremental" }
}

/// Bytes of the point's image file; `None`: it is missing.
fn stored_len(set: &BackupSet, point: &Point) -> Option<u64> {
    fs::metadata(set.image(point.number)).ok().map(|facts| facts.len())
}

/// Seconds since 1970 as a date and a time.
pub(super) fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years of 400-year cycles that begin on a 1 March: leap days are at the end of a year.
    let days = days + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = cycle * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn seconds_become_dates() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (1_796_083_200, "2026-12-01 00:00:00"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(utc(seconds), expected);
        }
    }
}

//! `backup list`: shows the points of a directory.

use std::fs;

use bds_core::Result;
use serde_json::json;

use super::notes::Notes;
use crate::args::{BackupList, Output};
use crate::backup_set::{BackupSet, Point};
use crate::human_size::human_size;
use crate::printer;

/// How a point is called that a run did not complete.
pub(super) const UNFINISHED: &str = "unfinished";

/// What a run has left that did not complete.
pub(super) struct UnfinishedPoint {
    number: u32,
    /// Bytes of its image file.
    stored: u64,
    /// `None`: they cannot be read.
    notes: Option<Notes>,
}

impl UnfinishedPoint {
    /// What was left of the point that comes next.
    ///
    /// # Errors
    /// Of the notes' file.
    pub(super) fn of(set: &BackupSet) -> Result<Option<Self>> {
        let Ok(number) = set.next_number() else { return Ok(None) };
        let notes = Notes::read(set, number)?.into_notes();
        let mut paths = vec![set.partial_image(number)];
        // It may have got its name before its manifest had one.
        paths.extend(notes.is_some().then(|| set.image(number)));
        let facts = paths.iter().find_map(|path| fs::metadata(path).ok());
        Ok(facts.map(|facts| Self { number, stored: facts.len(), notes }))
    }

    fn as_json(&self, set: &BackupSet) -> serde_json::Value {
        let notes = self.notes.as_ref();
        json!({
            "point": self.number,
            "kind": UNFINISHED,
            "time": notes.map(|notes| notes.time),
            "source": notes.map(|notes| &notes.source),
            "filename": set.partial_image(self.number).to_string_lossy(),
            "stored": self.stored,
        })
    }

    fn line(&self) -> String {
        let time = self.notes.as_ref().map_or_else(|| "unknown".to_owned(), |n| utc(n.time));
        let (number, stored) = (self.number, human_size(self.stored));
        format!("{number:06}  {UNFINISHED:<11}  {time:<19}  {stored:>10}\n")
    }
}

pub(super) fn run(args: &BackupList) -> Result<()> {
    let set = BackupSet::open(&args.directory)?;
    let left = UnfinishedPoint::of(&set)?;
    if args.output == Output::Json {
        let points = set.points().iter().map(|point| as_json(&set, point));
        return printer::json(&points.chain(left.map(|left| left.as_json(&set))).collect());
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
    text.extend(left.map(|left| left.line()));
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

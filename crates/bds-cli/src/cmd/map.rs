//! `map`: lists which ranges hold data, at which depth of the chain, and at which offset.

use std::ops::Range;
use std::path::PathBuf;

use bds_core::driver::StatusFlags;
use bds_core::graph::{NodeRef, walk};
use bds_core::request::{Backend, ChainRun};
use bds_core::{Error, ErrorKind, Result};

use crate::args::{Map, Output};
use crate::image;
use crate::image_spec::Spec;
use crate::printer;

/// Text that is collected before it is printed, in bytes.
const PRINT_LEN: usize = 64 << 10;

/// Adjacent runs with the same facts are one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    start: u64,
    len: u64,
    depth: usize,
    is_present: bool,
    is_zero: bool,
    is_data: bool,
    is_compressed: bool,
    offset: Option<u64>,
    file: Option<PathBuf>,
}

impl Entry {
    fn new(start: u64, run: ChainRun) -> Self {
        let has = |flag| run.flags.contains(flag);
        let (offset, file) = match run.host {
            Some(host) => (Some(host.offset), host.file),
            None => (None, None),
        };
        Self {
            start,
            len: run.len,
            depth: run.depth,
            is_present: has(StatusFlags::ALLOCATED),
            is_zero: has(StatusFlags::ZERO),
            is_data: has(StatusFlags::DATA),
            is_compressed: has(StatusFlags::COMPRESSED),
            offset,
            file,
        }
    }

    /// Zeros behind the end of a short backing file belong to no layer. As in qemu-img they are
    /// shown at the layer above it, as not present, with the place that layer may have for them.
    /// `None`: these bytes are not of that kind.
    async fn behind_end(layers: &[NodeRef], start: u64, run: &ChainRun) -> Result<Option<Self>> {
        let mut below = layers.iter().skip(1).take(run.depth);
        let Some(depth) = below.position(|below| below.len() <= start) else { return Ok(None) };
        let layer = &layers[depth];
        let own = image::backend(layer, false)?.layer_status(start, run.len, true).await?;
        let place = own.map.filter(|_| own.flags.contains(StatusFlags::OFFSET_VALID));
        let file = place.and_then(|place| walk::child(layer, place.child));
        Ok(Some(Self {
            start,
            len: own.len.min(run.len),
            depth,
            is_present: false,
            is_zero: true,
            is_data: false,
            is_compressed: false,
            offset: place.map(|place| place.offset),
            file: file.and_then(|(file, _)| walk::filename(&file)),
        }))
    }

    /// Extends this entry by `next` if that continues it.
    fn merge(&mut self, next: &Self) -> bool {
        let continued = Self {
            start: next.start,
            len: next.len,
            offset: self.offset.and_then(|offset| offset.checked_add(self.len)),
            ..self.clone()
        };
        let is_same = *next == continued;
        if is_same {
            self.len += next.len;
        }
        is_same
    }
}

pub(crate) fn run(args: &Map) -> Result<()> {
    let spec = Spec::read(&args.filename, &args.source)?;
    let start = args.start_offset.as_deref().map_or(Ok(0), |s| super::size("start offset", s))?;
    let limit = args.max_length.as_deref().map(|s| super::size("max length", s)).transpose()?;
    image::block_on(async {
        let graph = image::trusting_graph();
        let node = image::open(&graph, &spec).await?;
        let backend = image::backend(&node, false)?;
        let end = match limit {
            Some(limit) => start.saturating_add(limit).min(backend.len()),
            None => backend.len(),
        };
        let mut out = Listing::new(args.output);
        let listed = list(&backend, &walk::backing_chain(&node), start..end, &mut out).await;
        // Entries found before a failure are printed too.
        out.print()?;
        listed?;
        image::close(backend, node).await
    })
}

async fn list(
    backend: &Backend,
    layers: &[NodeRef],
    range: Range<u64>,
    out: &mut Listing,
) -> Result<()> {
    let mut current: Option<Entry> = None;
    let mut at = range.start;
    while at < range.end && !printer::is_reader_gone() {
        let run = backend.block_status(at, range.end - at, true).await?;
        if run.len == 0 {
            break;
        }
        let next = match Entry::behind_end(layers, at, &run).await? {
            Some(entry) => entry,
            None => Entry::new(at, run),
        };
        at += next.len;
        if current.as_mut().is_some_and(|entry| entry.merge(&next)) {
            continue;
        }
        if let Some(entry) = current.replace(next) {
            out.entry(&entry)?;
        }
    }
    if let Some(entry) = current {
        out.entry(&entry)?;
    }
    out.end();
    Ok(())
}

/// Collects lines, so that a long map takes few writes.
struct Listing {
    text: String,
    format: Output,
    is_first: bool,
}

impl Listing {
    fn new(format: Output) -> Self {
        Self { text: String::new(), format, is_first: true }
    }

    fn entry(&mut self, entry: &Entry) -> Result<()> {
        match self.format {
            Output::Human => self.human(entry)?,
            Output::Json => self.json(entry),
        }
        if self.text.len() >= PRINT_LEN { self.print() } else { Ok(()) }
    }

    fn header(&mut self) {
        if std::mem::take(&mut self.is_first) {
            self.text += &row("Offset", "Length", "Mapped to", "File");
        }
    }

    fn human(&mut self, entry: &Entry) -> Result<()> {
        self.header();
        if !entry.is_data || entry.is_zero {
            return Ok(());
        }
        let Some(offset) = entry.offset else {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "File contains external, encrypted or compressed clusters.",
            )
            .at(entry.start));
        };
        let file = entry.file.as_deref().map(|f| f.display().to_string()).unwrap_or_default();
        self.text += &row(&hex(entry.start), &hex(entry.len), &hex(offset), &file);
        Ok(())
    }

    fn json(&mut self, entry: &Entry) {
        let lead = if std::mem::take(&mut self.is_first) { "[" } else { ",\n" };
        let Entry { start, len, depth, is_present, is_zero, is_data, is_compressed, .. } = entry;
        self.text += &format!(
            "{lead}{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \
             \"present\": {is_present}, \"zero\": {is_zero}, \"data\": {is_data}, \
             \"compressed\": {is_compressed}"
        );
        if let Some(offset) = entry.offset {
            self.text += &format!(", \"offset\": {offset}");
        }
        self.text.push('}');
    }

    /// Appends the end of the list.
    fn end(&mut self) {
        match (self.format, self.is_first) {
            (Output::Json, true) => self.text += "[]\n",
            (Output::Json, false) => self.text += "]\n",
            (Output::Human, _) => self.header(),
        }
    }

    fn print(&mut self) -> Result<()> {
        printer::text(&std::mem::take(&mut self.text))
    }
}

fn row(offset: &str, len: &str, place: &str, file: &str) -> String {
    format!("{offset:<16}{len:<16}{place:<16}{file}\n")
}

/// As printf's `%#x`: zero has no prefix.
fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, len: u64, offset: Option<u64>) -> Entry {
        Entry {
            start,
            len,
            depth: 0,
            is_present: true,
            is_zero: false,
            is_data: true,
            is_compressed: false,
            offset,
            file: None,
        }
    }

    #[test]
    fn only_contiguous_entries_are_merged() {
        for (next, is_merged) in [
            (entry(10, 5, Some(110)), true),
            (entry(10, 5, Some(111)), false),
            (entry(10, 5, None), false),
            (Entry { depth: 1, ..entry(10, 5, Some(110)) }, false),
        ] {
            let mut first = entry(0, 10, Some(100));
            assert_eq!(first.merge(&next), is_merged, "{next:?}");
            assert_eq!(first.len, if is_merged { 15 } else { 10 });
        }
        assert!(entry(0, 10, None).merge(&entry(10, 5, None)));
    }
}

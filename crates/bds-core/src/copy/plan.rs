//! Plans a copy: queries block status and cuts the runs into pieces of a buffer's length.
//!
//! Adjacent runs of one kind are joined, so a source of many small clusters is still read in long
//! pieces; a long run is queried once and cut. A failed query is an error, unless salvaging: then
//! the run counts as data, and reading it shows which part is bad.

use super::options::{CopyOptions, CopySource};
use crate::driver::{Precision, StatusFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Backend;

/// Joining stops after this many queries for one piece, to bound how long a worker holds the
/// planner.
const MAX_JOINED: usize = 64;

/// What is done with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Left alone in the target.
    Skip,
    /// Written as zeros.
    Zero,
    /// Read and written.
    Data,
}

/// A part of one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Index of the source.
    pub(super) source: usize,
    /// Byte offset in that source.
    pub(super) offset: u64,
    /// Length in bytes.
    pub(super) len: u64,
}

/// What one worker copies at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) kind: Kind,
    /// Its first segment.
    pub(super) first: Segment,
    /// Further segments: a compressed cluster may span the ends of sources.
    pub(super) rest: Vec<Segment>,
    /// Byte offset in the target.
    pub(super) target_offset: u64,
    /// Length in bytes of all segments.
    pub(super) len: u64,
    /// Position among the pieces that are handed out.
    pub(super) number: u64,
}

impl Piece {
    pub(super) fn segments(&self) -> impl Iterator<Item = Segment> {
        [self.first].into_iter().chain(self.rest.iter().copied())
    }
}

#[derive(Clone, Copy)]
struct Run {
    kind: Kind,
    len: u64,
}

/// Hands out pieces in order.
pub(super) struct Planner<'a> {
    sources: &'a [CopySource],
    lens: Vec<u64>,
    options: &'a CopyOptions,
    source: usize,
    offset: u64,
    target_offset: u64,
    number: u64,
    /// The run at `offset` in this source, if it was queried.
    known: Option<Run>,
    /// A run that was queried while joining and is of another kind.
    next: Option<Run>,
}

impl<'a> Planner<'a> {
    pub(super) fn new(sources: &'a [CopySource], options: &'a CopyOptions) -> Self {
        Self {
            lens: sources.iter().map(|source| source.backend.len()).collect(),
            sources,
            options,
            source: 0,
            offset: 0,
            target_offset: 0,
            number: 0,
            known: None,
            next: None,
        }
    }

    /// Length of all sources.
    pub(super) fn total(&self) -> u64 {
        self.lens.iter().fold(0, |sum, len| sum.saturating_add(*len))
    }

    /// The next piece; `None` when all were handed out.
    pub(super) async fn next(&mut self) -> Result<Option<Piece>> {
        while self.lens.get(self.source).is_some_and(|len| self.offset >= *len) {
            self.begin_source(self.source + 1);
        }
        if self.source >= self.sources.len() {
            return Ok(None);
        }
        let run = self.joined().await?;
        let piece_len = self.cut(run);
        let first = Segment { source: self.source, offset: self.offset, len: piece_len };
        self.offset += piece_len;
        self.known = match run.len - piece_len {
            0 => self.next.take(),
            len => Some(Run { len, ..run }),
        };
        let rest = if run.kind == Kind::Data { self.fill_cluster(piece_len) } else { Vec::new() };
        let len = piece_len + rest.iter().map(|segment| segment.len).sum::<u64>();
        let piece = Piece {
            kind: run.kind,
            first,
            rest,
            target_offset: self.target_offset,
            len,
            number: self.number,
        };
        self.target_offset += len;
        self.number += 1;
        Ok(Some(piece))
    }

    fn begin_source(&mut self, source: usize) {
        self.source = source;
        self.offset = 0;
        (self.known, self.next) = (None, None);
    }

    /// At the end of a source inside a compressed cluster: takes bytes of the next ones, because
    /// clusters are written whole.
    fn fill_cluster(&mut self, taken_len: u64) -> Vec<Segment> {
        let mut rest = Vec::new();
        let Some(cluster_len) = self.options.compress else { return rest };
        let mut end = self.target_offset + taken_len;
        while !end.is_multiple_of(cluster_len)
            && self.lens.get(self.source).is_some_and(|len| self.offset >= *len)
        {
            self.begin_source(self.source + 1);
            let Some(source_len) = self.lens.get(self.source) else { break };
            let len = (*source_len).min(cluster_len - end % cluster_len);
            if len > 0 {
                rest.push(Segment { source: self.source, offset: 0, len });
            }
            self.offset = len;
            end += len;
        }
        rest
    }

    /// Length of the piece that is cut from the run.
    fn cut(&self, run: Run) -> u64 {
        let buffer_len = match self.options.compress {
            Some(cluster_len) => cluster_len,
            None => self.options.buffer_len as u64,
        };
        match run.kind {
            Kind::Data => {
                // Later pieces then begin at multiples of the buffer.
                let to_boundary = buffer_len - self.target_offset % buffer_len;
                run.len.min(to_boundary)
            }
            // No buffer is needed; one long zero write beats many.
            Kind::Zero | Kind::Skip => run.len,
        }
    }

    /// The run at `offset`, joined with adjacent ones of its kind up to a buffer's length.
    async fn joined(&mut self) -> Result<Run> {
        let mut run = match self.known.take() {
            Some(run) => run,
            None => self.query(self.offset).await?,
        };
        let wanted = self.options.buffer_len as u64;
        for _ in 0..MAX_JOINED {
            let end = self.offset + run.len;
            if run.len >= wanted || end >= self.lens[self.source] || self.next.is_some() {
                break;
            }
            let after = self.query(end).await?;
            if after.kind != run.kind {
                self.next = Some(after);
                break;
            }
            run.len += after.len;
        }
        Ok(run)
    }

    async fn query(&self, offset: u64) -> Result<Run> {
        let mut run = self.query_source(offset).await?;
        if let (Kind::Zero, Some(shown)) = (run.kind, &self.options.target_shows) {
            run = self.without_shown_zeros(run, shown, offset).await?;
        }
        match self.options.compress {
            Some(cluster_len) => Ok(self.whole_clusters(run, offset, cluster_len)),
            None => Ok(run),
        }
    }

    /// Skips zeros that the target shows anyway.
    async fn without_shown_zeros(&self, run: Run, shown: &Backend, offset: u64) -> Result<Run> {
        let target_offset = self.target_offset + (offset - self.offset);
        if target_offset >= shown.len() {
            return Ok(Run { kind: Kind::Skip, ..run });
        }
        let len = run.len.min(shown.len() - target_offset);
        let found =
            shown.block_status(target_offset, len, Precision::Exact).await.map_err(|e| {
                e.context("cannot tell what the target shows already").at(target_offset)
            })?;
        let kind = match found.flags.contains(StatusFlags::ZERO) {
            true => Kind::Skip,
            false => Kind::Zero,
        };
        // An empty answer is no reason to stop: zeros are written.
        if found.len == 0 { Ok(run) } else { Ok(Run { kind, len: found.len.min(len) }) }
    }

    /// Cuts the run to whole clusters; a cluster that is not all of one kind is data.
    fn whole_clusters(&self, run: Run, offset: u64, cluster_len: u64) -> Run {
        let target_offset = self.target_offset + (offset - self.offset);
        let into = target_offset % cluster_len;
        let to_end = self.lens[self.source] - offset;
        let is_last = self.lens[self.source + 1..].iter().all(|len| *len == 0);
        if into == 0 && is_last && run.len >= to_end {
            return run;
        }
        if into == 0 && run.len >= cluster_len {
            return Run { len: run.len - run.len % cluster_len, ..run };
        }
        Run { kind: Kind::Data, len: (cluster_len - into).min(to_end) }
    }

    async fn query_source(&self, offset: u64) -> Result<Run> {
        let source = &self.sources[self.source];
        let len = self.lens[self.source] - offset;
        let answer = match source.above {
            Some(base) => source.backend.status_above(base, offset, len, Precision::Exact).await,
            None => source.backend.block_status(offset, len, Precision::Exact).await,
        };
        let run = match answer {
            Ok(run) if run.len > 0 => run,
            Ok(_) => {
                return Err(Error::new(
                    ErrorKind::Io,
                    "the source became shorter while it was copied",
                )
                .at(offset));
            }
            Err(_) if self.options.salvage.is_some() => {
                return Ok(Run { kind: Kind::Data, len: len.min(self.options.buffer_len as u64) });
            }
            Err(error) => {
                return Err(error.context("cannot tell what the source holds").at(offset));
            }
        };
        let is_decided = run.flags.contains(StatusFlags::ALLOCATED);
        let kind = if source.above.is_some() && !is_decided {
            Kind::Skip
        } else if run.flags.contains(StatusFlags::ZERO) && self.options.sparse_len != 0 {
            Kind::Zero
        } else {
            Kind::Data
        };
        Ok(Run { kind, len: run.len.min(len) })
    }
}

//! Parses the words of the command line.

use std::path::PathBuf;
use std::time::Duration;

use crate::Result;

/// Which job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Backup,
    Mirror,
    Stream,
    Commit,
    Active,
    Chain,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) kind: Kind,
    pub(crate) dir: PathBuf,
    /// Writes a second; 0: no limit.
    pub(crate) rate: u32,
    /// Most writes in flight; 0: no guest.
    pub(crate) depth: usize,
    pub(crate) latency: Duration,
    /// Bytes of old data that a backup may keep in memory.
    pub(crate) staging_len: u64,
    pub(crate) stall: Option<Duration>,
    pub(crate) is_direct: bool,
}

impl Settings {
    pub(crate) fn parse(words: &[String]) -> Result<Self> {
        let [kind, dir, more @ ..] = words else { return Err("usage: jobs KIND DIR …".into()) };
        let kind = match kind.as_str() {
            "backup" => Kind::Backup,
            "mirror" => Kind::Mirror,
            "stream" => Kind::Stream,
            "commit" => Kind::Commit,
            "active" => Kind::Active,
            "chain" => Kind::Chain,
            _ => return Err(format!("no such kind of job: {kind}").into()),
        };
        let mut settings = Self {
            kind,
            dir: dir.into(),
            rate: 0,
            depth: 0,
            latency: Duration::ZERO,
            staging_len: 0,
            stall: None,
            is_direct: false,
        };
        for word in more {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("not KEY=N: {word}"))?;
            match key {
                "rate" => settings.rate = value.parse()?,
                "depth" => settings.depth = value.parse()?,
                "latency" => settings.latency = Duration::from_millis(value.parse()?),
                "staging" => settings.staging_len = value.parse::<u64>()? << 20,
                "stall" => settings.stall = Some(Duration::from_millis(value.parse()?)),
                "direct" => settings.is_direct = value == "on",
                _ => return Err(format!("no such setting: {key}").into()),
            }
        }
        Ok(settings)
    }
}

//! The `blkdebug` filter: injects errors and odd limits, for tests.
//!
//! Options are QEMU's (`image`, `config`, `inject-error`, `set-state`, `align`, `max-transfer`, …),
//! except for suspended requests. Additions carry `x-`: `x-offset` (bytes instead of sectors) and
//! `x-skip` (number of matches that pass first). Limits are bytes: `align` and `opt-*` powers of
//! two up to 1G, `max-*` multiples of them below 2G, 0 for no limit.
//!
//! Errors at open: `InvalidInput` for wrong rules, events or limits, `LimitExceeded` for a file of
//! rules above 1 MiB.
//!
//! A reopen replaces rules (the state starts anew) and limits. Permissions taken on the child in
//! addition (`take-child-perms`) and unshared with others (`unshare-child-perms`) are fixed at
//! open.
//!
//! Invariant: a request that a rule fails does not reach the child.

mod config;
mod rules;

use std::any::Any;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bds_core::driver::{
    Access, Attempt, BoxFuture, Child, Driver, Limits, NodeUse, OpenContext, Perm, Precision,
    ReadFlags, Reopen, ReopenContext, Role, StatusRun, WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Fs, IoVec};
use serde_json::Value;

use super::pass_through::{self, filter_type, pass_on};
use config::FileRules;
use rules::{Kind, Rules};

/// The `blkdebug` filter.
#[derive(Clone, Copy, Debug)]
pub struct Blkdebug;

const fn spec(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec { name, kind, help, default: None }
}

const OPEN_OPTIONS: &[OptionSpec] = &[
    spec("image", OptionKind::Child, "the node to pass requests to"),
    spec("config", OptionKind::String, "file of further rules, at most 1 MiB"),
    spec("inject-error", OptionKind::String, "list of rules that fail requests"),
    spec("set-state", OptionKind::String, "list of rules that move the state on events"),
    spec("align", OptionKind::Size, "required alignment in bytes, a power of two up to 1G"),
    spec(
        "max-transfer",
        OptionKind::Size,
        "longest data request in bytes, a multiple of align below 2G",
    ),
    spec(
        "opt-write-zero",
        OptionKind::Size,
        "best alignment of zero writes in bytes, a power of two up to 1G",
    ),
    spec(
        "max-write-zero",
        OptionKind::Size,
        "longest zero write in bytes, a multiple of opt-write-zero below 2G",
    ),
    spec(
        "opt-discard",
        OptionKind::Size,
        "alignment of discards in bytes, a power of two up to 1G",
    ),
    spec(
        "max-discard",
        OptionKind::Size,
        "longest discard in bytes, a multiple of opt-discard below 2G",
    ),
    spec("take-child-perms", OptionKind::String, "permissions to take on the image in addition"),
    spec("unshare-child-perms", OptionKind::String, "permissions to unshare in addition"),
];

struct DebugNode {
    node_name: String,
    image: Child,
    rules: Mutex<Rules>,
    /// Without rules the lock is never taken. Changes while no request is in flight.
    has_rules: AtomicBool,
    settings: Mutex<Settings>,
    /// Permissions taken on the child in addition, and unshared.
    taken: Perm,
    unshared: Perm,
}

/// The options that may change while the node is open.
#[derive(Clone, Debug, Default)]
struct Settings {
    /// Content of the file of rules when the option was given.
    file: FileRules,
    inject: Option<Value>,
    set_state: Option<Value>,
    odd: LimitOverrides,
}

impl Settings {
    /// Takes options; an option that is missing keeps its value.
    async fn take(self, fs: &Fs, options: &mut Options) -> Result<Self> {
        let file = match options.take_str("config")? {
            Some(path) => FileRules::read(fs, &path).await?,
            None => self.file,
        };
        Ok(Self {
            file,
            inject: options.take("inject-error").or(self.inject),
            set_state: options.take("set-state").or(self.set_state),
            odd: self.odd.take(options)?,
        })
    }

    fn rules(&self) -> Result<Rules> {
        let mut rules = Rules::parse(self.inject.clone(), self.set_state.clone())?;
        rules.add(&self.file)?;
        Ok(rules)
    }
}

/// A prepared reopen: other rules and limits.
struct Prepared<'a> {
    node: &'a DebugNode,
    settings: Settings,
    rules: Option<Rules>,
}

impl Reopen for Prepared<'_> {
    fn commit(self: Box<Self>) {
        let Self { node, settings, rules } = *self;
        *node.settings() = settings;
        if let Some(rules) = rules {
            node.has_rules.store(!rules.is_empty(), Ordering::Release);
            *node.rules() = rules;
        }
    }

    fn request_alignment(&self) -> Option<u32> {
        Some(self.settings.odd.align.max(1))
    }
}

/// Limits from the options; zero: the child's.
#[derive(Clone, Copy, Debug, Default)]
struct LimitOverrides {
    align: u32,
    max_transfer: u64,
    zero_alignment: u32,
    max_zero: u64,
    discard_alignment: u32,
    max_discard: u64,
}

impl DebugNode {
    fn has_rules(&self) -> bool {
        self.has_rules.load(Ordering::Relaxed)
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn prepare(&self, context: &mut ReopenContext<'_>) -> Result<Prepared<'_>> {
        let options = &mut context.options;
        // Rules that stay keep their state.
        let has_new =
            ["config", "inject-error", "set-state"].iter().any(|key| options.contains(key));
        let settings = self.settings().clone();
        let settings = settings.take(context.fs, options).await?;
        let rules = if has_new { Some(settings.rules()?) } else { None };
        Ok(Prepared { node: self, settings, rules })
    }

    /// Raises `events`, then matches the rules.
    fn check(&self, kind: Kind, range: Range<u64>, events: &[&str]) -> Result<(), (Error, bool)> {
        if !self.has_rules() {
            return Ok(());
        }
        let mut rules = self.rules();
        for event in events {
            rules.event(event);
        }
        match rules.match_request(kind, range.clone(), events) {
            None => Ok(()),
            Some(fault) => {
                let error = io::Error::from_raw_os_error(fault.errno);
                let error =
                    Error::io(error, "injected error").node(&self.node_name).at(range.start);
                Err((error, fault.is_immediate))
            }
        }
    }

    /// As `check`, for async callers: an error that is not immediate yields first.
    async fn pass(&self, kind: Kind, offset: u64, len: u64, events: &[&str]) -> Result<()> {
        match self.check(kind, offset..offset.saturating_add(len), events) {
            Ok(()) => Ok(()),
            Err((error, true)) => Err(error),
            Err((error, false)) => {
                bds_io::yield_now().await;
                Err(error)
            }
        }
    }
}

impl Driver for DebugNode {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    pass_on!(self.image =>
        len, is_filter, write_flags, zero_flags, compressed_unit, truncate, allocated_len);

    fn limits(&self) -> Limits {
        let mut limits = Limits { request_alignment: 1, ..self.image.limits() };
        let odd = self.settings().odd;
        limits.request_alignment = odd.align.max(1);
        if odd.max_transfer != 0 {
            limits.max_transfer = odd.max_transfer;
        }
        if odd.zero_alignment != 0 {
            limits.zero_alignment = odd.zero_alignment;
        }
        if odd.max_zero != 0 {
            limits.max_zero = odd.max_zero;
        }
        if odd.discard_alignment != 0 {
            limits.discard_alignment = odd.discard_alignment;
        }
        if odd.max_discard != 0 {
            limits.max_discard = odd.max_discard;
        }
        limits
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        // With rules a request is matched exactly once, on the slow path.
        if self.has_rules() { None } else { self.image.try_read(offset, iov) }
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if self.has_rules() { None } else { self.image.try_write(offset, iov) }
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass(Kind::Read, offset, iov.len() as u64, &[]).await?;
            self.image.read(offset, iov, flags).await
        })
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass(Kind::Write, offset, iov.len() as u64, &["pwritev"]).await?;
            self.image.write(offset, iov, flags).await
        })
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass(Kind::Write, offset, iov.len() as u64, &["pwritev"]).await?;
            self.image.write_compressed(offset, iov).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            self.pass(Kind::Zero, offset, len, &["pwritev_zero"]).await?;
            self.image.write_zeroes(offset, len, flags).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            self.pass(Kind::Discard, offset, len, &[]).await?;
            self.image.discard(offset, len).await?;
            Ok(Attempt::Done)
        })
    }

    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if self.has_rules() {
                self.rules().event("flush_to_os");
            }
            Ok(())
        })
    }

    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.pass(Kind::Flush, 0, 0, &["flush_to_disk"]))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move {
            self.pass(Kind::Status, offset, len, &[]).await?;
            Ok(pass_through::status(&self.image, self.len(), offset, len))
        })
    }

    fn child_access(&self, _name: &str, role: Role, node: &NodeUse) -> Access {
        let access = Access::of_child(role, node);
        if !node.is_active {
            return access;
        }
        Access { perm: access.perm | self.taken, shared: access.shared - self.unshared }
    }

    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(async {
            let prepared = self.prepare(context).await;
            prepared
                .map(|prepared| Box::new(prepared) as Box<dyn Reopen>)
                .map_err(|e| e.node(&self.node_name))
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

filter_type!(Blkdebug, "blkdebug", "faults and limits on demand, for tests");

impl Blkdebug {
    async fn open_node(&self, context: &mut OpenContext<'_>) -> Result<DebugNode> {
        let (fs, options) = (context.fs, &mut context.options);
        let settings = Settings::default().take(fs, options).await?;
        let rules = settings.rules()?;
        let taken = take_perms(options, "take-child-perms")?;
        let unshared = take_perms(options, "unshare-child-perms")?;
        let image = context.child("image", Role::FILTERED | Role::PRIMARY).await?;
        Ok(DebugNode {
            node_name: context.node_name.to_owned(),
            image,
            has_rules: AtomicBool::new(!rules.is_empty()),
            rules: Mutex::new(rules),
            settings: Mutex::new(settings),
            taken,
            unshared,
        })
    }
}

/// Takes a list of permissions, by QEMU's words.
fn take_perms(options: &mut Options, key: &'static str) -> Result<Perm> {
    let words = match options.take(key) {
        None | Some(Value::Null) => return Ok(Perm::empty()),
        Some(Value::Array(words)) => words,
        // From `key.0=…`.
        Some(Value::Object(map)) => map.into_iter().map(|(_, word)| word).collect(),
        Some(word) => vec![word],
    };
    let mut perms = Perm::empty();
    for word in words {
        let known = word.as_str().and_then(|word| {
            Perm::all().iter().find(|perm| perm.words().any(|known| known == word))
        });
        perms |= known.ok_or_else(|| {
            let all: Vec<&str> = Perm::all().words().collect();
            let words = format!("option '{key}' must be a list of {}", all.join(", "));
            Error::new(ErrorKind::InvalidInput, words).field(key, word)
        })?;
    }
    Ok(perms)
}

impl LimitOverrides {
    /// Takes options; an option that is missing keeps its value; all of them must fit together.
    fn take(self, options: &mut Options) -> Result<Self> {
        let align = take_unit(options, "align")?.unwrap_or(self.align);
        let unit = u64::from(align.max(1));
        let zero_alignment = take_unit(options, "opt-write-zero")?.unwrap_or(self.zero_alignment);
        let discard_alignment =
            take_unit(options, "opt-discard")?.unwrap_or(self.discard_alignment);
        let zero_unit = unit.max(zero_alignment.into());
        let discard_unit = unit.max(discard_alignment.into());
        Ok(Self {
            align,
            zero_alignment,
            discard_alignment,
            max_transfer: take_longest(options, "max-transfer", unit, self.max_transfer)?,
            max_zero: take_longest(options, "max-write-zero", zero_unit, self.max_zero)?,
            max_discard: take_longest(options, "max-discard", discard_unit, self.max_discard)?,
        })
    }
}

/// Takes a power of two up to 1 GiB, as the request path requires of alignments.
fn take_unit(options: &mut Options, key: &'static str) -> Result<Option<u32>> {
    let Some(value) = options.take_size(key)? else { return Ok(None) };
    match u32::try_from(value) {
        Ok(unit) if unit.is_power_of_two() && unit <= 1 << 30 => Ok(Some(unit)),
        _ => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("option '{key}' must be a power of two up to 1G"),
        )
        .field(key, value)),
    }
}

/// Takes a multiple of `unit`; 0: no limit.
fn take_longest(options: &mut Options, key: &'static str, unit: u64, current: u64) -> Result<u64> {
    let value = options.take_size(key)?.unwrap_or(current);
    if value % unit == 0 && value < 1 << 31 {
        return Ok(value);
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!("option '{key}' must be a multiple of {unit} below 2G"),
    )
    .field(key, value))
}

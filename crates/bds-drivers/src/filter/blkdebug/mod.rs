//! `blkdebug`: faults and odd limits on demand, between a node and whoever uses it.
//!
//! Options are QEMU's (`image`, `inject-error`, `set-state`, `align`, `max-transfer`, …), except for configuration files
//! and suspended requests. Additions carry `x-`: `x-offset` (a byte instead of a sector) and `x-skip` (let the first
//! matches pass).
//!
//! Invariant: a request that a rule fails reaches nothing below.

mod rules;

use std::any::Any;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use bds_core::driver::{
    Attempt, BoxFuture, Category, Child, Driver, DriverType, HostMap, Limits, OpenContext,
    ReadFlags, Role, StatusFlags, StatusRun, Truncate, WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

use rules::{Kind, Rules};

/// The `blkdebug` filter.
#[derive(Clone, Copy, Debug)]
pub struct Blkdebug;

const fn spec(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec { name, kind, help, default: None }
}

const OPEN_OPTIONS: &[OptionSpec] = &[
    spec("image", OptionKind::Child, "the node to pass requests to"),
    spec("inject-error", OptionKind::String, "list of rules that fail requests"),
    spec("set-state", OptionKind::String, "list of rules that move the state on events"),
    spec("align", OptionKind::Size, "required alignment in bytes"),
    spec("max-transfer", OptionKind::Size, "longest data request in bytes"),
    spec("opt-write-zero", OptionKind::Size, "best alignment of zero writes in bytes"),
    spec("max-write-zero", OptionKind::Size, "longest zero write in bytes"),
    spec("opt-discard", OptionKind::Size, "alignment of discards in bytes"),
    spec("max-discard", OptionKind::Size, "longest discard in bytes"),
    spec("take-child-perms", OptionKind::String, "accepted for compatibility"),
    spec("unshare-child-perms", OptionKind::String, "accepted for compatibility"),
];

struct DebugNode {
    node_name: String,
    image: Child,
    rules: Mutex<Rules>,
    /// Decided at open: without rules the lock is never taken.
    has_rules: bool,
    odd: OddLimits,
}

/// Limits the user asked for; zero: as below.
#[derive(Clone, Copy, Debug, Default)]
struct OddLimits {
    align: u32,
    max_transfer: u64,
    zero_alignment: u32,
    max_zero: u64,
    discard_alignment: u32,
    max_discard: u64,
}

impl DebugNode {
    /// Raises `events`, then asks the rules.
    fn check(&self, kind: Kind, range: Range<u64>, events: &[&str]) -> Result<(), (Error, bool)> {
        if !self.has_rules {
            return Ok(());
        }
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            rules.event(event);
        }
        match rules.judge(kind, range.clone(), events) {
            None => Ok(()),
            Some(fault) => {
                let error = io::Error::from_raw_os_error(fault.errno);
                let error =
                    Error::io(error, "injected error").node(&self.node_name).at(range.start);
                Err((error, fault.is_immediate))
            }
        }
    }

    /// As `check`, for async callers: an error that is not immediate lets others run first.
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

    fn len(&self) -> u64 {
        self.image.len()
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits { request_alignment: 1, ..self.image.limits() };
        let odd = self.odd;
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

    fn is_filter(&self) -> bool {
        true
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::all()
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::all())
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        // With rules a request is judged exactly once, on the slow path.
        if self.has_rules { None } else { self.image.try_read(offset, iov) }
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if self.has_rules { None } else { self.image.try_write(offset, iov) }
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

    fn compressed_unit(&self) -> Option<u32> {
        self.image.compressed_unit()
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
            if self.has_rules {
                let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
                rules.event("flush_to_os");
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
        _precise: bool,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move {
            self.pass(Kind::Status, offset, len, &[]).await?;
            let end = self.image.len();
            if offset >= end {
                return Ok(StatusRun { len: 0, flags: StatusFlags::EOF, map: None });
            }
            let map = Some(HostMap { child: "image", offset });
            Ok(StatusRun { len: len.min(end - offset), flags: StatusFlags::RAW, map })
        })
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        self.image.truncate(change)
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        self.image.allocated_len()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DriverType for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn category(&self) -> Category {
        Category::Filter
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let options = &mut context.options;
            let inject = options.take("inject-error");
            let rules = Rules::parse(inject, options.take("set-state"))?;
            let odd = parse_limits(options)?;
            options.take("take-child-perms");
            options.take("unshare-child-perms");
            let image = context.child("image", Role::FILTERED | Role::PRIMARY).await?;
            let has_rules = !rules.is_empty();
            let node_name = context.node_name.to_owned();
            let rules = Mutex::new(rules);
            Ok(Box::new(DebugNode { node_name, image, rules, has_rules, odd }) as Box<dyn Driver>)
        })
    }
}

fn parse_limits(options: &mut Options) -> Result<OddLimits> {
    let align = take_unit(options, "align")?;
    let unit = u64::from(align.max(1));
    let zero_alignment = take_unit(options, "opt-write-zero")?;
    let discard_alignment = take_unit(options, "opt-discard")?;
    let max_transfer = take_longest(options, "max-transfer", unit)?;
    let max_zero = take_longest(options, "max-write-zero", unit.max(zero_alignment.into()))?;
    let max_discard = take_longest(options, "max-discard", unit.max(discard_alignment.into()))?;
    Ok(OddLimits { align, max_transfer, zero_alignment, max_zero, discard_alignment, max_discard })
}

/// A power of two up to 1 GiB, as the corridor wants alignments.
fn take_unit(options: &mut Options, key: &'static str) -> Result<u32> {
    let Some(value) = options.take_size(key)? else { return Ok(0) };
    match u32::try_from(value) {
        Ok(unit) if unit.is_power_of_two() && unit <= 1 << 30 => Ok(unit),
        _ => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("option '{key}' must be a power of two up to 1G"),
        )
        .field(key, value)),
    }
}

/// A multiple of `unit`; 0: no limit.
fn take_longest(options: &mut Options, key: &'static str, unit: u64) -> Result<u64> {
    let value = options.take_size(key)?.unwrap_or(0);
    if value % unit == 0 && value < 1 << 31 {
        return Ok(value);
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!("option '{key}' must be a multiple of {unit} below 2G"),
    )
    .field(key, value))
}

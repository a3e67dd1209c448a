//! The `throttle` filter: delays requests until the rates of a group allow them.
//!
//! ```text
//! groups  registry of groups by name                  limits  rates from options
//! group   one group: buckets, members, queues of waiting requests
//! ```
//!
//! Options are QEMU's `file` and `throttle-group`; the group is created before, with
//! [`ThrottleGroups::create`]. Instead of a group the node may have rates of its own
//! (`limits.bps-total=1M`, …), which QEMU does not support. Rates are bytes (`bps-*`) or operations
//! (`iops-*`) a second, burst lengths are seconds.
//!
//! Errors at open: `NotFound` for an unknown group; `InvalidInput` for contradictory limits, or for
//! both a group and limits.
//!
//! Reads count as reads; writes, compressed writes, zero writes and discards as writes. Flushes,
//! status queries and changes of the length never wait. A request that was granted and then fails
//! or is dropped has used its share. While the node is drained no request waits.

mod group;
mod groups;
mod limits;
#[cfg(test)]
mod tests;

use std::any::Any;

use bds_core::driver::{
    BoxFuture, Child, Driver, OpenContext, ReadFlags, Reopen, ReopenContext, Role,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::rate::{Direction, RateLimits};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::pass_through::{filter_type, pass_on};
use group::{Group, Member};

pub use groups::{GroupInfo, ThrottleGroups};
pub use limits::limits_from_options;

/// The `throttle` filter, with the groups its nodes may join.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    groups: ThrottleGroups,
}

impl Throttle {
    /// Makes the filter whose nodes may join `groups`.
    pub fn new(groups: ThrottleGroups) -> Self {
        Self { groups }
    }

    /// The groups that its nodes may join.
    pub fn groups(&self) -> &ThrottleGroups {
        &self.groups
    }
}

struct ThrottleNode {
    file: Child,
    /// Dropped with the node, which leaves the group.
    member: Member,
    /// The group belongs to this node alone.
    is_alone: bool,
}

/// A prepared reopen: new limits for a node with a group of its own.
struct NewLimits<'n>(Option<(&'n Member, RateLimits)>);

impl Reopen for NewLimits<'_> {
    fn commit(self: Box<Self>) {
        if let Some((member, limits)) = self.0 {
            member.set_limits(limits);
        }
    }
}

impl ThrottleNode {
    fn prepare(&self, context: &mut ReopenContext<'_>) -> Result<NewLimits<'_>> {
        let Some(limits) = limits::take_limits(&mut context.options)? else {
            return Ok(NewLimits(None));
        };
        if !self.is_alone {
            let words =
                "option 'limits' belongs to nodes without a group; change the group's limits";
            return Err(Error::new(ErrorKind::InvalidInput, words));
        }
        Ok(NewLimits(Some((&self.member, limits))))
    }
}

impl Driver for ThrottleNode {
    fn name(&self) -> &'static str {
        "throttle"
    }

    pass_on!(self.file =>
        len, limits, is_filter, write_flags, zero_flags, write, compressed_unit,
        write_compressed, write_zeroes, discard, block_status, truncate, allocated_len);

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let pass = self.member.try_acquire(Direction::Read, iov.len() as u64)?;
        let result = self.file.try_read(offset, iov)?;
        pass.consume();
        Some(result)
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let pass = self.member.try_acquire(Direction::Write, iov.len() as u64)?;
        let result = self.file.try_write(offset, iov)?;
        pass.consume();
        Some(result)
    }

    fn pace(&self, len: u64) -> Option<BoxFuture<'_, ()>> {
        let waiting = self.member.enqueue(Direction::Write, len)?;
        Some(Box::pin(waiting.wait()))
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.member.acquire(Direction::Read, iov.len() as u64).await;
            self.file.read(offset, iov, flags).await
        })
    }

    fn drain_begin(&self) {
        self.member.drain_begin();
    }

    fn drain_end(&self) {
        self.member.drain_end();
    }

    /// Accepts any mode. Limits of the node's own may change; another group needs another node.
    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        let prepared = self.prepare(context);
        Box::pin(async { prepared.map(|limits| Box::new(limits) as Box<dyn Reopen>) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn spec(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec { name, kind, help, default: None }
}

const OPEN_OPTIONS: &[OptionSpec] = &[
    spec("file", OptionKind::Child, "the node to pass requests to"),
    spec("throttle-group", OptionKind::String, "name of the group whose rates hold"),
    spec(
        "limits.bps-total",
        OptionKind::Size,
        "bytes a second; also -max (bytes a second) and -max-length (seconds), as for all rates",
    ),
    spec("limits.bps-read", OptionKind::Size, "bytes read a second"),
    spec("limits.bps-write", OptionKind::Size, "bytes written a second"),
    spec("limits.iops-total", OptionKind::Number, "operations a second"),
    spec("limits.iops-read", OptionKind::Number, "reads a second"),
    spec("limits.iops-write", OptionKind::Number, "writes a second"),
    spec("limits.iops-size", OptionKind::Size, "bytes that count as one operation"),
];

filter_type!(Throttle, "throttle", "requests wait until rates allow them");

impl Throttle {
    async fn open_node(&self, context: &mut OpenContext<'_>) -> Result<ThrottleNode> {
        let is_alone = !context.options.contains("throttle-group");
        let member = self.join(&mut context.options, context.node_name)?;
        let file = context.child("file", Role::FILTERED | Role::PRIMARY).await?;
        Ok(ThrottleNode { file, member, is_alone })
    }

    /// Joins the group that the options name, or a new one for this node alone.
    fn join(&self, options: &mut Options, node_name: &str) -> Result<Member> {
        let group = options.take_str("throttle-group")?;
        let limits = limits::take_limits(options)?;
        match (group, limits) {
            (Some(name), None) => self.groups.join(&name, node_name),
            (None, Some(limits)) => Ok(Group::new(node_name, limits)?.join(node_name)),
            (Some(_), Some(_)) => Err(Error::new(
                ErrorKind::InvalidInput,
                "options 'throttle-group' and 'limits' exclude each other: the group has its limits",
            )),
            (None, None) => Err(Error::new(
                ErrorKind::InvalidInput,
                "option 'throttle-group' is missing: name a group, or give 'limits.…' for this node \
                 alone",
            )),
        }
    }
}

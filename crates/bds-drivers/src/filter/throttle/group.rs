//! A throttle group: leaky buckets that its members share, and the queues of requests that wait for
//! them.
//!
//! Each member has one FIFO queue a direction. The members' heads are granted round robin, and
//! where both directions use the same bucket, so are the directions. A *granted* request leaves its
//! queue, and its cost is added to the buckets at that moment.
//!
//! The group has no timer that could go away with a member. Every waiting request has an alarm of
//! its own, set to no later than it can be due, and every alarm grants all requests that are due.
//! So a request that is never polled again, is dropped or forgotten, or belongs to a node that is
//! closed, blocks no other.
//!
//! If a request can be due earlier than its alarm (the one in front is gone, other limits), it is
//! woken and sets its alarm again. Heads always are, so usually each request waits for one alarm
//! and polls twice.
//!
//! The group's lock is held for bookkeeping only; nothing is woken or awaited under it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::Bound;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bds_core::Result;
use bds_core::rate::{Cost, Direction, Limiter, RateLimits};
use bds_io::sync::Notify;
use futures_util::future::select;

use super::groups::GroupInfo;

/// Buckets shared by members.
pub(super) struct Group {
    name: String,
    state: Mutex<State>,
}

struct State {
    limiter: Limiter,
    /// By number, in the order of joining.
    members: BTreeMap<u64, MemberState>,
    next_number: u64,
    reads: DirectionTotals,
    writes: DirectionTotals,
    last_direction: Direction,
}

/// Totals of all members for one direction.
#[derive(Default)]
struct DirectionTotals {
    waiting: usize,
    /// The member that was granted last.
    last_member: u64,
}

struct MemberState {
    node_name: String,
    is_drained: bool,
    reads: Queue,
    writes: Queue,
}

/// Waiting requests of one member and direction, oldest first.
#[derive(Default)]
struct Queue {
    waiters: VecDeque<Arc<Waiter>>,
    /// Total cost of the queue.
    cost: Cost,
}

/// A waiting request.
struct Waiter {
    cost: Cost,
    is_granted: AtomicBool,
    woken: Notify,
}

/// Requests to wake once the lock is released.
type ToWake = Vec<Arc<Waiter>>;

fn wake(to_wake: ToWake) {
    to_wake.iter().for_each(|waiter| waiter.woken.notify_one());
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Group").field(&self.name).finish()
    }
}

impl Group {
    pub(super) fn new(name: &str, limits: RateLimits) -> Result<Arc<Self>> {
        let state = State {
            limiter: Limiter::new(limits)?,
            members: BTreeMap::new(),
            next_number: 0,
            reads: DirectionTotals::default(),
            writes: DirectionTotals::default(),
            last_direction: Direction::Write,
        };
        Ok(Arc::new(Self { name: name.to_owned(), state: Mutex::new(state) }))
    }

    /// Adds a node to the group.
    pub(super) fn join(self: &Arc<Self>, node_name: &str) -> Member {
        let mut state = self.lock();
        let number = state.next_number;
        state.next_number += 1;
        state.members.insert(
            number,
            MemberState {
                node_name: node_name.to_owned(),
                is_drained: false,
                reads: Queue::default(),
                writes: Queue::default(),
            },
        );
        Member { group: Arc::clone(self), number }
    }

    pub(super) fn info(&self) -> GroupInfo {
        let state = self.lock();
        GroupInfo {
            name: self.name.clone(),
            limits: state.limiter.limits(),
            members: state.members.values().map(|member| member.node_name.clone()).collect(),
        }
    }

    pub(super) fn set_limits(&self, limits: RateLimits) -> Result<()> {
        let limiter = Limiter::new(limits)?;
        let mut state = self.lock();
        state.limiter = limiter;
        let all = state.members.values().flat_map(|member| [&member.reads, &member.writes]);
        let to_wake = all.flat_map(|queue| queue.waiters.iter().cloned()).collect();
        drop(state);
        wake(to_wake);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemberState {
    fn queue(&mut self, direction: Direction) -> &mut Queue {
        match direction {
            Direction::Read => &mut self.reads,
            Direction::Write => &mut self.writes,
        }
    }
}

impl State {
    fn totals(&mut self, direction: Direction) -> &mut DirectionTotals {
        match direction {
            Direction::Read => &mut self.reads,
            Direction::Write => &mut self.writes,
        }
    }

    fn queue(&mut self, member: u64, direction: Direction) -> Option<&mut Queue> {
        self.members.get_mut(&member).map(|member| member.queue(direction))
    }

    fn is_drained(&self, member: u64) -> bool {
        self.members.get(&member).is_some_and(|member| member.is_drained)
    }

    /// True if no request waits and one of this direction may go now.
    fn is_free(&mut self, now: Duration, direction: Direction) -> bool {
        self.reads.waiting + self.writes.waiting == 0 && self.limiter.wait(now, direction).is_zero()
    }

    /// Grants all requests that are due.
    fn grant_due(&mut self, now: Duration) -> ToWake {
        let mut to_wake = Vec::new();
        while let Some((direction, member)) = self.next_due(now) {
            let Some(queue) = self.queue(member, direction) else { break };
            let Some(waiter) = queue.waiters.pop_front() else { break };
            queue.cost = queue.cost.minus(waiter.cost);
            // The alarm of the next one was set while another stood in front.
            to_wake.extend(queue.waiters.front().cloned());
            self.limiter.take(now, direction, waiter.cost);
            waiter.is_granted.store(true, Ordering::Release);
            to_wake.push(waiter);
            let totals = self.totals(direction);
            totals.waiting -= 1;
            totals.last_member = member;
            self.last_direction = direction;
        }
        to_wake
    }

    /// The next request to grant, if one is due: the other direction than last time first.
    fn next_due(&mut self, now: Duration) -> Option<(Direction, u64)> {
        let order = match self.last_direction {
            Direction::Read => [Direction::Write, Direction::Read],
            Direction::Write => [Direction::Read, Direction::Write],
        };
        let direction = order.into_iter().find(|direction| {
            self.totals(*direction).waiting > 0 && self.limiter.wait(now, *direction).is_zero()
        })?;
        Some((direction, self.next_member(direction)?))
    }

    /// The first member behind the last one that has a request waiting.
    fn next_member(&mut self, direction: Direction) -> Option<u64> {
        let last = self.totals(direction).last_member;
        let behind = (Bound::Excluded(last), Bound::Unbounded);
        let mut waiting = |range: (Bound<u64>, Bound<u64>)| {
            let mut members = self.members.range_mut(range);
            members.find_map(|(number, member)| {
                (!member.queue(direction).waiters.is_empty()).then_some(*number)
            })
        };
        waiting(behind).or_else(|| waiting((Bound::Unbounded, Bound::Included(last))))
    }

    /// The head of each queue, to set its alarm again.
    fn heads(&self) -> ToWake {
        let queues = self.members.values().flat_map(|member| [&member.reads, &member.writes]);
        queues.filter_map(|queue| queue.waiters.front().cloned()).collect()
    }

    /// Grants all requests of a member.
    fn release(&mut self, member: u64) -> ToWake {
        let mut to_wake = Vec::new();
        for direction in [Direction::Read, Direction::Write] {
            let Some(queue) = self.queue(member, direction) else { continue };
            let queue = std::mem::take(queue);
            self.totals(direction).waiting -= queue.waiters.len();
            // No time is given: this may be called from outside of the Context whose clock counts.
            // The cost leaks from the next request on.
            self.limiter.take(Duration::ZERO, direction, queue.cost);
            queue
                .waiters
                .iter()
                .for_each(|waiter| waiter.is_granted.store(true, Ordering::Release));
            to_wake.extend(queue.waiters);
        }
        to_wake
    }
}

/// Membership of a node in a group; dropping it leaves the group. Requests borrow it, so none of
/// them outlives it.
pub(super) struct Member {
    group: Arc<Group>,
    number: u64,
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut state = self.group.lock();
        // Only requests that were forgotten can still be in its queues.
        if let Some(member) = state.members.remove(&self.number) {
            state.reads.waiting -= member.reads.waiters.len();
            state.writes.waiting -= member.writes.waiters.len();
        }
    }
}

impl Member {
    /// Waits until a request of `len` bytes is granted. Dropped while it waits, it leaves the queue
    /// and costs nothing.
    pub(super) async fn acquire(&self, direction: Direction, len: u64) {
        if let Some(waiting) = self.enqueue(direction, len) {
            waiting.wait().await;
        }
    }

    /// Grants a request if it need not wait. Unless [consumed](Grant::consume), its cost is
    /// refunded.
    pub(super) fn try_acquire(&self, direction: Direction, len: u64) -> Option<Grant<'_>> {
        let mut state = self.group.lock();
        let cost = state.limiter.limits().cost(len);
        let now = bds_io::now();
        let may_go = state.is_drained(self.number) || state.is_free(now, direction);
        if !may_go {
            return None;
        }
        state.limiter.take(now, direction, cost);
        Some(Grant { group: &self.group, direction, cost, is_consumed: false })
    }

    /// Sets the limits of the whole group; the caller has checked them.
    pub(super) fn set_limits(&self, limits: RateLimits) {
        self.group.set_limits(limits).expect("the limits were checked when they were parsed");
    }

    /// From now on no request of this member waits.
    pub(super) fn drain_begin(&self) {
        let mut state = self.group.lock();
        if let Some(member) = state.members.get_mut(&self.number) {
            member.is_drained = true;
        }
        let to_wake = state.release(self.number);
        drop(state);
        wake(to_wake);
    }

    /// The limits hold again.
    pub(super) fn drain_end(&self) {
        if let Some(member) = self.group.lock().members.get_mut(&self.number) {
            member.is_drained = false;
        }
    }

    /// Queues a request; `None` if it may go at once.
    pub(super) fn enqueue(&self, direction: Direction, len: u64) -> Option<QueuedRequest<'_>> {
        let mut state = self.group.lock();
        let now = bds_io::now();
        let cost = state.limiter.limits().cost(len);
        if state.is_drained(self.number) || state.is_free(now, direction) {
            state.limiter.take(now, direction, cost);
            return None;
        }
        let waiter =
            Arc::new(Waiter { cost, is_granted: AtomicBool::new(false), woken: Notify::new() });
        let queue = state.queue(self.number, direction)?;
        queue.waiters.push_back(Arc::clone(&waiter));
        queue.cost = queue.cost.plus(cost);
        state.totals(direction).waiting += 1;
        Some(QueuedRequest { member: self, direction, waiter })
    }
}

/// A request that was granted at once.
pub(super) struct Grant<'a> {
    group: &'a Group,
    direction: Direction,
    cost: Cost,
    is_consumed: bool,
}

impl Grant<'_> {
    /// The request was done, so it costs.
    pub(super) fn consume(mut self) {
        self.is_consumed = true;
    }
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        if self.is_consumed {
            return;
        }
        let mut state = self.group.lock();
        state.limiter.refund(self.direction, self.cost);
        // Requests that queued meanwhile have set their alarms by a level that is gone.
        let to_wake = state.heads();
        drop(state);
        wake(to_wake);
    }
}

/// A request in its queue. Dropping it leaves the queue.
pub(super) struct QueuedRequest<'a> {
    member: &'a Member,
    direction: Direction,
    waiter: Arc<Waiter>,
}

impl QueuedRequest<'_> {
    pub(super) async fn wait(self) {
        while let Some(alarm) = self.grant_and_next_alarm() {
            // A wake-up since the lock was released is kept by `woken`.
            let woken = pin!(self.waiter.woken.notified());
            let rung = pin!(bds_io::sleep(alarm));
            select(woken, rung).await;
        }
    }

    /// Grants what is due. Returns the longest time until this request can be due; `None`: it was
    /// granted.
    fn grant_and_next_alarm(&self) -> Option<Duration> {
        let now = bds_io::now();
        let mut state = self.member.group.lock();
        let to_wake = state.grant_due(now);
        let alarm = self.alarm(&mut state, now);
        drop(state);
        wake(to_wake);
        alarm
    }

    fn alarm(&self, state: &mut State, now: Duration) -> Option<Duration> {
        if self.waiter.is_granted.load(Ordering::Acquire) {
            return None;
        }
        let waiters = state.queue(self.member.number, self.direction).map(|queue| &queue.waiters);
        let in_front = waiters.into_iter().flatten().take_while(|t| !Arc::ptr_eq(t, &self.waiter));
        let ahead = in_front.fold(Cost::default(), |sum, waiter| sum.plus(waiter.cost));
        Some(state.limiter.wait_behind(now, self.direction, ahead))
    }
}

impl Drop for QueuedRequest<'_> {
    fn drop(&mut self) {
        let mut state = self.member.group.lock();
        if self.waiter.is_granted.load(Ordering::Acquire) {
            return;
        }
        let mut next = None;
        if let Some(queue) = state.queue(self.member.number, self.direction)
            && let Some(place) = queue.waiters.iter().position(|t| Arc::ptr_eq(t, &self.waiter))
        {
            queue.waiters.remove(place);
            queue.cost = queue.cost.minus(self.waiter.cost);
            next = queue.waiters.get(place).filter(|_| place == 0).cloned();
            state.totals(self.direction).waiting -= 1;
        }
        drop(state);
        wake(next.into_iter().collect());
    }
}

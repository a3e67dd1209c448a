//! Commands of the property tests and their strategies. Numbers select among what exists when the
//! command runs, modulo its count, so that a sequence stays meaningful while it shrinks.

use std::fmt;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{Just, Strategy, any, prop_oneof};

use super::model::{ALL, Access, READ, WRITE};

/// Number of names in use; few, so that they collide.
pub(super) const NAMES: usize = 6;

/// A node to be opened.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    /// `None`: a generated name.
    pub(super) name: Option<usize>,
    pub(super) ro: Option<bool>,
    pub(super) discard: bool,
    pub(super) transfer: u64,
    pub(super) fault: Fault,
    pub(super) body: Body,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    None,
    FailOpen,
    FailFlush,
    FailClose,
    RefuseBacking,
    OddLen,
}

#[derive(Clone, Debug)]
pub(super) enum Body {
    File,
    Filter(Box<Child>),
    Image(Box<Child>, Option<Box<Child>>),
}

#[derive(Clone, Debug)]
pub(super) enum Child {
    Node(usize),
    Inline(Tree),
}

#[derive(Clone, Debug)]
pub(super) enum Step {
    Append(usize, usize),
    Replace(usize, usize),
    ReplaceChild(usize, bool, usize),
    InsertFilter(usize, usize),
    DropFilter(usize),
    SetBacking(usize, Option<usize>),
    Remove(usize),
    ReadOnly(usize, bool),
    Discard(usize, bool),
    Level(usize, u64),
    Rename(usize, usize),
    ReopenBacking(usize, Option<usize>),
    ReopenFile(usize, usize),
    Own(usize),
    Disown(usize),
    Root(usize, Option<usize>),
    Access(usize, Access),
}

/// How a change is committed.
#[derive(Clone, Debug)]
pub(super) enum CommitMode {
    Commit,
    /// Fails at every step, one after the other, and is committed then.
    Sweep,
    /// Fails at this step, if there are that many.
    FailAt(usize),
    /// Dropped without a commit.
    Drop,
    /// The commit's future is dropped after this many polls.
    CancelAt(usize),
}

#[derive(Clone, Debug)]
pub(super) enum Command {
    Open(Tree),
    /// Fails at every step of its drivers, then succeeds.
    OpenSweep(Tree),
    Acquire(usize),
    Find(usize),
    Clone(usize),
    CloneAndRelease(usize),
    Release(usize),
    Close(usize),
    UseStale(usize),
    Change(Vec<Step>, CommitMode),
    /// Sets a backing node and removes it again.
    AttachAndDetach(usize, usize),
    /// A root edge of a job or a backend, with a node or without.
    Attach(Option<usize>, Access, bool),
    Detach(usize),
    JobAccess(usize, Access),
    Freeze(usize, usize),
    /// Freezes this many links of the chain below a node.
    FreezeChain(usize, usize),
    Thaw(usize),
    Drain(usize),
    DrainSubtree(usize),
    DrainAll,
    EndDrain(usize),
    Poison(usize),
    Block(usize, u32),
    Unblock(usize),
    ClaimJob(usize),
    UnclaimJob(usize),
    AddBitmap(usize, usize),
    AddAnonymous(usize),
    Lease(usize),
    EndLease(usize),
    RemoveBitmap(usize),
    DropAnonymous(usize),
    Activate(Option<usize>, CommitMode),
    Inactivate(Option<usize>, CommitMode),
    Own(usize),
    Del(usize),
    Walk,
    WalkOn,
    LeaveWalk,
    Watch(usize),
    Reap,
    Shutdown,
}

/// A sequence; printed as it is written in a test.
#[derive(Clone)]
pub(super) struct Script(pub(super) Vec<Command>);

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|command| write!(f, "\n    {command:?},"))
    }
}

pub(super) fn script(len: std::ops::Range<usize>) -> impl Strategy<Value = Script> {
    vec(command(), len).prop_map(Script)
}

fn n() -> impl Strategy<Value = usize> + Clone {
    0..64usize
}

pub(super) fn access() -> impl Strategy<Value = Access> {
    let fixed = |perm, shared| Just(Access { perm, shared });
    prop_oneof![
        fixed(0, ALL),
        fixed(READ, ALL),
        fixed(ALL, ALL),
        fixed(READ | WRITE, READ),
        fixed(READ, READ | 4),
        (0..=ALL, 0..=ALL).prop_map(|(perm, shared)| Access { perm, shared }),
        (0..=ALL).prop_map(|perm| Access { perm, shared: ALL }),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        20 => Just(Fault::None),
        1 => Just(Fault::FailOpen),
        1 => Just(Fault::FailFlush),
        1 => Just(Fault::FailClose),
        1 => Just(Fault::RefuseBacking),
        1 => Just(Fault::OddLen),
    ]
}

fn file_tree() -> impl Strategy<Value = Tree> {
    let name = prop_oneof![3 => option::of(0..NAMES), 2 => (0..NAMES).prop_map(Some)];
    let ro = prop_oneof![3 => Just(None), 1 => any::<bool>().prop_map(Some)];
    let transfer = prop_oneof![2 => Just(0u64), 1 => (1..4u64).prop_map(|n| n * 512)];
    (name, ro, any::<bool>(), transfer, fault()).prop_map(|(name, ro, discard, transfer, fault)| {
        Tree { name, ro, discard, transfer, fault, body: Body::File }
    })
}

fn tree() -> impl Strategy<Value = Tree> {
    file_tree().prop_recursive(2, 4, 2, |inner| {
        let child = prop_oneof![
            2 => n().prop_map(Child::Node),
            2 => inner.prop_map(Child::Inline),
        ];
        let backing = option::of(child.clone().prop_map(Box::new));
        let child = child.prop_map(Box::new);
        let body = prop_oneof![
            1 => child.clone().prop_map(Body::Filter),
            2 => (child, backing).prop_map(|(file, backing)| Body::Image(file, backing)),
        ];
        (file_tree(), body).prop_map(|(leaf, body)| Tree { body, ..leaf })
    })
}

fn step() -> impl Strategy<Value = Step> {
    let some = || option::weighted(0.8, n());
    prop_oneof![
        4 => (n(), n()).prop_map(|(a, b)| Step::Append(a, b)),
        4 => (n(), n()).prop_map(|(a, b)| Step::Replace(a, b)),
        3 => (n(), any::<bool>(), n()).prop_map(|(a, b, c)| Step::ReplaceChild(a, b, c)),
        3 => (n(), n()).prop_map(|(a, b)| Step::InsertFilter(a, b)),
        3 => n().prop_map(Step::DropFilter),
        4 => (n(), some()).prop_map(|(a, b)| Step::SetBacking(a, b)),
        2 => n().prop_map(Step::Remove),
        4 => (n(), any::<bool>()).prop_map(|(a, b)| Step::ReadOnly(a, b)),
        1 => (n(), any::<bool>()).prop_map(|(a, b)| Step::Discard(a, b)),
        1 => (n(), 0..9u64).prop_map(|(a, b)| Step::Level(a, b)),
        2 => (n(), 0..NAMES).prop_map(|(a, b)| Step::Rename(a, b)),
        1 => (n(), some()).prop_map(|(a, b)| Step::ReopenBacking(a, b)),
        1 => (n(), n()).prop_map(|(a, b)| Step::ReopenFile(a, b)),
        1 => n().prop_map(Step::Own),
        1 => n().prop_map(Step::Disown),
        3 => (n(), some()).prop_map(|(a, b)| Step::Root(a, b)),
        3 => (n(), access()).prop_map(|(a, b)| Step::Access(a, b)),
    ]
}

fn mode() -> impl Strategy<Value = CommitMode> {
    prop_oneof![
        6 => Just(CommitMode::Commit),
        3 => Just(CommitMode::Sweep),
        1 => (0..8usize).prop_map(CommitMode::FailAt),
        1 => Just(CommitMode::Drop),
        1 => (0..30usize).prop_map(CommitMode::CancelAt),
    ]
}

fn changes() -> impl Strategy<Value = Command> {
    let steps = prop_oneof![3 => vec(step(), 1..2), 2 => vec(step(), 2..4), 1 => vec(step(), 0..7)];
    (steps, mode()).prop_map(|(steps, mode)| Command::Change(steps, mode))
}

/// Opens, and uses of references.
fn node_commands() -> impl Strategy<Value = Command> {
    use Command as C;
    prop_oneof![
        12 => tree().prop_map(C::Open),
        1 => tree().prop_map(C::OpenSweep),
        1 => n().prop_map(C::Acquire),
        1 => n().prop_map(C::Find),
        1 => n().prop_map(C::Clone),
        1 => n().prop_map(C::CloneAndRelease),
        4 => n().prop_map(C::Release),
        2 => n().prop_map(C::Close),
        1 => n().prop_map(C::UseStale),
        1 => n().prop_map(C::Own),
        1 => n().prop_map(C::Del),
        1 => Just(C::Walk),
        1 => Just(C::WalkOn),
        1 => Just(C::LeaveWalk),
        1 => n().prop_map(C::Watch),
        3 => Just(C::Reap),
    ]
}

/// Claims beside the graph's shape.
fn claims() -> impl Strategy<Value = Command> {
    use Command as C;
    prop_oneof![
        1 => n().prop_map(C::Poison),
        2 => (n(), 1..0x2000u32).prop_map(|(a, b)| C::Block(a, b)),
        3 => n().prop_map(C::Unblock),
        2 => n().prop_map(C::ClaimJob),
        1 => n().prop_map(C::UnclaimJob),
        2 => (n(), 0..3usize).prop_map(|(a, b)| C::AddBitmap(a, b)),
        1 => n().prop_map(C::AddAnonymous),
        2 => n().prop_map(C::Lease),
        1 => n().prop_map(C::EndLease),
        1 => n().prop_map(C::RemoveBitmap),
        1 => n().prop_map(C::DropAnonymous),
        1 => (n(), n()).prop_map(|(a, b)| C::Freeze(a, b)),
        8 => (n(), n()).prop_map(|(a, b)| C::FreezeChain(a, b)),
        3 => n().prop_map(C::Thaw),
    ]
}

fn sections() -> impl Strategy<Value = Command> {
    use Command as C;
    let some = || option::weighted(0.8, n());
    prop_oneof![
        3 => n().prop_map(C::Drain),
        1 => n().prop_map(C::DrainSubtree),
        1 => Just(C::DrainAll),
        5 => n().prop_map(C::EndDrain),
        2 => (some(), mode()).prop_map(|(a, b)| C::Inactivate(a, b)),
        3 => (some(), mode()).prop_map(|(a, b)| C::Activate(a, b)),
    ]
}

fn roots() -> impl Strategy<Value = Command> {
    use Command as C;
    let some = || option::weighted(0.8, n());
    prop_oneof![
        4 => (some(), access(), any::<bool>()).prop_map(|(a, b, c)| C::Attach(a, b, c)),
        2 => n().prop_map(C::Detach),
        1 => (n(), access()).prop_map(|(a, b)| C::JobAccess(a, b)),
        1 => (n(), n()).prop_map(|(a, b)| C::AttachAndDetach(a, b)),
    ]
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        120 => node_commands(),
        110 => changes(),
        30 => roots(),
        40 => sections(),
        25 => claims(),
        1 => Just(Command::Shutdown),
    ]
}

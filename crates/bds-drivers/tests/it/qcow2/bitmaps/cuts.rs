//! The power is cut after every write and flush of a change of the stored bitmaps, and every write
//! and flush fails once. Whatever the medium keeps, the image has the old bitmaps, the new ones, or
//! none that is valid; never a wrong one.

use bds_core::driver::Driver;
use bds_core::error::Result;
use bds_drivers::format::qcow2::fuzzing::{MemPort, PortEvent};
use bds_io::{Sim, SimConfig};
use bds_testkit::Chance;

use super::kit::{
    Model, Models, create, expect_clean, expect_leaks_at_most, load, open_alone, store, store_of,
    stored,
};

const LEN: u64 = 1 << 20;
const SECTOR: usize = 512;

/// A change of the stored bitmaps.
#[derive(Clone, Copy, Debug)]
enum Change {
    Mark,
    Store,
    Remove,
}

impl Change {
    async fn apply(self, image: &dyn Driver, new: &Models) -> Result<()> {
        match self {
            Self::Mark => store_of(image).mark_in_use().await,
            Self::Store => store(image, new).await,
            Self::Remove => store_of(image).remove("gone").await,
        }
    }
}

/// An image, its bitmaps, and what a change makes of them.
struct Case {
    name: String,
    bytes: Vec<u8>,
    /// Marked in use before the change begins.
    is_marked: bool,
    change: Change,
    old: Models,
    new: Models,
}

fn some_bitmaps(seed: u64, names: &[&str]) -> Models {
    let mut chance = Chance::new(seed);
    let mut model = || {
        let mut model = Model::new(LEN, 512);
        model.scribble(&mut chance);
        model.set(0..512);
        model
    };
    names.iter().map(|name| ((*name).to_owned(), model())).collect()
}

/// Where cluster 0 has its extensions.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Layout {
    /// As this driver makes it.
    Own,
    /// The backing file's name lies where the extension must go.
    Backed,
    /// The extension's data lies in two sectors.
    Straddling,
}

fn image_of(layout: Layout, cluster: u64, bitmaps: &Models) -> Vec<u8> {
    let file = MemPort::default();
    create(&file, LEN, cluster);
    let mut bytes = file.bytes();
    if layout == Layout::Backed {
        // Behind the extensions, whose list ends there.
        let end = 112
            + 8
            + usize::try_from(u32::from_be_bytes(bytes[116..120].try_into().unwrap())).unwrap()
            + 8;
        bytes[end..end + 4].copy_from_slice(b"base");
        bytes[8..16].copy_from_slice(&(end as u64).to_be_bytes());
        bytes[16..20].copy_from_slice(&4_u32.to_be_bytes());
    }
    let file = MemPort::new(bytes);
    Sim::new(1, SimConfig::calm()).block_on(async {
        let image = open_alone(&file).await;
        load(&*image).await;
        store(&*image, bitmaps).await.unwrap();
        image.close().await.unwrap();
    });
    let mut bytes = file.bytes();
    if layout == Layout::Straddling && !bitmaps.is_empty() {
        let magic = 0x2385_2875_u32.to_be_bytes();
        let at = bytes.windows(4).position(|four| four == magic).unwrap();
        let extension = bytes[at..at + 32].to_vec();
        bytes[112..1024].fill(0);
        bytes[112..120].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 1, 0x70]);
        bytes[488..520].copy_from_slice(&extension);
    }
    bytes
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for layout in [Layout::Own, Layout::Backed, Layout::Straddling] {
        for cluster in [4096, 65536] {
            let old = some_bitmaps(1, &["gone", "kept"]);
            let mut new = some_bitmaps(2, &["kept", "more"]);
            new.get_mut("more").unwrap().is_enabled = false;
            let without = |models: &Models| {
                models.clone().into_iter().filter(|(name, _)| name != "gone").collect::<Models>()
            };
            let only = some_bitmaps(3, &["gone"]);
            let none = Models::new();
            for (what, is_marked, change, old, new) in [
                ("first store", false, Change::Store, &none, &new),
                ("store", true, Change::Store, &old, &new),
                ("store of none", true, Change::Store, &old, &none),
                ("mark", false, Change::Mark, &old, &marked(&old)),
                ("remove", false, Change::Remove, &old, &without(&old)),
                ("remove when marked", true, Change::Remove, &old, &marked(&without(&old))),
                ("remove the last", false, Change::Remove, &only, &none),
            ] {
                cases.push(Case {
                    name: format!("{what}, {layout:?}, clusters of {cluster}"),
                    bytes: image_of(layout, cluster, old),
                    is_marked,
                    change,
                    old: old.clone(),
                    new: new.clone(),
                });
            }
        }
    }
    cases
}

/// The same, all of them inconsistent.
fn marked(models: &Models) -> Models {
    let mark = |model: &Model| Model { dirty: None, ..model.clone() };
    models.iter().map(|(name, model)| (name.clone(), mark(model))).collect()
}

impl Case {
    /// The file as it is when the change begins, and the driver on it.
    async fn begin(&self) -> (MemPort, Box<dyn Driver>) {
        let file = MemPort::new(self.bytes.clone());
        let image = open_alone(&file).await;
        assert_eq!(load(&*image).await, self.old, "{}", self.name);
        if self.is_marked {
            store_of(&*image).mark_in_use().await.unwrap();
        }
        (file, image)
    }

    /// Fails the test unless an image with these bitmaps may be there after a crash. Those of one
    /// directory may be marked or not.
    fn judge(&self, found: &Models, how: &str) -> Outcome {
        let is_of = |wanted: &Models| {
            found.len() == wanted.len()
                && found.iter().all(|(name, model)| {
                    wanted.get(name).is_some_and(|wanted| {
                        let may_be_marked = matches!(self.change, Change::Mark) || self.is_marked;
                        let is_lost = model.dirty.is_none() && may_be_marked;
                        is_lost || model == wanted
                    })
                })
        };
        let old = if self.is_marked { marked(&self.old) } else { self.old.clone() };
        if is_of(&self.new) {
            Outcome::New
        } else if is_of(&old) {
            Outcome::Old
        } else if found.is_empty() {
            Outcome::Lost
        } else {
            panic!("{}: {how}: {found:?}\nold {old:?}\nnew {:?}", self.name, self.new);
        }
    }

    /// After a crash the image works, and takes the bitmaps.
    async fn go_on(&self, file: &MemPort) {
        let image = open_alone(file).await;
        load(&*image).await;
        store_of(&*image).mark_in_use().await.unwrap();
        let last = some_bitmaps(9, &["kept", "last"]);
        store(&*image, &last).await.unwrap();
        image.close().await.unwrap();
        assert_eq!(stored(file).await, last, "{}", self.name);
        expect_leaks_at_most(file).await;
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Old,
    New,
    Lost,
}

/// The medium: what is durable, and what was written since.
struct Medium {
    durable: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
}

impl Medium {
    fn note(&mut self, event: &PortEvent) {
        match event {
            PortEvent::Write(at, bytes) => self.pending.push((*at, bytes.clone())),
            PortEvent::Flush => {
                let pending = std::mem::take(&mut self.pending);
                pending.iter().for_each(|(at, bytes)| put(&mut self.durable, *at, bytes));
            }
        }
    }

    /// What a cut may leave: of each sector that was written, `keeps` says whether it was kept.
    fn after_cut(&self, mut keeps: impl FnMut() -> bool) -> Vec<u8> {
        let mut image = self.durable.clone();
        for (at, bytes) in &self.pending {
            let mut at = *at;
            let mut left = &bytes[..];
            while !left.is_empty() {
                let in_sector = usize::try_from(at).unwrap() % SECTOR;
                let (sector, rest) = left.split_at((SECTOR - in_sector).min(left.len()));
                if keeps() {
                    put(&mut image, at, sector);
                }
                at += sector.len() as u64;
                left = rest;
            }
        }
        image
    }
}

fn put(image: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).unwrap();
    if image.len() < at + bytes.len() {
        image.resize(at + bytes.len(), 0);
    }
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn a_power_cut_at_every_write_leaves_no_wrong_bitmap() {
    /// Random remains of each cut, besides all and nothing.
    const RANDOM: u64 = 6;
    let sim = Sim::new(1, SimConfig::calm());
    let mut cuts = 0;
    let mut outcomes = [0; 3];
    for case in cases() {
        let (before, events) = sim.block_on(async {
            let (file, image) = case.begin().await;
            let before = file.bytes();
            file.take_journal();
            case.change.apply(&*image, &case.new).await.unwrap();
            let events = file.take_journal();
            image.close().await.unwrap();
            assert_eq!(stored(&file).await, case.new, "{}", case.name);
            expect_clean(&file).await;
            (before, events)
        });
        let mut medium = Medium { durable: before, pending: Vec::new() };
        let mut seen = Vec::new();
        for n in 0..=events.len() {
            if n > 0 {
                medium.note(&events[n - 1]);
            }
            for remains in 0..RANDOM + 2 {
                let mut chance = Chance::new(n as u64 * 100 + remains);
                let image = medium.after_cut(|| match remains {
                    0 => false,
                    1 => true,
                    _ => chance.one_in(2),
                });
                let file = MemPort::new(image);
                cuts += 1;
                sim.block_on(async {
                    expect_leaks_at_most(&file).await;
                    let found = stored(&file).await;
                    let outcome = case.judge(&found, &format!("cut {n} of {}", events.len()));
                    outcomes[outcome as usize] += 1;
                    seen.push(outcome);
                    if remains == 2 {
                        case.go_on(&file).await;
                    }
                });
            }
        }
        assert_eq!(seen[0], if case.old == case.new { Outcome::New } else { Outcome::Old });
        // What was reported as done is durable.
        assert_eq!(seen[seen.len() - 8], Outcome::New, "{}", case.name);
        // Nothing is lost on the way where one sector decides.
        let may_be_lost = case.name.contains("Straddling") || case.new.is_empty();
        assert!(may_be_lost || !seen.contains(&Outcome::Lost), "{}: {seen:?}", case.name);
    }
    assert!(cuts > 2000 && outcomes.iter().all(|count| *count > 50), "{cuts} {outcomes:?}");
}

#[test]
fn a_failure_of_every_write_leaves_no_wrong_bitmap_and_can_be_tried_again() {
    let sim = Sim::new(1, SimConfig::calm());
    let mut failures = 0;
    for case in cases() {
        for n in 0.. {
            let has_failed = sim.block_on(async {
                let (file, image) = case.begin().await;
                file.fail_one_after(Some(n));
                let result = case.change.apply(&*image, &case.new).await;
                if !file.has_failed() {
                    result.unwrap();
                    return false;
                }
                file.fail_one_after(None);
                let how = format!("request {n}: {result:?}");
                let found = stored(&file).await;
                case.judge(&found, &how);
                expect_leaks_at_most(&file).await;
                case.change.apply(&*image, &case.new).await.unwrap();
                image.close().await.unwrap();
                let found = stored(&file).await;
                let outcome = case.judge(&found, &format!("{how}, then again"));
                // A bitmap that is not there any more cannot be removed again.
                let may_be_lost = matches!(case.change, Change::Remove);
                assert!(outcome == Outcome::New || may_be_lost, "{} {how}: {found:?}", case.name);
                expect_leaks_at_most(&file).await;
                true
            });
            if !has_failed {
                break;
            }
            failures += 1;
        }
    }
    assert!(failures > 200, "{failures}");
}

//! Store, load, mark, remove and resize against a plain model.

use bds_core::ErrorKind;
use bds_core::driver::ZeroFlags;
use bds_drivers::format::qcow2::fuzzing::MemPort;
use bds_io::{Sim, SimConfig};
use bds_testkit::Chance;

use super::kit::{
    Model, Models, create, expect_clean, grow, load, open, open_read_only, store, store_of, stored,
    write,
};

fn calm() -> Sim {
    Sim::new(1, SimConfig::calm())
}

/// Changes the model as a session of a program would.
fn change(models: &mut Models, len: u64, chance: &mut Chance) {
    for number in 0..4 {
        let name = format!("bitmap {number}");
        if chance.one_in(4) {
            models.remove(&name);
        } else if chance.one_in(3) && !models.contains_key(&name) {
            let granularity = 1 << chance.between(9, 14);
            models.insert(name.clone(), Model::new(len, granularity));
        }
        let Some(model) = models.get_mut(&name) else { continue };
        if chance.one_in(2) {
            model.scribble(chance);
        }
        model.is_enabled ^= chance.one_in(5);
    }
}

/// A hundred sessions, each of which opens the image, changes bitmaps and data, and closes it.
#[test]
fn a_hundred_sessions_lose_and_invent_nothing() {
    for (seed, cluster, len) in
        [(1, 512, 8 << 20), (2, 4096, (24 << 20) + 512), (3, 65536, 512), (4, 65536, 3 << 20)]
    {
        let file = MemPort::default();
        create(&file, len, cluster);
        let mut chance = Chance::new(seed);
        let mut models = Models::new();
        calm().block_on(async {
            for session in 0..100 {
                let image = open(&file).await;
                assert_eq!(load(&*image).await, models, "seed {seed} session {session}");
                store_of(&*image).mark_in_use().await.unwrap();
                let before = models.clone();
                change(&mut models, len, &mut chance);
                for name in before.keys().filter(|name| !models.contains_key(*name)) {
                    if chance.one_in(2) {
                        store_of(&*image).remove(name).await.unwrap();
                    }
                }
                if chance.one_in(2) {
                    write(&*image, chance.below(len / 512) * 512, 512).await.unwrap();
                }
                store(&*image, &models).await.unwrap();
                image.close().await.unwrap();
                expect_clean(&file).await;
            }
        });
    }
}

/// What is as it was when it was loaded is not written again.
#[test]
fn a_session_that_changes_nothing_writes_nothing() {
    let file = MemPort::default();
    create(&file, 1 << 20, 4096);
    let mut models = Models::new();
    models.insert("a".into(), Model::new(1 << 20, 512));
    models.get_mut("a").unwrap().set(0..4096);
    calm().block_on(async {
        let image = open(&file).await;
        load(&*image).await;
        store(&*image, &models).await.unwrap();
        image.close().await.unwrap();
        let before = file.writes();
        let image = open(&file).await;
        assert_eq!(load(&*image).await, models);
        store(&*image, &models).await.unwrap();
        store_of(&*image).remove("b").await.unwrap();
        image.close().await.unwrap();
        assert_eq!(file.writes(), before);
    });
}

#[test]
fn bits_that_are_all_equal_take_no_space() {
    // 4096 bytes of bits a cluster: 16 MiB of disk at 512 bytes each.
    let len = 64 << 20;
    let file = MemPort::default();
    create(&file, len, 4096);
    let mut models = Models::new();
    models.insert("b".into(), Model::new(len, 512));
    let bitmap = |models: &mut Models, range| models.get_mut("b").unwrap().set(range);
    calm().block_on(async {
        let mut sizes = Vec::new();
        for range in [0..0, 16 << 20..48 << 20, 0..1] {
            bitmap(&mut models, range);
            let image = open(&file).await;
            load(&*image).await;
            store_of(&*image).mark_in_use().await.unwrap();
            store(&*image, &models).await.unwrap();
            image.close().await.unwrap();
            expect_clean(&file).await;
            assert_eq!(stored(&file).await, models);
            sizes.push(count_used(&file));
        }
        assert_eq!(sizes[1], sizes[0]);
        assert_eq!(sizes[2], sizes[0] + 1);
    });
}

/// Clusters with a refcount: the images here have one block of them, at cluster 2.
fn count_used(file: &MemPort) -> usize {
    let block = &file.bytes()[2 * 4096..3 * 4096];
    block.chunks_exact(2).filter(|count| *count != [0, 0]).count()
}

/// Every kind of change marks recording bitmaps first; a reader sees that they are of no use.
#[test]
fn the_first_change_marks_what_records_it() {
    for kind in ["write", "zero", "discard", "grow", "compressed"] {
        let file = MemPort::default();
        create(&file, 1 << 20, 4096);
        let mut models = Models::new();
        models.insert("on".into(), Model::new(1 << 20, 65536));
        models.insert("off".into(), Model { is_enabled: false, ..Model::new(1 << 20, 65536) });
        calm().block_on(async {
            let image = open(&file).await;
            load(&*image).await;
            write(&*image, 0, 4096).await.unwrap();
            store(&*image, &models).await.unwrap();
            image.close().await.unwrap();
            assert_eq!(stored(&file).await, models);
            let image = open(&file).await;
            load(&*image).await;
            assert_eq!(stored(&file).await, models, "opening alone changes nothing");
            file.fail_flushes(true);
            let flags = ZeroFlags::MAY_UNMAP;
            let data = || bds_io::Buf::from_slice(&[1; 4096]).iov();
            let change = || async {
                match kind {
                    "write" => write(&*image, 0, 512).await,
                    "zero" => image.write_zeroes(0, 4096, flags).await.map(|_| ()),
                    "discard" => image.discard(0, 4096).await.map(|_| ()),
                    "grow" => grow(&*image, 2 << 20).await,
                    _ => image.write_compressed(8192, data()).await,
                }
            };
            assert!(change().await.is_err(), "{kind}: went on before the mark was durable");
            file.fail_flushes(false);
            change().await.unwrap();
            let shown = stored(&file).await;
            assert_eq!(shown["on"].dirty, None, "{kind}");
            // The other one stays right, unless it is too short now.
            assert_eq!(shown["off"].dirty.is_none(), kind == "grow", "{kind}");
            drop(image);
        });
    }
}

/// After a store the next write marks again.
#[test]
fn a_store_in_the_middle_is_followed_by_another_mark() {
    let file = MemPort::default();
    create(&file, 1 << 20, 4096);
    let mut models = Models::new();
    models.insert("b".into(), Model::new(1 << 20, 65536));
    calm().block_on(async {
        let image = open(&file).await;
        load(&*image).await;
        for at in [0, 1 << 19, 1 << 18] {
            write(&*image, at, 512).await.unwrap();
            models.get_mut("b").unwrap().set(at..at + 512);
            store(&*image, &models).await.unwrap();
            assert_eq!(stored(&file).await, models);
            write(&*image, at, 512).await.unwrap();
            assert_eq!(stored(&file).await["b"].dirty, None);
        }
        // Another process that takes over from here sees what was stored last.
        store(&*image, &models).await.unwrap();
        image.inactivate().await.unwrap();
        assert_eq!(stored(&file).await, models);
        assert!(store_of(&*image).mark_in_use().await.is_err(), "the image is inactive");
        image.activate().await.unwrap();
        assert_eq!(load(&*image).await, models);
        write(&*image, 0, 512).await.unwrap();
        store(&*image, &models).await.unwrap();
        image.close().await.unwrap();
        expect_clean(&file).await;
    });
}

#[test]
fn inconsistent_bitmaps_stay_until_they_are_removed() {
    let file = MemPort::default();
    create(&file, 1 << 20, 4096);
    let mut models = Models::new();
    for name in ["a", "b"] {
        models.insert(name.into(), Model::new(1 << 20, 512));
        models.get_mut(name).unwrap().set(0..100_000);
    }
    calm().block_on(async {
        let image = open(&file).await;
        load(&*image).await;
        store(&*image, &models).await.unwrap();
        store_of(&*image).mark_in_use().await.unwrap();
        image.close().await.unwrap();
        let mut lost = stored(&file).await;
        assert!(lost.values().all(|model| model.dirty.is_none() && model.is_enabled), "{lost:?}");
        let image = open(&file).await;
        load(&*image).await;
        // They do not hold up a writer, but a disk that grows would leave them behind.
        write(&*image, 0, 512).await.unwrap();
        let error = grow(&*image, 2 << 20).await.unwrap_err();
        assert!(error.to_string().contains("'a', 'b'"), "{error}");
        lost.insert("c".into(), Model::new(1 << 20, 512));
        store(&*image, &lost).await.unwrap();
        assert_eq!(stored(&file).await, lost);
        store_of(&*image).remove("a").await.unwrap();
        lost.remove("a");
        assert_eq!(stored(&file).await, lost, "removed at once");
        store_of(&*image).remove("b").await.unwrap();
        grow(&*image, 2 << 20).await.unwrap();
        let mut grown = Models::new();
        grown.insert("c".into(), Model::new(2 << 20, 512));
        store(&*image, &grown).await.unwrap();
        image.close().await.unwrap();
        assert_eq!(stored(&file).await, grown);
        expect_clean(&file).await;
        let image = open(&file).await;
        load(&*image).await;
        store_of(&*image).remove("c").await.unwrap();
        image.close().await.unwrap();
        expect_clean(&file).await;
        assert_eq!(file.bytes()[95] & 1, 0, "no bitmaps, no bit");
        assert!(!file.bytes()[..4096].windows(4).any(|four| four == 0x2385_2875_u32.to_be_bytes()));
    });
}

#[test]
fn readers_load_and_cannot_change() {
    let file = MemPort::default();
    create(&file, 1 << 20, 4096);
    let mut models = Models::new();
    models.insert("b".into(), Model::new(1 << 20, 512));
    calm().block_on(async {
        let image = open(&file).await;
        load(&*image).await;
        store(&*image, &models).await.unwrap();
        image.close().await.unwrap();
        let image = open_read_only(&file).await;
        assert_eq!(load(&*image).await, models);
        let refused = |result: bds_core::error::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
        };
        refused(store_of(&*image).mark_in_use().await);
        refused(store_of(&*image).remove("b").await);
        refused(store(&*image, &Models::new()).await);
        store(&*image, &models).await.unwrap();
        image.close().await.unwrap();
    });
}

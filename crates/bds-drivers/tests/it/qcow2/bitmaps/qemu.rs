//! QEMU reads what we store, and we read what QEMU stores.

use std::path::Path;

use bds_drivers::format::qcow2::fuzzing::MemPort;
use bds_io::{Sim, SimConfig};
use bds_testkit::{Chance, Scratch, Tool, bitmap_sums, qemu_img, qemu_io, tool};
use serde_json::{Value, json};

use super::kit::{Model, Models, create, expect_clean, load, open, store, store_of, stored, write};

struct Qemu {
    img: Tool,
    io: Tool,
}

fn qemu() -> Option<Qemu> {
    tool("qemu-storage-daemon")?;
    Some(Qemu { img: qemu_img()?, io: qemu_io()? })
}

/// The sum that QEMU computes of a bitmap with these bits.
fn sum(model: &Model, scratch: &Scratch) -> String {
    let path = scratch.path("stream");
    std::fs::write(&path, model.stream()).unwrap();
    let output = Tool::at("/usr/bin/sha256sum").must([path]).stdout;
    output.split_whitespace().next().unwrap().to_owned()
}

/// Flags and granularity of each bitmap, as QEMU's `info` shows them.
fn shown(img: &Tool, path: &Path) -> Value {
    let info = img.must(["info".as_ref(), "--output=json".as_ref(), path.as_os_str()]).json();
    info["format-specific"]["data"]["bitmaps"].clone()
}

#[test]
fn qemu_reads_what_we_store() {
    let Some(qemu) = qemu() else { return };
    let scratch = Scratch::new();
    for (seed, cluster, len) in [
        (1, 512, 4 << 20),
        (2, 4096, (20 << 20) + 512),
        (3, 65536, 512),
        (4, 65536, 700 << 20),
        (5, 2 << 20, 30 << 20),
    ] {
        let mut chance = Chance::new(seed);
        let file = MemPort::default();
        create(&file, len, cluster);
        let mut models = Models::new();
        for number in 0..5 {
            let mut model =
                Model::new(len, 1 << chance.between(if seed == 4 { 12 } else { 9 }, 17));
            model.scribble(&mut chance);
            model.is_enabled = number % 2 == 0;
            models.insert(format!("b{number}"), model);
        }
        Sim::new(1, SimConfig::calm()).block_on(async {
            let image = open(&file).await;
            load(&*image).await;
            write(&*image, 0, 512).await.unwrap();
            store(&*image, &models).await.unwrap();
            image.close().await.unwrap();
            expect_clean(&file).await;
        });
        let path = scratch.path("ours.qcow2");
        std::fs::write(&path, file.bytes()).unwrap();
        qemu.img.must(["check".as_ref(), path.as_os_str()]);
        let names: Vec<&str> = models.keys().map(String::as_str).collect();
        let sums: Vec<String> = models.values().map(|model| sum(model, &scratch)).collect();
        assert_eq!(bitmap_sums(&path, &names), sums, "seed {seed}");
        let expected: Vec<Value> = models
            .iter()
            .map(|(name, model)| {
                let flags = if model.is_enabled { json!(["auto"]) } else { json!([]) };
                json!({"name": name, "granularity": model.granularity, "flags": flags})
            })
            .collect();
        assert_eq!(shown(&qemu.img, &path), json!(expected));
    }
}

/// QEMU opens the image for writing in between, as often as we do: bits are kept and added to on
/// both sides.
#[test]
fn bitmaps_go_back_and_forth() {
    let Some(qemu) = qemu() else { return };
    let scratch = Scratch::new();
    let path = scratch.path("both.qcow2");
    let len = 8_u64 << 20;
    let name = path.to_string_lossy().into_owned();
    qemu.img.must(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", &name, "8M"]);
    qemu.img.must(["bitmap", "--add", "-g", "512", &name, "fine"]);
    qemu.img.must(["bitmap", "--add", "-g", "64k", &name, "coarse"]);
    qemu.img.must(["bitmap", "--add", "--disable", &name, "off"]);
    let mut models = Models::new();
    models.insert("fine".into(), Model::new(len, 512));
    models.insert("coarse".into(), Model::new(len, 65536));
    models.insert("off".into(), Model { is_enabled: false, ..Model::new(len, 4096) });
    let granularity = shown(&qemu.img, &path)[2]["granularity"].as_u64().unwrap();
    models.get_mut("off").unwrap().granularity = u32::try_from(granularity).unwrap();
    models.get_mut("off").unwrap().dirty =
        Some(vec![false; usize::try_from(len / granularity).unwrap()]);
    let mut chance = Chance::new(11);
    for _ in 0..8 {
        let at = chance.below(len / 512 - 8) * 512;
        qemu.io.must(["-f", "qcow2", "-c", &format!("write {at} 4k"), &name]);
        let touch = |models: &mut Models, at: u64| {
            models.get_mut("fine").unwrap().set(at..at + 4096);
            models.get_mut("coarse").unwrap().set(at..at + 4096);
        };
        touch(&mut models, at);
        qemu.img.must(["bitmap", "--merge", "fine", &name, "off"]);
        let fine = models["fine"].clone();
        let off = models.get_mut("off").unwrap();
        for granule in (0..fine.dirty.as_ref().unwrap().len())
            .filter(|granule| fine.dirty.as_ref().unwrap()[*granule])
        {
            off.set(granule as u64 * 512..granule as u64 * 512 + 512);
        }
        let file = MemPort::new(std::fs::read(&path).unwrap());
        Sim::new(1, SimConfig::calm()).block_on(async {
            let image = open(&file).await;
            assert_eq!(load(&*image).await, models);
            let at = chance.below(len / 512 - 8) * 512;
            write(&*image, at, 4096).await.unwrap();
            touch(&mut models, at);
            store(&*image, &models).await.unwrap();
            image.close().await.unwrap();
            expect_clean(&file).await;
        });
        std::fs::write(&path, file.bytes()).unwrap();
        qemu.img.must(["check", &name]);
        let names: Vec<&str> = models.keys().map(String::as_str).collect();
        let sums: Vec<String> = models.values().map(|model| sum(model, &scratch)).collect();
        assert_eq!(bitmap_sums(&path, &names), sums);
    }
}

/// What each side marks "in use" is inconsistent for the other, and can be removed there.
#[test]
fn marks_are_understood_on_both_sides() {
    let Some(qemu) = qemu() else { return };
    let scratch = Scratch::new();
    let path = scratch.path("marked.qcow2");
    let name = path.to_string_lossy().into_owned();
    for has_backing in [false, true] {
        let base = scratch.path("base");
        qemu.img.must(["create", "-q", "-f", "qcow2", &base.to_string_lossy(), "1M"]);
        let backing = ["-b", &base.to_string_lossy(), "-F", "qcow2"].map(str::to_owned);
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        create.extend(backing.iter().filter(|_| has_backing).map(String::as_str));
        qemu.img.must([&create[..], &[&name, "1M"]].concat());
        // The extension is not there yet: cluster 0 is rewritten.
        let file = MemPort::new(std::fs::read(&path).unwrap());
        let len = 1 << 20;
        let mut models = Models::new();
        models.insert("b".into(), Model::new(len, 65536));
        models.insert("c".into(), Model::new(len, 65536));
        Sim::new(1, SimConfig::calm()).block_on(async {
            let image = super::kit::open_alone(&file).await;
            load(&*image).await;
            store(&*image, &models).await.unwrap();
            assert_eq!(stored(&file).await, models);
            store_of(&*image).mark_in_use().await.unwrap();
            image.close().await.unwrap();
            expect_clean(&file).await;
        });
        std::fs::write(&path, file.bytes()).unwrap();
        let info = qemu.img.must(["info", "--output=json", &name]).json();
        assert_eq!(info.get("backing-filename").is_some(), has_backing);
        assert_eq!(
            info["format-specific"]["data"]["bitmaps"][0]["flags"],
            json!(["in-use", "auto"])
        );
        assert!(!qemu.img.run(["bitmap", "--clear", &name, "b"]).ok());
        qemu.img.must(["bitmap", "--remove", &name, "b"]);
        qemu.img.must(["check", &name]);
        let file = MemPort::new(std::fs::read(&path).unwrap());
        Sim::new(1, SimConfig::calm()).block_on(async {
            let image = super::kit::open_alone(&file).await;
            let found = load(&*image).await;
            assert_eq!(found.len(), 1);
            assert_eq!(found["c"].dirty, None);
            store_of(&*image).remove("c").await.unwrap();
            image.close().await.unwrap();
            expect_clean(&file).await;
        });
        std::fs::write(&path, file.bytes()).unwrap();
        qemu.img.must(["check", &name]);
        let info = qemu.img.must(["info", "--output=json", &name]).json();
        assert_eq!(info["format-specific"]["data"].get("bitmaps"), None);
    }
}

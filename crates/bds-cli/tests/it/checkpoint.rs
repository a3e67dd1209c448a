//! `checkpoint`: overlays and bitmaps of several images in one change, all or nothing.

use bds_testkit::pattern;
use serde_json::Value;

use crate::workdir::Workdir;

const LEN: usize = 1 << 20;

/// Two images, `a.qcow2` and `b.qcow2`, with a bitmap `old` each.
fn workdir() -> Workdir {
    let workdir = Workdir::new();
    for (name, seed) in [("a", 1), ("b", 2)] {
        workdir.write(&format!("{name}.raw"), &pattern(seed, 0, LEN));
        workdir.must(&format!("convert -f raw -O qcow2 {name}.raw {name}.qcow2"));
        workdir.must(&format!("bitmap --add {name}.qcow2 old"));
        workdir.must(&format!("bench -w -c 1 -s 4096 -o 0 --pattern 9 {name}.qcow2"));
        workdir.must(&format!("convert -O raw {name}.qcow2 {name}.raw"));
    }
    workdir
}

fn info(workdir: &Workdir, name: &str) -> Value {
    workdir.must(&format!("info --output=json {name}")).json()
}

/// Names of the image's bitmaps, and whether they record.
fn bitmaps(workdir: &Workdir, name: &str) -> Vec<(String, bool)> {
    let info = info(workdir, name);
    let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let one = |bitmap: &Value| {
        let flags = bitmap["flags"].as_array().expect("a list");
        let name = bitmap["name"].as_str().expect("a name").to_owned();
        (name, flags.iter().any(|flag| flag == "auto"))
    };
    list.iter().map(one).collect()
}

#[test]
fn overlays_and_bitmaps_of_two_images_are_made_in_one_change() {
    let workdir = workdir();
    let words = "checkpoint --output=json --overlay a1.qcow2 --overlay b1.qcow2 --add-bitmap new \
                 --disable-bitmap old a.qcow2 b.qcow2";
    let made = workdir.must(words).json();
    let longest = made["longest-write-hold-ns"].as_u64().expect("nanoseconds");
    let holds = made["disks"].as_array().expect("two").iter();
    let holds: Vec<u64> = holds.map(|disk| disk["write-hold-ns"].as_u64().expect("ns")).collect();
    assert_eq!((holds.len(), holds.iter().max()), (2, Some(&longest)), "{made}");
    assert!(longest > 0);
    for name in ["a", "b"] {
        assert_eq!(bitmaps(&workdir, &format!("{name}.qcow2")), [("old".to_owned(), false)]);
        assert_eq!(bitmaps(&workdir, &format!("{name}1.qcow2")), [("new".to_owned(), true)]);
        let overlay = info(&workdir, &format!("{name}1.qcow2"));
        assert_eq!(overlay["backing-filename"], format!("{name}.qcow2"));
        workdir.must(&format!("compare -q {name}1.qcow2 {name}.raw"));
        workdir.must(&format!("check -q {name}1.qcow2"));
    }
    // The overlays note what is below them: the wrong one is refused.
    workdir.write("a.qcow2", &workdir.read("b.qcow2"));
    let refused = workdir.bds("compare -q a1.qcow2 a.raw");
    assert!(refused.stderr.contains("is not what this overlay was made on"), "{refused:?}");
}

#[test]
fn a_failure_on_one_image_changes_none() {
    let workdir = workdir();
    workdir.must("bitmap --remove b.qcow2 old");
    let before = (bitmaps(&workdir, "a.qcow2"), bitmaps(&workdir, "b.qcow2"));
    for words in [
        "--reset-bitmap old",
        "--add-bitmap new --remove-bitmap old",
        "--overlay a1.qcow2 --overlay b1.qcow2 --disable-bitmap old",
        "--overlay a1.qcow2 --overlay a1.qcow2",
        "--overlay a1.qcow2 --overlay b.raw",
        "--overlay a1.qcow2",
        "",
    ] {
        let failed = workdir.bds(&format!("checkpoint {words} a.qcow2 b.qcow2"));
        assert_eq!(failed.code, 1, "{words}: {failed:?}");
        assert_eq!((bitmaps(&workdir, "a.qcow2"), bitmaps(&workdir, "b.qcow2")), before, "{words}");
        for name in ["a1.qcow2", "b1.qcow2"] {
            assert!(!workdir.dir().join(name).exists(), "{words}: {name} is left");
        }
    }
    workdir.must("compare -q a.qcow2 a.raw");
}

#[test]
fn overlays_in_another_directory_record_the_path() {
    let workdir = workdir();
    std::fs::create_dir(workdir.dir().join("over")).expect("scratch is writable");
    let made = workdir.must("checkpoint --overlay over/a1.qcow2 a.qcow2").stdout;
    assert!(made.starts_with("Checkpoint of 1 image; longest write hold "), "{made}");
    let path = workdir.dir().join("a.qcow2");
    assert_eq!(info(&workdir, "over/a1.qcow2")["backing-filename"], path.to_str().expect("UTF-8"));
    workdir.must("compare -q over/a1.qcow2 a.raw");
}

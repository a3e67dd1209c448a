//! Tests `backup`: chains of increments, restored at every point; wrong bases, damage, kills.

use bds_core::bitmap::intent_log::Found;
use bds_io::{Fs, OpenOptions};
use bds_testkit::{Chance, pattern};

use crate::workdir::Workdir;

const LEN: usize = 4 << 20;

/// A disk of which the test knows the content at every backup.
struct Disk {
    workdir: Workdir,
    content: Vec<u8>,
    chance: Chance,
}

impl Disk {
    fn new(seed: u64) -> Self {
        let workdir = Workdir::new();
        let mut content = vec![0; LEN];
        content[..LEN / 2].copy_from_slice(&pattern(1, 0, LEN / 2));
        workdir.write("base.raw", &content);
        workdir.must("convert -f raw -O qcow2 base.raw disk.qcow2");
        Self { workdir, content, chance: Chance::new(seed) }
    }

    /// Writes some places of the disk, through the tool.
    fn change(&mut self) {
        for _ in 0..3 {
            let at =
                usize::try_from(self.chance.below(LEN as u64 / 512 - 64)).expect("small") * 512;
            let byte = u8::try_from(self.chance.below(256)).expect("below 256");
            self.content[at..at + 8192].fill(byte);
            let words = format!("bench -w -c 1 -s 8192 -o {at} --pattern {byte} disk.qcow2");
            self.workdir.must(&words);
        }
    }

    fn restored(&self, point: usize) -> Vec<u8> {
        self.workdir.must(&format!("backup restore -O raw --point {point} set out.raw"));
        let bytes = self.workdir.read("out.raw");
        std::fs::remove_file(self.workdir.dir().join("out.raw")).expect("it was made");
        bytes
    }
}

fn exists(disk: &Disk, name: &str) -> bool {
    disk.workdir.dir().join(name).exists()
}

#[test]
fn every_point_of_a_chain_of_increments_restores_byte_for_byte() {
    let mut disk = Disk::new(1);
    let mut contents = vec![disk.content.clone()];
    disk.workdir.must("backup run disk.qcow2 set");
    for _ in 0..4 {
        disk.change();
        contents.push(disk.content.clone());
        let text = disk.workdir.must("backup run disk.qcow2 set").stdout;
        assert!(text.contains("(incremental)"), "{text}");
    }
    for (index, content) in contents.iter().enumerate() {
        assert!(disk.restored(index + 1) == *content, "point {}", index + 1);
    }
    disk.workdir.must("backup verify set");
    let listed = disk.workdir.must("backup list set").stdout;
    assert_eq!(listed.lines().count(), 6, "{listed}");
    assert_eq!(disk.workdir.must("check disk.qcow2").code, 0);
}

#[test]
fn increments_hold_only_what_changed() {
    let mut disk = Disk::new(2);
    disk.workdir.must("backup run disk.qcow2 set");
    disk.change();
    disk.workdir.must("backup run -c disk.qcow2 set");
    let full = disk.workdir.read("set/000001.qcow2").len();
    let increment = disk.workdir.read("set/000002.qcow2").len();
    assert!(increment < full / 3, "{increment} of {full}");
}

#[test]
fn another_disk_or_a_lost_bitmap_is_refused_and_or_full_helps() {
    let disk = Disk::new(3);
    disk.workdir.must("backup run disk.qcow2 set");
    disk.workdir.write("other.raw", &pattern(9, 0, LEN));
    disk.workdir.must("convert -f raw -O qcow2 other.raw other.qcow2");
    let output = disk.workdir.bds("backup run other.qcow2 set");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("it is another disk"), "{}", output.stderr);
    assert_eq!(disk.workdir.must("backup list set").stdout.lines().count(), 2);
    let output = disk.workdir.must("backup run --or-full other.qcow2 set");
    assert!(output.stdout.contains("point 2 (full)"), "{}", output.stdout);
    assert!(disk.restored(2) == pattern(9, 0, LEN));
}

#[test]
fn a_replaced_base_is_found_before_anything_is_restored() {
    let mut disk = Disk::new(4);
    disk.workdir.must("backup run disk.qcow2 set");
    disk.change();
    disk.workdir.must("backup run disk.qcow2 set");
    disk.workdir.must("backup run --full disk.qcow2 other");
    for name in ["000001.qcow2", "000001.manifest"] {
        let bytes = disk.workdir.read(&format!("other/{name}"));
        disk.workdir.write(&format!("set/{name}"), &bytes);
    }
    let output = disk.workdir.bds("backup restore set out.qcow2");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("the increment was made on"), "{}", output.stderr);
    assert!(!exists(&disk, "out.qcow2"));
}

#[test]
fn damage_is_found_and_nothing_is_restored_from_it() {
    let mut disk = Disk::new(5);
    disk.workdir.must("backup run disk.qcow2 set");
    disk.change();
    disk.workdir.must("backup run disk.qcow2 set");
    let mut image = disk.workdir.read("set/000001.qcow2");
    let at = image.len() - 70_000;
    image[at] ^= 1;
    disk.workdir.write("set/000001.qcow2", &image);
    let output = disk.workdir.bds("backup verify --point 1 set");
    assert_eq!(output.code, 2, "{}", output.stderr);
    let output = disk.workdir.bds("backup restore --point 1 set out.qcow2");
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(output.stderr.contains("nothing was restored"), "{}", output.stderr);
    assert!(!exists(&disk, "out.qcow2"));
}

#[test]
fn what_a_killed_run_left_is_removed() {
    let mut disk = Disk::new(6);
    disk.workdir.must("backup run disk.qcow2 set");
    disk.workdir.write("set/000002.qcow2.partial", b"half an image");
    disk.workdir.write("set/notes.partial", b"of another program");
    disk.change();
    disk.workdir.must("backup run disk.qcow2 set");
    assert!(!exists(&disk, "set/000002.qcow2.partial"));
    assert!(exists(&disk, "set/notes.partial"));
    assert!(disk.restored(2) == disk.content);
    // The bitmaps of older points are removed; the newest is there.
    let info = disk.workdir.must("info --output=json disk.qcow2").stdout;
    assert_eq!(info.matches("\"name\": \"bds-").count(), 2, "{info}");
    disk.workdir.must("backup run disk.qcow2 set");
    let info = disk.workdir.must("info --output=json disk.qcow2").stdout;
    assert_eq!(info.matches("\"name\": \"bds-").count(), 2, "{info}");
}

/// The bitmap of a raw disk is in a file beside it.
#[test]
fn a_raw_disk_is_backed_up_incrementally() {
    let mut disk = Disk::new(7);
    disk.workdir.must("backup run -f raw base.raw set");
    assert!(exists(&disk, "base.raw.bds-cbt"));
    disk.content[70_000..71_000].fill(9);
    disk.workdir.must("bench -w -f raw -c 1 -s 1000 -o 70000 --pattern 9 base.raw");
    let output = disk.workdir.must("backup run -f raw base.raw set");
    assert!(output.stdout.contains("point 2 (incremental)"), "{}", output.stdout);
    assert!(disk.restored(2) == disk.content);
    let increment = disk.workdir.read("set/000002.qcow2").len();
    assert!(increment < 700_000, "{increment} bytes for one block");
    // Another program writes to it: all is copied, nothing is missed.
    disk.content[9000..9004].fill(1);
    disk.workdir.write("base.raw", &disk.content);
    let output = disk.workdir.must("backup run -f raw base.raw set");
    assert!(output.stdout.contains("point 3 (incremental)"), "{}", output.stdout);
    assert!(disk.restored(3) == disk.content);
}

#[test]
fn a_raw_disk_without_a_bitmap_is_backed_up_in_full() {
    let disk = Disk::new(7);
    let image = "--image-opts driver=raw,bitmap-file=off,file.driver=file,file.filename=base.raw";
    let output = disk.workdir.must(&format!("backup run {image} set"));
    assert!(output.stderr.contains("keeps no bitmap"), "{}", output.stderr);
    let output = disk.workdir.bds("backup run -f raw base.raw set");
    assert_eq!(output.code, 1);
    disk.workdir.must("backup run --full --no-bitmap -f raw base.raw set");
    assert!(disk.restored(2) == disk.content);
}

/// Number of regions in the write-intent log of `disk`; 0 if it has none.
fn logged_regions(workdir: &Workdir) -> usize {
    let path = workdir.dir().join("disk.bds-cbt");
    bds_io::block_on(async {
        let Ok(file) = Fs::Host.open(&path, &OpenOptions::default()) else { return 0 };
        // It may be in the middle of a change.
        Found::read(&file).await.ok().flatten().map_or(0, |found| found.regions.len())
    })
}

/// Scenario 37 with real processes: a writer is killed at some point, the bitmap is found again,
/// and the increment restores what the disk shows.
fn killed_writers_lose_no_increment(format: &str) {
    let workdir = Workdir::new();
    workdir.must(&format!("create -q -f {format} disk 64M"));
    workdir.must(&format!("backup run -f {format} disk set"));
    let mut chance = Chance::new(37);
    for round in 1..=6_u64 {
        let offset = chance.below(30) << 20;
        let words = format!(
            "bench -q -w -f {format} -c 100000000 -d 4 -s 4096 -S 1052672 -o {offset} --pattern {round} disk"
        );
        let args: Vec<&str> = words.split(' ').collect();
        let mut writer = workdir.command(&args).spawn().expect("the tool runs");
        let wanted = 1 + usize::try_from(chance.below(6)).expect("small");
        while logged_regions(&workdir) < wanted {
            let ended = writer.try_wait().expect("it is a child");
            assert!(ended.is_none(), "the writer ended: {ended:?}");
            std::thread::yield_now();
        }
        // SIGKILL.
        writer.kill().expect("it writes for ever");
        writer.wait().expect("it was killed");
        let info = workdir.must(&format!("info -f {format} --output=json disk")).stdout;
        assert!(!info.contains("inconsistent"), "{info}");
        assert!(info.contains("recovered-bytes"), "{info}");
        let output = workdir.must(&format!("backup run -f {format} disk set"));
        let wanted = format!("point {} (incremental)", round + 1);
        assert!(output.stdout.contains(&wanted), "{}", output.stdout);
        workdir.must(&format!("convert -f {format} -O raw disk now.raw"));
        workdir.must("backup restore -O raw set out.raw");
        assert!(workdir.read("now.raw") == workdir.read("out.raw"), "{format} round {round}");
        std::fs::remove_file(workdir.dir().join("out.raw")).expect("it was made");
    }
}

#[test]
fn scenario_37_a_killed_writer_of_a_raw_disk_loses_no_increment() {
    killed_writers_lose_no_increment("raw");
}

#[test]
fn scenario_37_a_killed_writer_of_a_qcow2_disk_loses_no_increment() {
    killed_writers_lose_no_increment("qcow2");
}

#[test]
fn pruning_makes_the_oldest_point_that_is_kept_a_full_one() {
    let mut disk = Disk::new(8);
    let mut contents = vec![disk.content.clone()];
    disk.workdir.must("backup run disk.qcow2 set");
    for _ in 0..3 {
        disk.change();
        contents.push(disk.content.clone());
        disk.workdir.must("backup run disk.qcow2 set");
    }
    assert_eq!(disk.workdir.bds("backup prune --keep 0 set").code, 1);
    disk.workdir.must("backup prune --keep 2 set");
    let listed = disk.workdir.must("backup list set").stdout;
    assert!(listed.contains("000003  full") && !listed.contains("000002"), "{listed}");
    assert!(!exists(&disk, "set/000001.qcow2"));
    disk.workdir.must("backup verify set");
    for point in [3, 4] {
        assert!(disk.restored(point) == contents[point - 1], "point {point}");
    }
    disk.change();
    disk.workdir.must("backup run disk.qcow2 set");
    assert!(disk.restored(5) == disk.content);
    disk.workdir.must("backup prune --keep 9 set");
    assert_eq!(disk.workdir.must("backup list set").stdout.lines().count(), 4);
}

#[test]
fn only_names_of_six_digits_are_points_and_the_last_one_is_the_last() {
    let disk = Disk::new(9);
    disk.workdir.must("backup run disk.qcow2 set");
    let manifest = disk.workdir.read("set/000001.manifest");
    for name in ["set/4294967295.manifest", "set/+00003.manifest", "set/notes.manifest"] {
        disk.workdir.write(name, &manifest);
    }
    assert_eq!(disk.workdir.must("backup list set").stdout.lines().count(), 2);
    disk.workdir.write("set/999999.manifest", &manifest);
    let output = disk.workdir.bds("backup run --full disk.qcow2 set");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("begin another one"), "{}", output.stderr);
}

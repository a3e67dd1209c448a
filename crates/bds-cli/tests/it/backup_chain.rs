//! Long chains of increments: a full backup and twenty increments, across restarts and kills, with
//! bds and QEMU as writers in turn; and QEMU's increments by bitmaps that bds has continued.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use bds_testkit::{Chance, pattern, qemu_img, qemu_io, run_daemon_job, tool};
use serde_json::{Value, json};

use crate::workdir::Workdir;

const LEN: usize = 4 << 20;
/// Increments on the full backup.
const INCREMENTS: u64 = 20;

/// A disk, and what it showed at each of its points.
struct History {
    workdir: Workdir,
    points: Vec<Vec<u8>>,
    chance: Chance,
}

impl History {
    fn new(seed: u64) -> Self {
        let workdir = Workdir::new();
        let mut content = pattern(1, 0, LEN);
        content[LEN / 2..].fill(0);
        workdir.write("base.raw", &content);
        workdir.must("convert -f raw -O qcow2 base.raw disk.qcow2");
        Self { workdir, points: Vec::new(), chance: Chance::new(seed) }
    }

    /// A range in whole sectors.
    fn range(&mut self) -> (u64, u64) {
        let len = 512 * (1 + self.chance.below(64));
        (512 * self.chance.below((LEN as u64 - len) / 512), len)
    }

    fn byte(&mut self) -> u64 {
        1 + self.chance.below(255)
    }

    fn write_by_bds(&mut self) {
        for _ in 0..2 {
            let ((at, len), byte) = (self.range(), self.byte());
            let words = format!("bench -w -c 1 -s {len} -o {at} --pattern {byte} disk.qcow2");
            self.workdir.must(&words);
        }
    }

    /// Writes data, zeros and discards.
    fn write_by_qemu(&mut self) {
        let io = qemu_io().expect("it was looked for");
        let (data, zeros, gone) = (self.range(), self.range(), self.range());
        let commands = [
            format!("write -P {} {} {}", self.byte(), data.0, data.1),
            format!("write -z {} {}", zeros.0, zeros.1),
            format!("discard {} {}", gone.0, gone.1),
        ];
        let disk = self.workdir.dir().join("disk.qcow2");
        let disk = disk.to_str().expect("scratch paths are UTF-8");
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        args.push(disk);
        io.must(args);
    }

    /// What the disk shows now.
    fn content(&self) -> Vec<u8> {
        self.workdir.must("convert -O raw disk.qcow2 now.raw");
        self.workdir.read("now.raw")
    }

    /// Makes the next point; returns what was printed.
    fn backup(&mut self, options: &str) -> String {
        let content = self.content();
        self.points.push(content);
        let made = self.workdir.must(&format!("backup run {options} disk.qcow2 set"));
        made.stdout + &made.stderr
    }

    fn check_all(&self) {
        for (number, content) in (1..).zip(&self.points) {
            self.workdir.must(&format!("backup restore -q -O raw --point {number} set out.raw"));
            assert!(self.workdir.read("out.raw") == *content, "point {number}");
            std::fs::remove_file(self.workdir.dir().join("out.raw")).expect("it was made");
        }
        self.workdir.must("backup verify -q set");
        // A kill leaves leaks at most.
        let checked = self.workdir.bds("check -q disk.qcow2");
        assert!(matches!(checked.code, 0 | 3), "{checked:?}");
    }
}

/// Starts bds and kills it once the condition holds, or lets it end before.
fn kill(workdir: &Workdir, words: &str, has_begun: impl Fn(&Path) -> bool) {
    let args: Vec<&str> = words.split(' ').collect();
    let mut command = workdir.command(&args);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child: Child = command.spawn().expect("bds starts");
    while child.try_wait().expect("it is ours").is_none() && !has_begun(workdir.dir()) {
        std::thread::sleep(Duration::from_millis(2));
    }
    // Fails if it has ended by itself: what follows holds for that as well.
    let _killed = child.kill();
    child.wait().expect("it is ours");
}

/// Options that open an image so slowly that a kill finds the program at work.
fn slow(image: &str) -> String {
    format!(
        "driver=qcow2,file.driver=throttle,file.limits.iops-total=60,file.file.driver=file,\
         file.file.filename={image}"
    )
}

/// Every command is a process of its own: each point is one restart further.
#[test]
fn a_full_backup_and_twenty_increments_restore_at_every_point_across_kills() {
    let mut disk = History::new(1);
    disk.backup("");
    for number in 2..=INCREMENTS + 1 {
        disk.write_by_bds();
        match number {
            // The backup is killed while it copies, and made again.
            8 => {
                let words = format!("backup run --image-opts {} set", slow("disk.qcow2"));
                kill(&disk.workdir, &words, |dir| dir.join("set/000008.qcow2.partial").exists());
                if disk.workdir.dir().join("set/000008.manifest").exists() {
                    let content = disk.content();
                    disk.points.push(content);
                    continue;
                }
                let made = disk.backup("");
                assert!(made.contains("point 8 (incremental)"), "{made}");
            }
            // The writer is killed: its bitmap may be lost, no byte may be.
            14 => {
                let before = disk.workdir.read("disk.qcow2");
                let options = slow("disk.qcow2");
                let words = format!("bench -w -c 9999 -s 4096 --pattern 7 --image-opts {options}");
                kill(&disk.workdir, &words, |dir| {
                    std::fs::read(dir.join("disk.qcow2")).is_ok_and(|now| now != before)
                });
                disk.backup("--or-full");
            }
            _ => {
                let made = disk.backup("");
                assert!(made.contains(&format!("point {number} (incremental)")), "{made}");
            }
        }
    }
    assert_eq!(disk.workdir.must("backup list set").stdout.lines().count(), 22);
    disk.check_all();
    // The restored image, and the backup itself, are images for every tool.
    if qemu_img().is_some() {
        disk.workdir.must_qemu("convert -O raw set/000021.qcow2 out.raw");
        assert!(disk.workdir.read("out.raw") == disk.points[20]);
    }
    disk.workdir.must("backup prune -q --keep 4 set");
    disk.workdir.must("backup verify -q set");
    for number in 18..=21 {
        disk.workdir.must(&format!("backup restore -q -O raw --point {number} set {number}.raw"));
        let expected = &disk.points[number - 1];
        assert!(disk.workdir.read(&format!("{number}.raw")) == *expected, "point {number}");
    }
}

/// Killed while it copies the first disk or the second, a backup of two leaves the points before;
/// the next one makes increments of both.
#[test]
fn a_killed_backup_of_two_disks_is_made_again() {
    let workdir = Workdir::new();
    let names = ["data", "log"];
    for (name, seed) in names.iter().zip(1..) {
        workdir.write("base.raw", &pattern(seed, 0, LEN));
        workdir.must(&format!("convert -f raw -O qcow2 base.raw {name}.qcow2"));
    }
    workdir.must("backup run -q data.qcow2 log.qcow2 set");
    let contents = |workdir: &Workdir| {
        names.map(|name| {
            workdir.must(&format!("convert -O raw {name}.qcow2 now.raw"));
            workdir.read("now.raw")
        })
    };
    let mut points = vec![contents(&workdir)];
    for (copied, number) in names.iter().zip(2..) {
        for name in names {
            let words = format!("bench -w -c 9 -s 4096 -S 262144 --pattern {number} {name}.qcow2");
            workdir.must(&words);
        }
        points.push(contents(&workdir));
        let (data, log) = (slow("data.qcow2"), slow("log.qcow2"));
        let words = format!("backup run --image-opts --name data --name log {data} {log} set");
        let partial = format!("set/{copied}/{number:06}.qcow2.partial");
        kill(&workdir, &words, |dir| dir.join(&partial).exists());
        let is_made = workdir.dir().join(format!("set/{number:06}.point")).exists();
        if !is_made {
            workdir.must("backup run -q data.qcow2 log.qcow2 set");
        }
        for name in names {
            let listed = workdir.must(&format!("backup list set/{name}")).stdout;
            let line = format!("{number:06}  incremental");
            assert!(listed.contains(&line) && !listed.contains("000004"), "{name}: {listed}");
        }
    }
    for (number, disks) in (1..).zip(&points) {
        workdir.must(&format!("backup restore -q -O raw --point {number} set out{number}"));
        for (name, content) in names.iter().zip(disks) {
            let restored = workdir.read(&format!("out{number}/{name}.raw"));
            assert!(restored == *content, "{name} at {number}");
        }
    }
    workdir.must("backup verify -q set");
}

#[test]
fn qemu_continues_the_bitmaps_of_our_backups() {
    if qemu_io().is_none() || qemu_img().is_none() {
        return;
    }
    let mut disk = History::new(2);
    disk.backup("");
    for number in 2..=INCREMENTS + 1 {
        match number % 3 {
            0 => disk.write_by_bds(),
            1 => disk.write_by_qemu(),
            _ => {
                disk.write_by_qemu();
                disk.write_by_bds();
            }
        }
        disk.workdir.must_qemu("check -q disk.qcow2");
        let made = disk.backup("");
        assert!(made.contains(&format!("point {number} (incremental)")), "{made}");
    }
    disk.check_all();
}

/// QEMU adds a bitmap; bds writes, and the bitmap says so; QEMU makes the increment by it and
/// clears it; and so on.
#[test]
fn qemu_makes_increments_by_bitmaps_that_we_have_continued() {
    if qemu_io().is_none() || qemu_img().is_none() || tool("qemu-storage-daemon").is_none() {
        return;
    }
    let mut disk = History::new(3);
    disk.workdir.must_qemu("convert -O qcow2 disk.qcow2 inc0.qcow2");
    disk.workdir.must_qemu("bitmap --add disk.qcow2 q");
    for number in 1..=6 {
        disk.write_by_bds();
        if number % 2 == 0 {
            disk.write_by_qemu();
            disk.write_by_bds();
        }
        let (last, name) = (format!("inc{}.qcow2", number - 1), format!("inc{number}.qcow2"));
        disk.workdir.must_qemu(&format!("create -q -f qcow2 -b {last} -F qcow2 {name}"));
        let open = |node: &str, file: &str| {
            let path = disk.workdir.dir().join(file);
            let file = json!({"driver": "file", "filename": path});
            let node = json!({"driver": "qcow2", "node-name": node, "file": file});
            json!({"execute": "blockdev-add", "arguments": node})
        };
        let job: Value = json!({
            "job-id": "job", "device": "disk", "target": "target", "sync": "incremental",
            "bitmap": "q", "auto-dismiss": false,
        });
        let job = json!({"execute": "blockdev-backup", "arguments": job});
        run_daemon_job(&[open("disk", "disk.qcow2"), open("target", &name), job], "job");
        let content = disk.content();
        disk.workdir.must(&format!("convert -O raw {name} out.raw"));
        assert!(disk.workdir.read("out.raw") == content, "increment {number}");
        disk.points.push(content);
    }
    // Its increments hold no more than what was written.
    assert!(disk.workdir.read("inc6.qcow2").len() < LEN / 2);
}

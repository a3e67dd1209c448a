//! Images, nodes and commands of the benches of jobs.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::images;
use super::stage::Stage;
use crate::run::output;

/// Bytes of the disks; of a null device too (`crates/bds-jobs/examples/jobs/disks.rs`).
pub(super) const LEN: u64 = 1 << 30;
/// Overlays of the chain.
const LAYERS: usize = 100;

/// Which job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Backup,
    Mirror,
    Stream,
    Commit,
    Active,
    Chain,
}

impl Kind {
    /// Its word in our program.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Mirror => "mirror",
            Self::Stream => "stream",
            Self::Commit => "commit",
            Self::Active => "active",
            Self::Chain => "chain",
        }
    }

    pub(super) fn needs_complete(self) -> bool {
        matches!(self, Self::Mirror | Self::Active)
    }

    /// The node that the guest uses.
    pub(super) fn guest(self) -> String {
        match self {
            Self::Backup | Self::Mirror => "src".into(),
            Self::Stream | Self::Commit => "top".into(),
            Self::Active => "mid".into(),
            Self::Chain => format!("layer{LAYERS}"),
        }
    }

    /// The daemon's command.
    pub(super) fn command(self) -> (&'static str, Value) {
        let job = |more: Value| {
            let mut all = json!({"job-id": "job0", "auto-dismiss": false});
            for (key, value) in more.as_object().into_iter().flatten() {
                all[key] = value.clone();
            }
            all
        };
        match self {
            Self::Backup => {
                ("blockdev-backup", job(json!({"device": "src", "target": "dst", "sync": "full"})))
            }
            Self::Mirror => {
                ("blockdev-mirror", job(json!({"device": "src", "target": "dst", "sync": "full"})))
            }
            Self::Stream => ("block-stream", job(json!({"device": "top"}))),
            Self::Commit => (
                "block-commit",
                job(json!({"device": "top", "top-node": "mid", "base-node": "base"})),
            ),
            Self::Active => ("block-commit", job(json!({"device": "mid", "base-node": "base"}))),
            Self::Chain => {
                let (device, top) = (format!("layer{LAYERS}"), format!("layer{}", LAYERS - 1));
                let words = json!({"device": device, "top-node": top, "base-node": "base"});
                ("block-commit", job(words))
            }
        }
    }
}

/// Makes the images of a case anew, from the dense one.
pub(super) fn make(stage: &Stage, dir: &Path, kind: Kind) -> Result<(), String> {
    images::dense(stage, "dense", LEN)?;
    let dense = stage.dir.join("dense.qcow2");
    let place = |name: &str| dir.join(format!("{name}.qcow2"));
    // Written back before the run, not during it.
    let copy = |name: &str| {
        let copied = std::fs::copy(&dense, place(name)).and_then(|_| File::open(place(name)));
        copied.and_then(|file| file.sync_all()).map_err(|e| format!("{name}: {e}"))
    };
    let create = |name: &str, backing: Option<&str>| {
        let mut command = Command::new(&stage.bds);
        command.current_dir(dir).args(["create", "-q", "-f", "qcow2"]);
        if let Some(backing) = backing {
            command.args(["-F", "qcow2", "-b", &format!("{backing}.qcow2")]);
        }
        output(command.arg(place(name)).arg(LEN.to_string())).map(drop)
    };
    match kind {
        Kind::Backup | Kind::Mirror => {
            copy("src")?;
            create("dst", None)?;
        }
        Kind::Stream => {
            copy("base")?;
            create("top", Some("base"))?;
        }
        Kind::Commit | Kind::Active => {
            create("base", None)?;
            copy("mid")?;
            create("top", Some("mid"))?;
        }
        Kind::Chain => {
            copy("base")?;
            chain(stage, dir, create)?;
        }
    }
    Ok(())
}

/// Layers with 4 MiB of data each, at places of their own.
fn chain(
    stage: &Stage,
    dir: &Path,
    create: impl Fn(&str, Option<&str>) -> Result<(), String>,
) -> Result<(), String> {
    let mut below = "base".to_owned();
    for index in 1..=LAYERS {
        let name = format!("layer{index}");
        create(&name, Some(&below))?;
        let words = ["bench", "-q", "-w", "-f", "qcow2", "-s", "65536", "-c", "64", "-d", "8"];
        let offset = (index * 8) << 20;
        let mut command = Command::new(&stage.bds);
        command.current_dir(dir).args(words).args(["-o", &offset.to_string()]);
        output(command.arg(format!("{name}.qcow2")))?;
        below = name;
    }
    Ok(())
}

/// The daemon's nodes, in the order in which they are added; `is_cached`: with the page cache of
/// the host.
pub(super) fn nodes(dir: &Path, kind: Kind, latency_ms: u32, is_cached: bool) -> Vec<Value> {
    let image = |name: &str, backing: Value| image(dir, name, backing, is_cached);
    let slow = |name: &str| {
        json!({
            "driver": "null-co", "node-name": name, "size": LEN,
            "latency-ns": u64::from(latency_ms) * 1_000_000, "read-zeroes": false,
        })
    };
    let base = || if latency_ms > 0 { slow("base") } else { image("base", Value::Null) };
    match kind {
        Kind::Backup | Kind::Mirror if latency_ms > 0 => {
            vec![slow("src"), image("dst", Value::Null)]
        }
        Kind::Backup | Kind::Mirror => vec![image("src", Value::Null), image("dst", Value::Null)],
        Kind::Stream => vec![base(), image("top", json!("base"))],
        Kind::Commit => vec![base(), image("mid", json!("base")), image("top", json!("mid"))],
        Kind::Active => vec![base(), image("mid", json!("base"))],
        Kind::Chain => {
            let mut below = "base".to_owned();
            let mut all = vec![base()];
            for index in 1..=LAYERS {
                let name = format!("layer{index}");
                all.push(image(&name, json!(below)));
                below = name;
            }
            all
        }
    }
}

fn image(dir: &Path, name: &str, backing: Value, is_cached: bool) -> Value {
    let path = dir.join(format!("{name}.qcow2"));
    // A base is opened read-only, as libvirt does: a commit then makes it writable and read-only
    // again, and that flushes it.
    let is_read_only = name == "base";
    json!({
        "driver": "qcow2", "node-name": name, "backing": backing, "discard": "unmap",
        "read-only": is_read_only, "auto-read-only": false,
        "file": {
            "driver": "file", "filename": path, "discard": "unmap", "aio": if is_cached { "threads" } else { "native" },
            "cache": {"direct": !is_cached},
        },
    })
}

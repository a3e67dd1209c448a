//! Changes options of qcow2 images (`amend`): beside QEMU, at every power cut, fault and cancel.
//!
//! Images with internal snapshots are made by QEMU's tools, as nothing here makes snapshots.

mod like_qemu;
mod rules;
mod sweeps;

use bds_core::driver::Amendment;
use bds_core::graph::Graph;
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::Sim;
use bds_testkit::{Scratch, Tool};
use serde_json::{Value, json};

use crate::kit::{filled, trusting_graph};

const IMAGE: &str = "/disk.qcow2";
/// Files that an image may consist of, by their names on the host. A data file has its whole path,
/// as QEMU looks for other names in its working directory.
const FILES: [&str; 2] = ["disk.qcow2", "base.raw"];

fn graph(sim: &Sim) -> Graph {
    trusting_graph(sim.fs())
}

async fn open(graph: &Graph, read_only: bool) -> Result<Backend> {
    let options = json!({
        "driver": "qcow2", "node-name": "disk", "read-only": read_only,
        "file": {"driver": "file", "filename": IMAGE},
    });
    let node = graph.open(Options::from_json(options)?).await?;
    let writable = !read_only;
    Backend::new(&node, BackendOptions { name: "user".into(), writable, ..Default::default() })
}

fn amendment(options: &str) -> Amendment {
    Amendment::new(Options::parse(options).unwrap())
}

async fn contents(disk: &Backend) -> Vec<u8> {
    let len = usize::try_from(disk.len()).unwrap();
    let iov = filled(0xee, disk.len());
    disk.read(0, iov.clone()).await.unwrap();
    let mut bytes = vec![0; len];
    iov.copy_to(0, &mut bytes);
    bytes
}

/// What `info` says of the format, without what an open node adds.
async fn format_data(disk: &Backend) -> Value {
    disk.info().await.unwrap().format_specific.unwrap()["data"].clone()
}

async fn close(graph: &Graph, disk: Backend) {
    drop(disk);
    graph.shutdown().await.check_leaks().unwrap();
}

/// An image on the host, made by QEMU's tools.
struct HostImage {
    scratch: Scratch,
    /// The data file.
    data: Option<String>,
}

impl HostImage {
    /// `create`: options of create, with a backing file or data file of the names in [`FILES`].
    fn new(img: &Tool, create: &str, len: &str) -> Self {
        let scratch = Scratch::new();
        if create.contains("base.raw") {
            let base = bds_testkit::pattern(9, 0, 150_000);
            std::fs::write(scratch.path("base.raw"), base).unwrap();
        }
        let mut this = Self { scratch, data: None };
        let path = this.path("data.raw");
        let with_path = create.replace("data_file=data.raw", &format!("data_file={path}"));
        this.data = (with_path != create).then_some(path);
        let image = this.image();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !create.is_empty() {
            args.extend(["-o", &with_path]);
        }
        args.extend([&*image, len]);
        img.must(args);
        this
    }

    fn path(&self, name: &str) -> String {
        self.scratch.path(name).to_str().unwrap().to_owned()
    }

    fn image(&self) -> String {
        self.path("disk.qcow2")
    }

    /// Runs commands of qemu-io.
    fn io(&self, io: &Tool, commands: &[&str]) {
        let mut args = vec!["-d", "unmap"];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        let image = self.image();
        args.push(&image);
        io.must(args);
    }

    fn snapshot(&self, img: &Tool, name: &str) {
        img.must(["snapshot", "-c", name, &self.image()]);
    }

    /// A simulated disk with it.
    fn sim(&self, seed: u64) -> Sim {
        let sim = Sim::new(seed, bds_io::SimConfig::calm());
        for name in FILES {
            if std::path::Path::new(&self.path(name)).exists() {
                sim.import(self.path(name), format!("/{name}")).unwrap();
            }
        }
        if let Some(data) = &self.data {
            sim.import(data, data).unwrap();
        }
        sim
    }

    /// The files of a simulated disk on the host.
    fn of_sim(sim: &Sim) -> Self {
        let scratch = Scratch::new();
        for name in FILES {
            if sim.exists(format!("/{name}")) {
                sim.export(format!("/{name}"), scratch.path(name)).unwrap();
            }
        }
        Self { scratch, data: None }
    }

    /// Uses the data file of `other`.
    fn with_data_of(self, other: &Self) -> Self {
        Self { data: other.data.clone(), ..self }
    }

    /// The bytes of the disk, or of a snapshot.
    fn read(&self, img: &Tool, snapshot: Option<&str>) -> Vec<u8> {
        let (image, out) = (self.image(), self.path("out.raw"));
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        if let Some(name) = snapshot {
            args.extend(["-l", name]);
        }
        args.extend([&*image, &*out]);
        img.must(args);
        std::fs::read(out).unwrap()
    }

    /// Exit code of `qemu-img check`: 0 clean, 3 leaks.
    fn check(&self, img: &Tool) -> (i32, String) {
        let out = img.run(["check", "-f", "qcow2", &self.image()]);
        (out.code, format!("{}{}", out.stdout, out.stderr))
    }

    fn format_data(&self, img: &Tool) -> Value {
        let info = img.must(["info", "--output=json", &self.image()]).json();
        info["format-specific"]["data"].clone()
    }
}

/// An image of two snapshots with all kinds of clusters: data and zeros, with and without a
/// cluster, shared by snapshots or not, in shared L2 tables and own ones.
fn with_snapshots(img: &Tool, io: &Tool, create: &str) -> HostImage {
    let host = HostImage::new(img, create, "384k");
    host.io(
        io,
        &[
            "write -P 1 0 40k",
            "write -P 2 100k 60k",
            "write -z 8k 8k",
            "write -z -u 16k 8k",
            "write -z 200k 8k",
            "write -P 3 360k 24k",
        ],
    );
    host.snapshot(img, "one");
    host.io(io, &["write -z 0 4k", "write -z -u 24k 4k", "write -P 4 30k 3k", "write -z 104k 8k"]);
    host.snapshot(img, "two");
    host.io(io, &["write -P 5 4k 6k", "write -z 120k 12k", "discard 132k 4k"]);
    host
}

//! Environments of tests: a simulated disk, or a directory of the host with an I/O engine; images
//! are made in them.

use std::path::PathBuf;

use bds_core::graph::{Graph, NewImage};
use bds_core::options::Options;
use bds_io::{Context, ContextOptions, EngineKind, Fs, Sim, SimConfig};
use bds_testkit::{Output, Scratch, Tool, pattern};
use serde_json::json;

use super::fixture::trusting_graph;
use super::image_kind::BASE_STAMP;
use super::{Disk, ImageKind};

/// Where images are stored, and the Context that runs their I/O.
pub(crate) enum TestEnv {
    Sim(Sim),
    Host(Context, Scratch),
}

impl TestEnv {
    pub(crate) fn host(engine: EngineKind) -> std::io::Result<TestEnv> {
        Ok(TestEnv::Host(
            Context::new(ContextOptions { engine, ..ContextOptions::default() })?,
            Scratch::new(),
        ))
    }

    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        match self {
            TestEnv::Sim(sim) => sim.block_on(future),
            TestEnv::Host(context, _) => context.block_on(future),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match self {
            TestEnv::Sim(_) => PathBuf::from("/disks").join(name),
            TestEnv::Host(_, scratch) => scratch.path(name),
        }
    }

    /// The path of a file for other tools; exported from a simulated disk.
    pub(crate) fn on_host(&self, name: &str, scratch: &Scratch) -> PathBuf {
        match self {
            TestEnv::Sim(sim) => {
                let path = scratch.path(name);
                sim.export(self.path(name), &path).expect("scratch is writable");
                path
            }
            TestEnv::Host(_, own) => own.path(name),
        }
    }

    /// Runs `qemu-img check`. QEMU looks for a stored data file in the working directory, so it is
    /// named.
    pub(crate) fn qemu_check(&self, img: &Tool, kind: &ImageKind, scratch: &Scratch) -> Output {
        let mut options = format!(
            "driver=qcow2,file.driver=file,file.filename={}",
            self.on_host("disk", scratch).display()
        );
        if kind.has_data_file {
            let data = self.on_host("data", scratch);
            options += &format!(",data-file.driver=file,data-file.filename={}", data.display());
        }
        if kind.backing_len.is_some() {
            self.on_host("base", scratch);
        }
        img.run(["check", "--image-opts", &options])
    }

    pub(crate) fn fs(&self) -> Fs {
        match self {
            TestEnv::Sim(sim) => sim.fs(),
            TestEnv::Host(..) => Fs::Host,
        }
    }

    pub(crate) fn graph(&self) -> Graph {
        trusting_graph(self.fs())
    }

    /// Makes the image and the files that it refers to.
    pub(crate) fn make(&self, kind: &ImageKind) {
        let graph = self.graph();
        self.block_on(async {
            let mut options = kind.create.clone();
            options["size"] = json!(kind.len);
            if let Some(len) = kind.backing_len {
                let path = self.path("base");
                let base = NewImage {
                    format: "raw".into(),
                    path: path.clone(),
                    options: Options::new().with("size", len),
                    skip_backing: true,
                };
                graph.create_image(base).await.expect("a raw base can be made");
                let disk = Disk::open_file(&graph, "raw", path).await;
                let bytes = pattern(BASE_STAMP, 0, usize::try_from(len).expect("small"));
                disk.write(0, &bytes).await.expect("the base can be filled");
                disk.close().await.expect("the base can be closed");
                options["backing_file"] = json!("base");
                options["backing_fmt"] = json!("raw");
            }
            if kind.has_data_file {
                options["data_file"] = json!(self.path("data"));
            }
            let image = NewImage {
                format: kind.format.into(),
                path: self.path("disk"),
                options: Options::from_json(options).expect("an object"),
                skip_backing: false,
            };
            graph.create_image(image).await.expect("the image can be made");
            if kind.fill > 0 {
                let disk = Disk::open(self, kind, &graph).await.expect("the image opens");
                let start = kind.len - kind.fill;
                let bytes =
                    pattern(BASE_STAMP + 1, start, usize::try_from(kind.fill).expect("small"));
                let fill = disk.fill(start, &bytes, kind);
                fill.await.expect("the image can be filled");
                disk.close().await.expect("the image can be closed");
            }
        });
    }

    pub(crate) fn trace(&self) -> String {
        match self {
            TestEnv::Sim(sim) => sim.trace().join("\n"),
            TestEnv::Host(..) => String::new(),
        }
    }
}

/// Makes a simulated disk with an image of this kind.
pub(crate) fn sim_with_image(seed: u64, config: SimConfig, kind: &ImageKind) -> Sim {
    let sim = Sim::new(seed, config);
    TestEnv::Sim(sim.clone()).make(kind);
    sim
}

//! Five disks with their images and guests.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use bds_core::graph::reference_gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NewImage, NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::Sim;
use bds_testkit::{Chance, StampedDisk};

use crate::load::{Load, Pace};

use super::plan::{DISKS, Plan};

/// Length of each disk: whole blocks.
pub(super) const LEN: u64 = 96 << 10;

/// A guest writes now and then, so that jobs get done meanwhile.
const PACE: Pace = Pace { depth: 3, max_pause_us: 600, most: u64::MAX };

/// One disk: its guest, what the guest wrote, and its load.
pub(super) struct Disk {
    pub(super) guest: Backend,
    pub(super) model: Arc<StampedDisk>,
    load: RefCell<Option<Load>>,
}

pub(super) struct Disks {
    pub(super) graph: Graph,
    pub(super) disks: Vec<Disk>,
    images: Cell<u64>,
}

pub(super) fn graph_on(sim: &Sim) -> Graph {
    let gate = Arc::new(TrustAll { may_probe: false });
    let config = GraphConfig::new(Arc::new(bds_drivers::registry()));
    Graph::new(GraphConfig { fs: sim.fs(), gate, ..config })
}

pub(super) fn backend(node: &NodeRef, name: &str, writable: bool) -> Result<Backend> {
    Backend::new(node, BackendOptions { name: name.into(), writable, ..Default::default() })
}

/// Whether it is an image, not a filter or a file.
fn is_image(node: &NodeRef) -> bool {
    matches!(node.driver_name(), "qcow2" | "raw")
}

/// The image that a filter shows; an image itself.
fn image_of(mut node: NodeRef) -> NodeRef {
    while !is_image(&node) {
        node = walk::next_below(&node).expect("an image below");
    }
    node
}

/// The images of a chain, from this one down.
pub(super) fn chain_of(image: NodeRef) -> Vec<NodeRef> {
    let below = |node: &NodeRef| walk::child(node, "backing").map(|(node, _)| image_of(node));
    std::iter::successors(Some(image), below).collect()
}

/// Format of an image: its name says so.
pub(super) fn format_of(name: &str) -> &'static str {
    if name.ends_with("raw") { "raw" } else { "qcow2" }
}

impl Disks {
    pub(super) async fn make(sim: &Sim, plan: &Plan) -> Self {
        let graph = graph_on(sim);
        let mut made = Self { graph, disks: Vec::new(), images: Cell::new(0) };
        for number in 0..DISKS {
            let mut chance = Chance::new(plan.seed ^ 0xd15c ^ (number as u64) << 32);
            let model = Arc::new(StampedDisk::new(number as u64 + 1, LEN));
            let mut top: Option<NodeRef> = None;
            for _ in 0..plan.chains[number] {
                let node = made.image(&mut chance, top.as_ref()).await.expect("no fault yet");
                let guest = backend(&node, "fill", true).unwrap();
                let mut load = Load::paced(&guest, Arc::clone(&model), chance.draw(), PACE);
                bds_io::sleep(std::time::Duration::from_micros(1500)).await;
                load.stop().await;
                assert_eq!(load.failures(), 0);
                guest.flush().await.unwrap();
                drop(guest);
                top = Some(node);
            }
            let top = top.expect("a chain has an image");
            let guest = backend(&top, &format!("guest{number}"), true).unwrap();
            let load = Load::paced(&guest, Arc::clone(&model), chance.draw(), PACE);
            made.disks.push(Disk { guest, model, load: RefCell::new(Some(load)) });
        }
        made
    }

    /// Makes and opens a new image, on a backing image if one is given.
    pub(super) async fn image(
        &self,
        chance: &mut Chance,
        backing: Option<&NodeRef>,
    ) -> Result<NodeRef> {
        let name = self.create(chance, backing).await?;
        let below = backing.map(|node| node.name().to_owned());
        self.open(&name, below.as_deref()).await
    }

    /// Makes a new image file, and returns its name.
    pub(super) async fn create(
        &self,
        chance: &mut Chance,
        backing: Option<&NodeRef>,
    ) -> Result<String> {
        self.images.set(self.images.get() + 1);
        let is_raw = backing.is_none() && chance.one_in(2);
        let format = if is_raw { "raw" } else { "qcow2" };
        let name = format!("i{}.{format}", self.images.get());
        let mut options = Options::new().with("size", LEN);
        if !is_raw {
            let cluster = [2048_u64, 4096, 16384, 65536][chance.below(4) as usize];
            options = options.with("cluster_size", cluster);
        }
        if let Some(backing) = backing {
            let format = format_of(backing.name());
            options = options.with("backing_file", backing.name()).with("backing_fmt", format);
        }
        let path = format!("/{name}").into();
        let image = NewImage { format: format.into(), path, options, skip_backing: true };
        self.graph.create_image(image).await?;
        Ok(name)
    }

    /// Opens an image without its backing image, or on a node.
    pub(super) async fn open(&self, name: &str, backing: Option<&str>) -> Result<NodeRef> {
        let text = format!(
            "driver={},node-name={name},discard=unmap,file.driver=file,file.filename=/{name},\
             file.discard=unmap",
            format_of(name)
        );
        let mut options = Options::parse(&text)?;
        if format_of(name) == "qcow2" {
            match backing {
                Some(backing) => options.set("backing", backing),
                None => options.set("backing", serde_json::Value::Null),
            }
        }
        self.graph.open(options).await
    }

    /// The image that a guest uses now.
    pub(super) fn top(&self, disk: usize) -> NodeRef {
        image_of(self.disks[disk].guest.node().expect("it has a medium"))
    }

    /// Images of a guest's chain, its own first.
    pub(super) fn chain(&self, disk: usize) -> Vec<NodeRef> {
        chain_of(self.top(disk))
    }

    /// Ends all guests; fails if one read what it must not.
    pub(super) async fn stop(&self) {
        for disk in &self.disks {
            let load = disk.load.borrow_mut().take();
            if let Some(mut load) = load {
                load.stop().await;
            }
        }
    }
}

//! Tests that `holders()` has the source location in the caller's program of each reference,
//! whatever took it on the caller's behalf.

use bds_core::graph::{Graph, GraphConfig, HolderKind, NewImage, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::{Sim, SimConfig};
use bds_refcount::Holder;

/// Runs a test on a graph with two images, `top.qcow2` and `over.qcow2`, on a simulated disk. The
/// test must not leak a node.
fn run(test: impl AsyncFnOnce(Graph) -> Result<()>) {
    let sim = Sim::new(0, SimConfig::calm());
    let mut config = GraphConfig::new(bds_drivers::registry().into());
    config.fs = sim.fs();
    let graph = Graph::new(config);
    sim.block_on(async {
        for path in ["top.qcow2", "over.qcow2"] {
            let (format, path) = ("qcow2".into(), path.into());
            let image = NewImage { format, path, options: options("size=1M"), skip_backing: false };
            graph.create_image(image).await?;
        }
        test(graph.clone()).await
    })
    .expect("the test succeeds");
    sim.block_on(graph.shutdown()).check_leaks().expect("no node leaks");
}

fn options(text: &str) -> Options {
    Options::parse(text).expect("written here")
}

/// Asserts that the holder of this name was registered in this file and line.
#[track_caller]
fn assert_since(graph: &Graph, node: &NodeRef, holder: &str, line: u32) {
    let all = graph.holders(node.id());
    let since = all
        .iter()
        .find(|info| Holder { kind: info.kind, name: info.name.clone() }.to_string() == holder)
        .map(|info| (info.since.file(), info.since.line()));
    assert_eq!(since, Some((file!(), line)), "{holder} among {all:?}");
}

async fn open(graph: &Graph) -> Result<(NodeRef, NodeRef, NodeRef)> {
    let line = line!() + 1;
    let base = graph.open(options("driver=mem,node-name=base,size=1M")).await?;
    assert_since(graph, &base, "owner 'open'", line);

    let image =
        "driver=qcow2,node-name=top,file.driver=file,file.node-name=f,file.filename=top.qcow2";
    let line = line!() + 1;
    let top = graph.open(options(&format!("{image},backing=base"))).await?;
    assert_since(graph, &top, "owner 'open'", line);
    assert_since(graph, &base, "edge 'top.backing'", line);
    assert_since(graph, &graph.find("f")?, "edge 'top.file'", line);

    let image = "driver=qcow2,node-name=over,file.driver=file,file.filename=over.qcow2";
    let over = graph.open(options(image)).await?;
    Ok((base, top, over))
}

fn references(graph: &Graph, base: &NodeRef) -> Result<()> {
    let line = line!() + 1;
    let _copy = base.clone().held_as(Holder::new(HolderKind::User, "copy"));
    assert_since(graph, base, "user 'copy'", line);
    let line = line!() + 1;
    let _found = graph.find("base")?;
    assert_since(graph, base, "user 'reference'", line);

    let line = line!() + 1;
    let held = base.clone().held_as(Holder::new(HolderKind::User, "first"));
    let again = line!() + 1;
    let _again = held.clone();
    drop(held);
    assert_since(graph, base, "user 'first'", again);
    assert_ne!(line, again);
    Ok(())
}

#[test]
fn holders_have_the_callers_source_location() {
    run(async |graph| {
        let (base, top, over) = open(&graph).await?;
        references(&graph, &base)?;

        let named = |name: &str| BackendOptions { name: name.into(), ..Default::default() };
        let line = line!() + 1;
        let backend = Backend::new(&top, named("b"))?;
        assert_since(&graph, &top, "backend 'b'", line);

        // Frozen links and watches hold no reference and change no location.
        let frozen = graph.freeze_chain(&top, &base, "job 'commit0'")?;
        let watch = graph.watch(base.id());
        let holders = graph.holders(base.id()).len();
        drop((frozen, watch));
        assert_eq!(graph.holders(base.id()).len(), holders);

        let line = line!() + 1;
        graph.append(&top, &over).await?;
        assert_since(&graph, &over, "backend 'b'", line);
        assert_since(&graph, &top, "edge 'over.backing'", line);

        let line = line!() + 1;
        graph.change().set_backing(&over, Some(&base)).commit().await?;
        assert_since(&graph, &base, "edge 'over.backing'", line);

        let drive = Backend::empty(&graph, named("drive"))?;
        let line = line!() + 1;
        drive.insert(&base).await?;
        assert_since(&graph, &base, "backend 'drive'", line);
        drop(backend);
        Ok(())
    });
}

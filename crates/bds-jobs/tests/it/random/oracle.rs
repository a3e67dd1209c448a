//! What must hold at the end of a run: after a shutdown, or after a power cut.

use bds_core::graph::NodeRef;
use bds_io::{Buf, Sim};
use bds_testkit::{BLOCK, StampedDisk, Tick};

use crate::budget::cut_power_holding;

use super::disks::{LEN, backend, chain_of, format_of, graph_on};
use super::monitor::{Copy, Monitor};

/// All guests have stopped and all jobs have ended. Returns how many jobs succeeded.
pub(super) async fn after_shutdown(sim: &Sim, monitor: Monitor<'_>) -> u64 {
    let has_faults = monitor.plan.has_faults();
    let (disks, jobs, copies, succeeded) = monitor.into_results();
    let mut tops = Vec::new();
    for (number, disk) in disks.disks.iter().enumerate() {
        let begun = disk.model.begin_flush();
        match disk.guest.flush().await {
            Ok(()) => disk.model.end_flush(begun),
            // One that failed is repeated for ever.
            Err(error) => assert!(has_faults, "{error}"),
        }
        let now = disk.model.now();
        check(&disk.guest.node().unwrap(), &disk.model, (now, now), "at the end").await;
        tops.push(disks.top(number).name().to_owned());
    }
    for Copy { target, disk, window, .. } in &copies {
        if let Some(window) = window {
            check(target, &disks.disks[*disk].model, *window, "a backup").await;
        }
    }
    drop(copies);
    let models: Vec<_> = disks.disks.iter().map(|disk| disk.model.clone()).collect();
    let graph = disks.graph.clone();
    drop((disks, jobs));
    let report = graph.shutdown().await;
    report.check_leaks().unwrap();
    for (top, model) in tops.iter().zip(&models) {
        check_files(sim, top, model).await;
    }
    succeeded
}

/// The power was cut: each disk is what the guest's node of that moment leads to.
pub(super) fn after_cut(sim: &Sim, monitor: Monitor<'_>, seed: u64) -> u64 {
    let (disks, jobs, copies, succeeded) = monitor.into_results();
    let tops: Vec<String> =
        (0..disks.disks.len()).map(|number| disks.top(number).name().to_owned()).collect();
    let models: Vec<_> = disks.disks.iter().map(|disk| disk.model.clone()).collect();
    cut_power_holding(sim, (disks, jobs, copies));
    for cut in 0..2 {
        let after = sim.after_cut(seed ^ cut << 32);
        after.block_on(async {
            for (top, model) in tops.iter().zip(&models) {
                check_files(&after, top, model).await;
            }
        });
    }
    succeeded
}

/// Opens a disk by its top file, with what its headers name, and checks it.
async fn check_files(sim: &Sim, top: &str, model: &StampedDisk) {
    let graph = graph_on(sim);
    let text = format!(
        "driver={},node-name={top},read-only=on,file.driver=file,file.filename=/{top}",
        format_of(top)
    );
    let node = graph.open(bds_core::Options::parse(&text).unwrap()).await.unwrap();
    check(&node, model, (model.durable(), model.now()), "after a restart").await;
    for image in chain_of(node.clone()) {
        check_image(&image).await;
    }
    drop(node);
    graph.shutdown().await.check_leaks().unwrap();
}

async fn check_image(image: &NodeRef) {
    if image.driver_name() == "qcow2" {
        let look = backend(image, "look", false).unwrap();
        let report = look.check(&|_, _| ()).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{}", image.name());
    }
}

async fn check(node: &NodeRef, model: &StampedDisk, (from, to): (Tick, Tick), words: &str) {
    let reader = backend(node, "look", false).unwrap();
    for block in 0..LEN / BLOCK {
        let buf = Buf::zeroed(BLOCK as usize, 512);
        reader.read(block * BLOCK, buf.iov()).await.unwrap();
        let bytes = buf.iov().to_vec(0..BLOCK as usize);
        if let Err(error) = model.check(block, &bytes, from, to) {
            panic!("{words}, image '{}': {error}", node.name());
        }
    }
}

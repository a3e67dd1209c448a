//! Measures the graph with many nodes, long chains and changes under load: one line of JSON for
//! each measurement, for `cargo xtask bench --only graph`.
//!
//! ```text
//! graph pairs N          raw over null-co, N times: added by name, queried, deleted
//! graph snapshots DIR N  N live snapshots on one disk; DIR holds the images layer1.qcow2 and so on
//! graph reap N           a chain of N nodes in memory, released at the top, closed in one sweep
//! graph load DIR N       N requests of two threads during changes; DIR holds layer1.qcow2
//! ```
#![expect(clippy::print_stdout, reason = "an example shows what happens")]
#![expect(clippy::cast_precision_loss, reason = "counts of a bench fit a double")]

mod load;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bds_core::graph::{Graph, GraphConfig, NodeRef};
use bds_core::options::Options;
use bds_core::request::{Backend, BackendOptions};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, load::Failure>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let report = match words[..] {
        ["pairs", count] => bds_io::block_on(pairs(count.parse()?))?,
        ["snapshots", dir, count] => bds_io::block_on(snapshots(Path::new(dir), count.parse()?))?,
        ["reap", count] => bds_io::block_on(reap(count.parse()?))?,
        ["load", dir, count] => load::run(Path::new(dir), count.parse()?)?.to_json(),
        _ => return Err("usage: graph pairs N | snapshots DIR N | reap N | load DIR N".into()),
    };
    println!("{report}");
    Ok(())
}

fn graph() -> Graph {
    Graph::new(GraphConfig::new(Arc::new(bds_drivers::registry())))
}

fn options(json: Value) -> Result<Options> {
    Ok(Options::from_json(json)?)
}

/// Resident memory now, in bytes.
fn resident() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("no number")?.parse()?;
    Ok(kib * 1024.0)
}

/// Microseconds of `work` for each item.
fn each_us(start: Instant, count: usize) -> f64 {
    start.elapsed().as_secs_f64() * 1e6 / count.max(1) as f64
}

async fn pairs(count: usize) -> Result<Value> {
    let graph = graph();
    let before = resident()?;
    let start = Instant::now();
    for i in 0..count {
        let null = json!({"driver": "null-co", "node-name": format!("n{i}"), "size": 1 << 20});
        graph.add(options(null)?).await?;
        let raw = json!({"driver": "raw", "node-name": format!("r{i}"), "file": format!("n{i}")});
        graph.add(options(raw)?).await?;
    }
    let add_us = each_us(start, count);
    let bytes = (resident()? - before) / count.max(1) as f64;
    let start = Instant::now();
    let seen = graph.nodes().iter().map(|node| node.len()).filter(|len| *len == 1 << 20).count();
    let query_us = each_us(start, count);
    assert_eq!((seen, graph.top_level().count()), (2 * count, 2 * count));
    let start = Instant::now();
    for i in 0..count {
        graph.del(&format!("r{i}")).await?.into_result()?;
        graph.del(&format!("n{i}")).await?.into_result()?;
    }
    let del_us = each_us(start, count);
    Ok(json!({"add_us": add_us, "query_us": query_us, "del_us": del_us, "bytes": bytes}))
}

/// The overlay `number`, opened on the node `backing`.
async fn overlay(graph: &Graph, dir: &Path, number: usize, backing: &str) -> Result<NodeRef> {
    let path = dir.join(format!("layer{number}.qcow2"));
    let overlay = json!({
        "driver": "qcow2", "node-name": format!("layer{number}"), "backing": backing,
        "file": {"driver": "file", "filename": path},
    });
    Ok(graph.open(options(overlay)?).await?)
}

async fn snapshots(dir: &Path, count: usize) -> Result<Value> {
    let graph = graph();
    let base = json!({"driver": "null-co", "node-name": "layer0", "size": 1 << 26});
    let mut top = graph.open(options(base)?).await?;
    let disk = Backend::new(
        &top,
        BackendOptions { name: "guest".into(), writable: true, ..BackendOptions::default() },
    )?;
    let (mut open_us, mut change_us) = (Vec::new(), Vec::new());
    for number in 1..=count {
        let start = Instant::now();
        let next = overlay(&graph, dir, number, top.name()).await?;
        open_us.push(each_us(start, 1));
        let start = Instant::now();
        graph.append(&top, &next).await?;
        change_us.push(each_us(start, 1));
        top = next;
    }
    assert_eq!(disk.node().expect("it has a medium").name(), format!("layer{count}"));
    disk.read_at(0, &mut [0; 4096])?;
    let start = Instant::now();
    drop(disk);
    let report = top.close().await?;
    let teardown_us = each_us(start, count);
    assert_eq!(report.below.len(), 2 * count, "all nodes that only the top node held");
    report.into_result()?;
    let ends = |all: &[f64]| {
        let some = (all.len() / 10).max(1);
        let middle = |part: &[f64]| {
            let mut part = part.to_vec();
            part.sort_by(f64::total_cmp);
            part[part.len() / 2]
        };
        json!([middle(&all[..some]), middle(&all[all.len() - some..])])
    };
    Ok(json!({
        "open_us": ends(&open_us), "change_us": ends(&change_us), "teardown_us": teardown_us,
    }))
}

async fn reap(count: usize) -> Result<Value> {
    let graph = graph();
    let before = resident()?;
    let mut at = graph.open(options(json!({"driver": "mem", "node-name": "n0"}))?).await?;
    let start = Instant::now();
    for i in 1..count {
        let raw = json!({"driver": "raw", "node-name": format!("n{i}"), "file": at.name()});
        at = graph.open(options(raw)?).await?;
    }
    let open_us = each_us(start, count);
    let bytes = (resident()? - before) / count.max(1) as f64;
    drop(at);
    let start = Instant::now();
    let reports = graph.reap().await;
    let reap_us = each_us(start, count);
    assert!(reports.len() == count && reports.iter().all(|report| report.is_clean()));
    Ok(json!({"open_us": open_us, "reap_us": reap_us, "bytes": bytes}))
}

//! The job `amend`: effect, progress and events, refusals with QEMU's texts, cancel.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is their way to fail")]

use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_jobs::amend::Amend;
use bds_jobs::create::Create;
use bds_jobs::{JobManager, JobStatus};
use serde_json::{Value, json};

use crate::fake::{run, trace};

/// An image `disk` of 1 MiB in an open node.
async fn disk(jobs: &JobManager) -> Backend {
    let graph = jobs.graph();
    let file = Options::parse("driver=file,filename=a,size=0").unwrap();
    let work = Create::prepare(graph, file).unwrap();
    jobs.start(Create::options("c"), work.into()).await.unwrap().wait().await.unwrap();
    graph.add(Options::parse("driver=file,node-name=f,filename=a").unwrap()).await.unwrap();
    let image = json!({"driver": "qcow2", "file": "f", "size": 1 << 20, "cluster-size": 512});
    let work = Create::prepare(graph, Options::from_json(image).unwrap()).unwrap();
    jobs.start(Create::options("d"), work.into()).await.unwrap().wait().await.unwrap();
    let options = "driver=qcow2,node-name=disk,file=f";
    let node = graph.add(Options::parse(options).unwrap()).await.unwrap();
    let node = graph.acquire(node).unwrap();
    Backend::new(&node, BackendOptions { writable: true, ..Default::default() }).unwrap()
}

fn prepare(jobs: &JobManager, node: &str, options: Value) -> Result<Amend> {
    Amend::prepare(jobs.graph(), "a", node, Options::from_json(options)?, false)
}

async fn facts(disk: &Backend) -> Value {
    disk.info().await.unwrap().format_specific.unwrap()["data"].clone()
}

#[test]
fn options_change_while_the_image_is_open() {
    run(|jobs| async move {
        let disk = disk(&jobs).await;
        disk.write(0, bds_io::Buf::zeroed(65536, 512).iov(), Default::default()).await.unwrap();
        let mut events = jobs.events();
        let change = json!({"driver": "qcow2", "refcount-bits": 64, "size": 2 << 20});
        let work = prepare(&jobs, "disk", change).unwrap();
        let job = jobs.start(Amend::options("a"), work.into()).await.unwrap();
        job.wait().await.unwrap();
        assert_eq!(job.status(), JobStatus::Concluded, "it waits to be dismissed");
        jobs.dismiss("a").unwrap();
        let words = ["created", "running", "waiting", "pending", "concluded", "null"];
        assert_eq!(trace(&mut events), words.map(|word| format!("a {word}")));
        let done = jobs.history().last("a").unwrap().clone();
        assert!(done.total_progress > 1 && done.current_progress == done.total_progress);
        assert_eq!(done.to_query_jobs()["type"], "amend");
        assert_eq!(done.to_query_block_jobs(), None);
        assert_eq!(facts(&disk).await["refcount-bits"], 64);
        assert_eq!(disk.len(), 2 << 20);
        assert!(disk.check(&|_, _| {}).await.unwrap().is_clean());
        let work = prepare(&jobs, "disk", json!({"driver": "qcow2", "version": "v2"})).unwrap();
        let job = jobs.start(Amend::options("b"), work.into()).await.unwrap();
        let error = job.wait().await.unwrap_err().to_string();
        assert!(error.contains("compat=0.10 requires refcount_bits=16"), "{error}");
        let both = json!({"driver": "qcow2", "version": "v2", "refcount-bits": 16});
        let work = prepare(&jobs, "disk", both).unwrap();
        jobs.start(Amend::options("c2"), work.into()).await.unwrap().wait().await.unwrap();
        assert_eq!(facts(&disk).await["compat"], "0.10");
    });
}

#[test]
fn refusals_come_before_the_job() {
    run(|jobs| async move {
        let disk = disk(&jobs).await;
        let mem = Options::parse("driver=mem,node-name=m,size=64k").unwrap();
        jobs.graph().add(mem).await.unwrap();
        for (node, options, expected) in [
            ("disk", json!({}), "Parameter 'driver' is missing"),
            ("disk", json!({"driver": "x"}), "Block driver 'x' not found or not supported"),
            (
                "disk",
                json!({"driver": "raw"}),
                "x-blockdev-amend doesn't support changing the block driver",
            ),
            ("m", json!({"driver": "mem"}), "Driver does not support x-blockdev-amend"),
        ] {
            let error = prepare(&jobs, node, options).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        assert!(prepare(&jobs, "nosuch", json!({"driver": "qcow2"})).is_err());
        drop(disk);
    });
}

#[test]
fn a_cancelled_job_leaves_the_image_in_use() {
    for turns in 0..40 {
        run(move |jobs| async move {
            let disk = disk(&jobs).await;
            let zeros = bds_io::Buf::zeroed(512 << 10, 512).iov();
            disk.write(0, zeros, Default::default()).await.unwrap();
            let change = json!({"driver": "qcow2", "refcount-bits": 64});
            let work = prepare(&jobs, "disk", change).unwrap();
            let job = jobs.start(Amend::options("a"), work.into()).await.unwrap();
            for _ in 0..turns * 4 {
                bds_io::yield_now().await;
            }
            let _may_be_over = job.cancel(true);
            let result = job.wait().await;
            let bits = facts(&disk).await["refcount-bits"].clone();
            assert!(bits == 64 || bits == 16 && result.is_err(), "{result:?} {bits}");
            disk.write(4096, bds_io::Buf::zeroed(512, 512).iov(), Default::default())
                .await
                .unwrap();
            assert!(disk.check(&|_, _| {}).await.unwrap().is_clean());
        });
    }
}

//! The job `create`: files, formats in open nodes, refusals and failures with QEMU's texts.

use bds_core::Options;
use bds_jobs::JobManager;
use bds_jobs::create::Create;
use serde_json::{Value, json};

use crate::fake::{run, settle, trace};

async fn create(jobs: &JobManager, options: Value) -> Result<(), String> {
    let options = Options::from_json(options).map_err(|error| error.to_string())?;
    let job = Create::prepare(jobs.graph(), options).map_err(|error| error.to_string())?;
    let job = jobs.start(Create::options("c"), job.into()).await.expect("the id is free");
    let result = job.wait().await.map_err(|error| error.to_string());
    jobs.dismiss("c").expect("it is concluded");
    result
}

#[test]
fn a_file_and_an_image_in_it() {
    run(|jobs| async move {
        let mut events = jobs.events();
        create(&jobs, json!({"driver": "file", "filename": "a", "size": 4096})).await.unwrap();
        let words = ["created", "running", "waiting", "pending", "concluded", "null"];
        let expected = words.map(|word| format!("c {word}"));
        assert_eq!(trace(&mut events), expected);
        let done = jobs.history().last("c").unwrap().clone();
        assert_eq!((done.current_progress, done.total_progress), (1, 1));
        assert_eq!(done.to_query_block_jobs(), None);

        let graph = jobs.graph();
        graph.add(Options::parse("driver=file,node-name=f,filename=a").unwrap()).await.unwrap();
        for (version, compat) in [("v2", "0.10"), ("v3", "1.1")] {
            let image = json!({
                "driver": "qcow2", "file": "f", "size": 1 << 20, "version": version,
                "cluster-size": 4096, "backing-file": "missing.raw", "backing-fmt": "raw",
            });
            create(&jobs, image).await.unwrap();
            let options = "driver=qcow2,node-name=disk,file=f,backing=";
            let disk = graph.open(Options::parse(options).unwrap()).await.unwrap();
            let backend = bds_core::request::Backend::new(&disk, Default::default()).unwrap();
            let info = backend.info().await.unwrap();
            let format = json!(format!("{:?}", info));
            assert!(format.as_str().unwrap().contains("missing.raw"), "{format}");
            assert!(format.as_str().unwrap().contains(compat), "{format}");
            drop(backend);
            disk.close().await.unwrap().into_result().unwrap();
        }
    });
}

#[test]
fn refusals_come_before_the_job_and_failures_from_it() {
    run(|jobs| async move {
        for (options, expected) in [
            (json!({"driver": "x"}), "Block driver 'x' not found or not supported"),
            (json!({"driver": "null-co"}), "Driver does not support blockdev-create"),
            (json!({"driver": "throttle"}), "Driver does not support blockdev-create"),
            (json!({"driver": "file", "size": 1}), "Parameter 'filename' is missing"),
            (json!({"driver": "qcow2", "size": 1}), "Parameter 'file' is missing"),
        ] {
            assert_eq!(create(&jobs, options).await.unwrap_err(), expected);
        }
        assert!(jobs.history().records.is_empty(), "no job was started");
        let missing = json!({"driver": "qcow2", "size": 1, "file": "nowhere"});
        assert!(create(&jobs, missing).await.unwrap_err().contains("nowhere"));
    });
}

#[test]
fn a_node_that_others_write_is_not_formatted() {
    run(|jobs| async move {
        let graph = jobs.graph();
        let options = Options::parse("driver=mem,node-name=m,size=64k").unwrap();
        let node = graph.open(options).await.unwrap();
        let guest = bds_core::request::BackendOptions {
            writable: true,
            shared: bds_core::graph::Perm::CONSISTENT_READ,
            ..bds_core::request::BackendOptions::registered("guest")
        };
        let guest = bds_core::request::Backend::new(&node, guest).unwrap();
        let error = create(&jobs, json!({"driver": "qcow2", "file": "m", "size": 65536})).await;
        assert!(error.unwrap_err().contains("guest"));
        assert_eq!(jobs.history().last("c").unwrap().current_progress, 0);
        drop(guest);
        create(&jobs, json!({"driver": "qcow2", "file": "m", "size": 65536})).await.unwrap();
        settle().await;
    });
}

#[test]
fn the_failure_of_a_file_has_the_words_of_the_system() {
    let graph = bds_core::graph::Graph::new(bds_core::graph::GraphConfig::new(
        bds_drivers::registry().into(),
    ));
    let jobs = JobManager::new(&graph);
    bds_io::block_on(async {
        let options = json!({"driver": "file", "filename": "/nonexistent/x", "size": 1});
        let error = create(&jobs, options).await.unwrap_err();
        assert_eq!(error, "Could not create '/nonexistent/x': No such file or directory");
        assert_eq!(
            jobs.history().last("c").unwrap().to_query_jobs(),
            json!({
                "id": "c", "type": "create", "status": "concluded", "current-progress": 0,
                "total-progress": 1, "error": error,
            })
        );
    });
}

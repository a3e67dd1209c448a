//! Replays the committed fuzz seeds of manifests and records.
//!
//! `BDS_WRITE_SEEDS=1` writes the seeds anew.

use std::path::{Path, PathBuf};

use bds_jobs::manifest::{ContentHash, Manifest, ManifestBuilder};
use bds_jobs::record::format::{PAGE_HASHES, RecordHeader, RecordPage};
use bds_jobs::record::fuzzing;

type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 2] = [("manifest", fuzzing::manifest), ("job_record", fuzzing::job_record)];

fn seeds(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target)
}

#[test]
fn every_seed_is_harmless() {
    if std::env::var_os("BDS_WRITE_SEEDS").is_some() {
        write_seeds();
    }
    for (name, run) in TARGETS {
        let mut count = 0;
        for entry in std::fs::read_dir(seeds(name)).expect("the seeds are there") {
            let bytes = std::fs::read(entry.expect("readable").path()).expect("readable");
            run(&bytes);
            // Cut and damaged inputs are the common case of a fuzzer.
            for at in (0..bytes.len()).step_by(bytes.len() / 64 + 1) {
                run(&bytes[..at]);
                let mut changed = bytes.clone();
                changed[at] ^= 0x81;
                run(&changed);
            }
            count += 1;
        }
        assert!(count > 0, "no seeds for {name}");
    }
}

fn write_seeds() {
    let put = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(seeds(target)).expect("a directory");
        std::fs::write(seeds(target).join(name), bytes).expect("a file");
    };
    let manifest = |len: u64, note: &str, parent: Option<ContentHash>| -> Manifest {
        let graph = bds_core::graph::Graph::new(bds_core::graph::GraphConfig::new(
            std::sync::Arc::new(bds_drivers::registry()),
        ));
        let options = bds_core::Options::parse(&format!("driver=mem,size={len}")).expect("valid");
        bds_io::block_on(async {
            let node = graph.open(options).await.expect("a disk in memory");
            let image = bds_core::request::Backend::new(&node, Default::default()).expect("free");
            let builder = ManifestBuilder::new(len).expect("small");
            builder.finish(&image, parent, note, |_, _| true).await.expect("readable")
        })
    };
    put("manifest", "empty", &manifest(0, "", None).to_bytes());
    let parent = Some(ContentHash([9; 32]));
    put("manifest", "increment", &manifest(200_000, "disk0", parent).to_bytes());
    let header = |epoch: u64| RecordHeader {
        epoch,
        id: [1; 16],
        len: 300 << 16,
        identity: (epoch.is_multiple_of(2)).then_some((7, 9)),
        must_check: !epoch.is_multiple_of(2),
        bitmap_bytes: 65_536,
        job: "backup 'job0'".into(),
        source: "/source".into(),
        target: "/target".into(),
        bitmap: if epoch.is_multiple_of(2) { "since".into() } else { String::new() },
    };
    let mut file = [header(2).to_page(), header(3).to_page()].concat();
    put("job_record", "headers", &file);
    for number in 0..3 {
        for sequence in 2..4 {
            let hash = |at: usize| (at as u64 % 5 >= sequence).then_some(ContentHash([3; 32]));
            let hashes = (0..PAGE_HASHES).map(hash).collect();
            file.extend(RecordPage { number, sequence, hashes }.to_bytes(&[1; 16]));
        }
    }
    put("job_record", "pages", &file);
}

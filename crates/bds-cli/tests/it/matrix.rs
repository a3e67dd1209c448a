//! One cell of the test matrix (engine × format × cache mode, from the environment): a round trip
//! through the binary.

use std::path::Path;

use bds_testkit::{Cache, Engine, Format, Scratch, Tool, axes, pattern, skip};

use crate::programs::{bds, text};

/// What the formats of the matrix are made with.
fn options(format: Format, data_file: &str) -> (&'static str, String) {
    match format {
        Format::Raw => ("raw", "preallocation=off".to_owned()),
        Format::Qcow2 => ("qcow2", "compat=1.1".to_owned()),
        Format::Qcow2V2 => ("qcow2", "compat=0.10".to_owned()),
        Format::Qcow2Ext => ("qcow2", "extended_l2=on,cluster_size=16k".to_owned()),
        Format::Qcow2Data => ("qcow2", format!("data_file={data_file}")),
    }
}

fn cache_word(cache: Cache) -> &'static str {
    match cache {
        Cache::Writeback => "writeback",
        Cache::None => "none",
        Cache::Writethrough => "writethrough",
        Cache::Unsafe => "unsafe",
    }
}

/// The tool on the engine of this cell; nothing if the tool does not have it.
fn tool(engine: Engine) -> Option<Tool> {
    match engine {
        Engine::Uring => Some(bds().with_env("BDS_ENGINE", "uring")),
        Engine::Pool => Some(bds().with_env("BDS_ENGINE", "pool")),
        Engine::Sim => {
            skip("the tool works on files, the simulated disk has none");
            None
        }
    }
}

/// Data, a hole, zeros that are written, data up to an end that no cluster ends at.
fn source(path: &Path) -> Vec<u8> {
    let mut bytes = pattern(11, 0, 300 << 10);
    bytes.resize(2 << 20, 0);
    bytes.extend(pattern(12, 2 << 20, (64 << 10) + 1536));
    std::fs::write(path, &bytes).expect("scratch is writable");
    bytes
}

#[test]
fn convert_round_trip_keeps_the_data() {
    let (engine, format, cache) = axes();
    let Some(bds) = tool(engine) else { return };
    let scratch = Scratch::new();
    let [raw, image, again, data] =
        ["source.raw", "image", "again.raw", "data"].map(|name| scratch.path(name));
    let bytes = source(&raw);
    let (name, made_with) = options(format, text(&data));
    let cache = cache_word(cache);
    let there = ["convert", "-f", "raw", "-O", name, "-o", &made_with, "-t", cache, "-T", cache];
    bds.must(there.iter().chain(&[text(&raw), text(&image)]));
    let compare = ["compare", "-f", "raw", "-F", name, "-T", cache, text(&raw), text(&image)];
    assert_eq!(bds.must(compare).stdout, "Images are identical.\n");
    if name == "qcow2" {
        bds.must(["check", "-f", name, "-T", cache, text(&image)]);
    }
    let back = ["convert", "-f", name, "-O", "raw", "-t", cache, "-T", cache];
    bds.must(back.iter().chain(&[text(&image), text(&again)]));
    assert!(std::fs::read(&again).expect("it was made") == bytes, "bytes changed on the way");
}

#[test]
fn compressed_round_trip_keeps_the_data() {
    let (engine, format, cache) = axes();
    let Some(bds) = tool(engine) else { return };
    if matches!(format, Format::Raw | Format::Qcow2Data) {
        return skip("nothing is compressed in raw images and data files");
    }
    let scratch = Scratch::new();
    let [raw, image, again] = ["source.raw", "image", "again.raw"].map(|name| scratch.path(name));
    let bytes = source(&raw);
    let (name, made_with) = options(format, "");
    let cache = cache_word(cache);
    let there = ["convert", "-c", "-f", "raw", "-O", name, "-o", &made_with, "-t", cache];
    bds.must(there.iter().chain(&[text(&raw), text(&image)]));
    bds.must(["check", "-f", name, "-T", cache, text(&image)]);
    let back = ["convert", "-f", name, "-O", "raw", "-t", cache, "-T", cache, "-m", "3", "-W"];
    bds.must(back.iter().chain(&[text(&image), text(&again)]));
    assert!(std::fs::read(&again).expect("it was made") == bytes, "bytes changed on the way");
}

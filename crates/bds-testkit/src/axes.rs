//! The axes of the test matrix that need no rebuild, as the environment gives them.
//!
//! `BDS_TEST_ENGINE`, `BDS_TEST_FORMAT` and `BDS_TEST_CACHE` choose one value each; without them a test runs the
//! cheap default. `xtask/matrix.toml` lists the cells.

/// Which engine moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
    Uring,
    /// Blocking calls on threads.
    Pool,
    /// The simulated disk.
    Sim,
}

/// Which kind of image the test makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Raw bytes.
    Raw,
    /// qcow2 version 3, defaults.
    Qcow2,
    /// qcow2 version 2.
    Qcow2V2,
    /// qcow2 with extended L2 entries.
    Qcow2Ext,
    /// qcow2 with an external data file.
    Qcow2Data,
}

/// Which cache mode the image is opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Page cache, flushes honoured.
    Writeback,
    /// O_DIRECT.
    None,
    /// A flush after every write.
    Writethrough,
    /// Flushes ignored.
    Unsafe,
}

/// The cell this process runs.
pub fn axes() -> (Engine, Format, Cache) {
    let engine = match var("BDS_TEST_ENGINE").as_str() {
        "pool" => Engine::Pool,
        "sim" => Engine::Sim,
        "" | "uring" => Engine::Uring,
        other => panic!("BDS_TEST_ENGINE={other}: use uring, pool or sim"),
    };
    let format = match var("BDS_TEST_FORMAT").as_str() {
        "raw" => Format::Raw,
        "" | "qcow2" => Format::Qcow2,
        "qcow2-v2" => Format::Qcow2V2,
        "qcow2-ext" => Format::Qcow2Ext,
        "qcow2-data" => Format::Qcow2Data,
        other => {
            panic!("BDS_TEST_FORMAT={other}: use raw, qcow2, qcow2-v2, qcow2-ext or qcow2-data")
        }
    };
    let cache = match var("BDS_TEST_CACHE").as_str() {
        "" | "writeback" => Cache::Writeback,
        "none" => Cache::None,
        "writethrough" => Cache::Writethrough,
        "unsafe" => Cache::Unsafe,
        other => panic!("BDS_TEST_CACHE={other}: use writeback, none, writethrough or unsafe"),
    };
    (engine, format, cache)
}

fn var(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

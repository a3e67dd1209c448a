//! Reads the cell of the test matrix from the environment: engine, format and cache mode.
//!
//! `BDS_TEST_ENGINE`, `BDS_TEST_FORMAT` and `BDS_TEST_CACHE` select one value each, without a
//! rebuild; unset, a test runs the cheap default. `xtask/matrix.toml` lists the cells.

/// I/O engine under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
    Uring,
    /// Blocking calls on threads.
    Pool,
    /// The simulated disk.
    Sim,
}

/// Kind of image under test.
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

/// Cache mode under test.
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

/// Returns the cell that this process runs.
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

//! Serves an overlay through the nbdkit plugin in `examples/nbdkit`, read and written by libnbd's
//! tools.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::{env, fs};

use bds_core::driver::WriteFlags;
use bds_core::graph::reference_gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NewImage};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_testkit::{Scratch, pattern};

const LEN: usize = 4 << 20;

fn graph() -> Graph {
    let gate = Arc::new(TrustAll { may_probe: false });
    Graph::new(GraphConfig { gate, ..GraphConfig::new(Arc::new(bds_drivers::registry())) })
}

/// A base image with data, and an empty overlay.
async fn make_images(graph: &Graph, dir: &Path) -> Result<()> {
    for (name, options) in
        [("base", "size=4M"), ("overlay", "size=4M,backing_file=base,backing_fmt=qcow2")]
    {
        let options = Options::parse(options)?;
        let (format, path) = ("qcow2".to_owned(), dir.join(name));
        graph.create_image(NewImage { format, path, options, skip_backing: false }).await?;
    }
    let mut options = Options::parse("driver=qcow2,file.driver=file")?;
    options.set_path("file.filename", dir.join("base"));
    let base = graph.open(options).await?;
    let backend = Backend::new(&base, BackendOptions { writable: true, ..Default::default() })?;
    backend.write(0, pattern(1, 0, LEN).into(), WriteFlags::empty()).await?;
    drop(backend);
    base.close().await?.into_result()
}

fn build_plugin(dir: &Path) -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let library = env::current_exe().unwrap().parent().unwrap().join("libbds_ffi.so");
    for name in ["libbds.so", "libbds.so.0.1"] {
        std::os::unix::fs::symlink(&library, dir.join(name)).unwrap();
    }
    let plugin = dir.join("nbdkit-bds-plugin.so");
    let output = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wextra", "-Werror", "-I"])
        .arg(here.join("include"))
        .arg(here.join("examples/nbdkit/bds.c"))
        .arg("-o")
        .arg(&plugin)
        .arg("-L")
        .arg(dir)
        .arg("-lbds")
        .arg(format!("-Wl,-rpath,{}", dir.display()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    plugin
}

#[test]
fn an_overlay_is_served_through_nbdkit() {
    for tool in ["nbdkit", "nbdcopy", "nbdinfo", "cc"] {
        let found = Command::new(tool).arg("--version").output();
        if !found.is_ok_and(|output| output.status.success()) {
            return bds_testkit::skip(&format!("{tool} is not installed"));
        }
    }
    if !Path::new("/usr/include/nbdkit-plugin.h").exists() {
        return bds_testkit::skip("nbdkit-plugin.h is not installed (nbdkit-plugin-dev)");
    }
    let scratch = Scratch::new();
    let dir = scratch.dir();
    let graph = graph();
    bds_io::block_on(make_images(&graph, dir)).unwrap();
    let plugin = build_plugin(dir);
    fs::write(dir.join("new"), pattern(2, 0, LEN)).unwrap();

    let script = "nbdcopy \"$uri\" before && nbdcopy --flush new \"$uri\" && \
                  nbdinfo --size \"$uri\" && nbdcopy \"$uri\" after";
    let output = Command::new("timeout")
        .args(["120", "nbdkit", "-U", "-"])
        .arg(&plugin)
        .arg(format!("file={}", dir.join("overlay").display()))
        .args(["format=qcow2", "trust=1", "--run", script])
        .current_dir(dir)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), LEN.to_string());
    assert!(fs::read(dir.join("before")).unwrap() == pattern(1, 0, LEN), "the base's data");
    assert!(fs::read(dir.join("after")).unwrap() == pattern(2, 0, LEN), "what was written");

    // The image is closed in order, and the base was not touched.
    bds_io::block_on(async {
        for (name, seed) in [("overlay", 2), ("base", 1)] {
            let mut options = Options::parse("driver=qcow2,read-only=on,file.driver=file")?;
            options.set_path("file.filename", dir.join(name));
            let node = graph.open(options).await?;
            let image = Backend::new(&node, BackendOptions::default())?;
            assert!(image.check(&|_, _| {}).await?.is_clean(), "{name}");
            let mut bytes = vec![0; LEN];
            image.read_at(0, &mut bytes)?;
            assert!(bytes == pattern(seed, 0, LEN), "{name}");
        }
        Ok::<(), bds_core::Error>(())
    })
    .unwrap();
}

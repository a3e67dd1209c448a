//! Runs the tests of the Python package with the library that cargo built.

use std::path::PathBuf;
use std::process::Command;

#[test]
fn the_python_package_works() {
    let found = Command::new("python3").args(["-c", "import ctypes, asyncio"]).output();
    if !found.is_ok_and(|output| output.status.success()) {
        return bds_testkit::skip("python3 with ctypes is not installed");
    }
    let library = std::env::current_exe().unwrap().parent().unwrap().join("libbds_ffi.so");
    let package = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("python");
    let output = Command::new("timeout")
        .args(["300", "python3", "-B", "-m", "unittest", "discover", "-s"])
        .arg(package.join("tests"))
        .env("PYTHONPATH", &package)
        .env("BDS_LIBRARY", library)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("Ran ") && said.contains("OK"), "{said}");
}

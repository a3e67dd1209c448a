//! Gives the shared library its SONAME.
//!
//! Symbol versions are not given here: rustc passes the linker a version script of its own, GNU ld
//! refuses a second one and lld ignores it. `cargo xtask dist` links the library that is installed
//! out of the static one, with `libbds.map`.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    // Before 1.0 every minor version may break, as cargo-c and Cargo have it.
    let minor = env::var("CARGO_PKG_VERSION_MINOR").unwrap_or_default();
    let major = env::var("CARGO_PKG_VERSION_MAJOR").unwrap_or_default();
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libbds.so.{major}.{minor}");
    // Code of the library runs in threads of its own: unloading it under them would crash.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}

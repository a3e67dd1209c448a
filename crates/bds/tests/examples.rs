//! Runs the examples that need no arguments.

#[path = "../examples/backend.rs"]
mod backend;

#[test]
fn backend_example_runs() {
    backend::main().unwrap();
}

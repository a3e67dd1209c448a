//! Runs bds-core's example of backend operations on real drivers.

#[path = "../../../bds-cli/examples/backend.rs"]
mod example;

#[test]
fn the_backend_example_runs() {
    example::main().unwrap();
}

//! Tests mistakes that must not compile: each file of `compile_fail/` is one that QEMU made, or
//! could make.
//!
//! The compiler's messages are kept beside each; `TRYBUILD=overwrite cargo test -p bds-core --test
//! types` updates them.

#[test]
fn mistakes_that_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}

//! What the types forbid: each file of `compile_fail/` is a mistake that QEMU once made, or could make, and that does not compile here.
//!
//! The compiler's words are kept beside each; `TRYBUILD=overwrite cargo test -p bds-core --test types` writes them anew.

#[test]
fn mistakes_that_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}

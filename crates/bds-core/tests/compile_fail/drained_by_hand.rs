//! A drained section comes only from draining (row 46).

use bds_core::graph::Drained;

fn check() -> Drained {
    Drained { is_all: true }
}

fn main() {}

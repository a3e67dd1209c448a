//! A drained section is had by draining only (2.11, number 1).

use bds_core::graph::Drained;

fn story() -> Drained {
    Drained { is_all: true }
}

fn main() {}

//! A child handle has one owner (row 56: another node's was copied).

use bds_core::driver::Child;

fn check(child: &Child) -> Child {
    child.clone()
}

fn main() {}

//! A driver's way to its child has one owner (row 56: another node's was copied).

use bds_core::driver::Child;

fn story(child: &Child) -> Child {
    child.clone()
}

fn main() {}

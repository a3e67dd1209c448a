//! A change is committed once (row 12: a job's exit ran twice).

use bds_core::graph::Change;

async fn story(change: Change) {
    let _first = change.commit().await;
    let _second = change.commit().await;
}

fn main() {}

//! Questions about a whole graph, answered as JSON.

use std::ffi::c_char;

use bds_core::graph::{BitmapInfo, NodeRef};
use bds_jobs::JobInfo;
use serde_json::{Value, json};

use crate::abi::bds_context;
use crate::abi::bds_status::BDS_ERR_OPTION;
use crate::context::{self, Context, close_json};
use crate::entry::entry;
use crate::failure::Failure;
use crate::node::holders_json;
use crate::ptr::{self, Out, Text};

/// Answers a question about the graph as JSON (for `dump` and `dot`: text). Free it with
/// bds_free. [any]
///
/// | what | answer |
/// | --- | --- |
/// | "nodes" | QEMU's query-named-block-nodes, as far as the facts are known |
/// | "graph" | nodes and edges with permissions, as x-debug-query-block-graph |
/// | "backends" | QEMU's query-block |
/// | "holders" | every node with its count and its holders |
/// | "monitor" | names of the nodes that the monitor's list holds |
/// | "bitmaps" | every node that has dirty bitmaps, with QEMU's facts about each |
/// | "jobs" | QEMU's query-jobs, newest first |
/// | "block-jobs" | QEMU's query-block-jobs, newest first |
/// | "job-facts" | for each job what bds_job_query says |
/// | "job-history" | records of jobs that were dismissed |
/// | "drivers" | names of the drivers of this build |
/// | "reports" | closings that failed while no caller waited for them; each is returned once |
/// | "dump" | text for people |
/// | "dot" | for Graphviz |
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT; BDS_ERR_OPTION: an unknown question.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_query(context: bds_context, what: Text, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_query", || {
        let out = json_out.check("json_out")?;
        let context = context::find(context)?;
        let answer = answer(&context, what.str("what")?)?;
        out.set(ptr::give_text(&answer)?);
        Ok(0)
    })
}

fn answer(context: &Context, what: &str) -> Result<String, Failure> {
    let graph = &context.graph;
    let value = match what {
        "nodes" => graph.query(),
        "graph" => graph.query_graph(),
        "backends" => graph.query_backends(),
        "holders" => {
            let node = |node: NodeRef| {
                // The reference of this walk is not counted.
                let holders = holders_json(&node, 1);
                json!({"node": node.name(), "id": node.id().to_u64(), "count": node.count() - 1,
                    "holders": holders})
            };
            graph.nodes().into_iter().map(node).collect()
        }
        "monitor" => monitor(context),
        "bitmaps" => graph.nodes().iter().filter_map(bitmaps).collect(),
        "block-jobs" => {
            context.jobs().query().iter().filter_map(JobInfo::to_query_block_jobs).collect()
        }
        "job-facts" => json!(context.jobs().query()),
        "jobs" => context.jobs().query().iter().map(JobInfo::to_query_jobs).collect(),
        "job-history" => json!(context.jobs().history().records),
        "drivers" => bds_drivers::registry().iter().map(|driver| json!(driver.name())).collect(),
        "reports" => graph.reports().iter().map(close_json).collect(),
        "dump" => return Ok(graph.dump()),
        "dot" => return Ok(graph.dot()),
        other => {
            let words = format!("there is no question '{other}'");
            return Err(Failure::new(BDS_ERR_OPTION, words));
        }
    };
    Ok(value.to_string())
}

fn monitor(context: &Context) -> Value {
    let nodes = context.graph.nodes();
    let owned = nodes.iter().filter(|node| context.graph.is_owned(node.id()));
    owned.map(|node| json!(node.name())).collect()
}

fn bitmaps(node: &NodeRef) -> Option<Value> {
    let bitmaps: Vec<Value> = node.bitmaps().iter().map(BitmapInfo::to_json).collect();
    if bitmaps.is_empty() {
        return None;
    }
    Some(json!({"node": node.name(), "id": node.id().to_u64(), "bitmaps": bitmaps}))
}

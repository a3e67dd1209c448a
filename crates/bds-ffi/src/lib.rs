//! The C library of bds: nodes, backends, requests and graph changes behind 64-bit handles.
//!
//! C holds numbers, never pointers to objects of this library. A handle is one reference: releasing
//! it twice is an error and takes no other holder's reference. The C reader's manual is
//! `include/bds.h`, which `cargo xtask header` makes out of the documentation here.
//!
//! ```text
//! abi       all types and constants of the header      ptr    what C passes as pointers; the only unsafe code
//! entry     one boundary around every function:        table  handles: slots of bds-refcount's arena
//!           fork check, panics, errors                 failure  codes, the thread's last error
//! context, options, node, edit, backend, io, queue, memory, image, event, version: the functions
//! ```
//!
//! Every exported function is a safe Rust function: its pointer parameters are types of `ptr`,
//! which only C can make, and whose validity is what the header asks of C.
#![expect(
    rustdoc::broken_intra_doc_links,
    reason = "the tags [any], [io], [graph] of the C header are not links"
)]

mod abi;
pub mod backend;
pub mod bitmap;
pub mod change;
pub mod change_bitmap;
pub mod context;
mod entry;
pub mod error;
pub mod event;
mod event_source;
mod failure;
mod fault;
pub mod image;
pub mod io;
pub mod iothread;
pub mod job;
mod job_options;
mod lease;
pub mod memory;
pub mod node;
mod option_text;
pub mod options;
pub mod ptr;
pub mod query;
pub mod queue;
mod request;
pub mod section;
mod table;
mod ticket;
pub mod version;

pub use abi::*;

/// Opens nodes of driver types that are not registered, for tests that inject faults.
#[doc(hidden)]
pub mod testing {
    use std::sync::Arc;

    use bds_core::{DriverType, Options};

    use crate::entry::entry;
    use crate::ptr::Out;
    use crate::{bds_context, bds_node, context, node};

    /// Arms a point of `fault.rs`, or disarms with "". Returns whether the one before never fired.
    #[cfg(debug_assertions)]
    pub fn panic_at(point: &str, skip: u64) -> bool {
        crate::fault::armed::arm(point, skip)
    }

    /// As `bds_node_open`, with this driver type.
    pub fn open_driver(
        context: bds_context,
        driver: Arc<dyn DriverType>,
        out: Out<bds_node>,
    ) -> i32 {
        entry("open_driver", || {
            let out = out.check("out")?;
            let context = context::find(context)?;
            let node = bds_io::block_on(context.graph.open_driver(driver, Options::new()))?;
            node::give(&context, node, out)
        })
    }
}

//! qcow2, versions 2 and 3.
//!
//! A flat folder, one activity a file. Reading order:
//!
//! ```text
//! bytes     units, header, extension, entry     pure; compress: codecs; space: places and the nodes that take them
//! state     state (what an open image is), open, contents, config, tables (L1 and L2 in memory), refcount, load, reopen
//! reading   lookup, read, backing, inflated, status
//! writing   write (plan, write, link), cow, alloc, reftable, pack (compressed), zero, resize
//! order     cache (what is written after what), budget (how much may wait), release (when is a cluster free), grace (who may still know it)
//! looking   check (census, refmap, stored: its parts), info, snapshot, bitmap, create, measure
//! safety    overlap (never write over metadata), place and lost (what lies behind the end of the file), task (nothing half-done)
//! ```
//!
//! **Nothing but `cache.rs` decides the order of metadata writes; no lock is held across I/O.**

mod alloc;
mod backing;
mod bitmap;
mod budget;
mod cache;
mod census;
mod check;
mod compress;
mod config;
mod contents;
mod cow;
mod create;
mod driver;
mod entry;
mod extension;
mod fetch;
#[doc(hidden)]
pub mod fuzzing;
mod grace;
mod header;
mod inflated;
mod info;
mod load;
mod lookup;
mod lost;
mod measure;
mod open;
mod overlap;
mod pack;
mod place;
mod read;
mod refcount;
mod refmap;
mod reftable;
mod release;
mod reopen;
mod resize;
mod snapshot;
mod space;
mod state;
mod status;
mod stored;
mod tables;
mod task;
mod units;
mod write;
mod zero;

use bds_core::driver::{
    BoxFuture, Category, CreateContext, CreateFacts, Driver, DriverType, MeasureReport,
    MeasureSource, OpenContext,
};
use bds_core::error::Result;
use bds_core::options::{OptionSpec, Options};

pub use check::check_image;

/// The qcow2 format.
#[derive(Clone, Copy, Debug, Default)]
pub struct Qcow2Format;

impl DriverType for Qcow2Format {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn category(&self) -> Category {
        Category::Format
    }

    fn help(&self) -> &'static str {
        "QEMU's image format: sparse, with backing files, compression and snapshots"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        config::OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let image = open::open(context).await?;
            Ok(Box::new(driver::Qcow2::new(image)) as Box<dyn Driver>)
        })
    }

    fn probe(&self, head: &[u8], _file_len: u64) -> u8 {
        if header::is_qcow2(head) { 100 } else { 0 }
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        create::CREATE_OPTIONS
    }

    fn create<'a>(&'a self, context: CreateContext<'a>) -> BoxFuture<'a, Result<()>> {
        Box::pin(create::create(context))
    }

    fn check_create(&self, options: &mut Options, backing_len: Option<u64>) -> Result<CreateFacts> {
        create::check(options, backing_len)
    }

    fn measure(&self, options: &mut Options, source: &MeasureSource) -> Result<MeasureReport> {
        measure::measure(options, source)
    }
}

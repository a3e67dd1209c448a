//! qcow2, versions 2 and 3: format driver.
//!
//! ```text
//! mod driver open        the entries: DriverType, Driver, open
//! state                  Image, an open image, and Meta, everything that changes under its lock
//! metadata_load config   what an open reads of the image; options
//! live_rules             the rules for entries that hold now
//! file_read task srcu    reads for parsers; tasks that outlive their callers; sleepable RCU for readers of entries
//!
//! layout/   bytes of an image, parsed and encoded by pure functions (the fuzz targets)
//! meta/     L1, L2 and refcounts in memory: lookup, load, the order in which changes reach the file, how much may be dirty
//! alloc/    host clusters: allocated, checked, released
//! io/       guest reads and writes, zeros, compression, backing file, block status
//! check/    `check`, and what a truncated image lost
//! bitmap/   persistent dirty bitmaps: load, mark "in use", store
//! manage/   create, measure, resize, amend, reopen, snapshots, info
//! ```
//!
//! **Only `meta/write_back.rs` decides the order of metadata writes. No lock is held across I/O.**
//! Why a crash leaves at most leaks: docs/qcow2.md.

mod alloc;
mod bitmap;
mod check;
mod config;
mod driver;
mod file_read;
#[doc(hidden)]
pub mod fuzzing;
mod io;
mod layout;
mod live_rules;
mod manage;
mod meta;
mod metadata_load;
mod nodes;
mod open;
mod plan;
mod srcu;
mod state;
mod task;
mod write_state;

use bds_core::driver::{
    BitmapSpec, BoxFuture, Category, CreateContext, CreateFacts, Driver, DriverType, MeasureReport,
    MeasureSource, OpenContext,
};
use bds_core::error::Result;
use bds_core::options::{OptionSpec, Options};

pub use check::compare::check_image;

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
        if layout::cluster0::is_qcow2(head) { 100 } else { 0 }
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        manage::create_options::CREATE_OPTIONS
    }

    fn create<'a>(&'a self, context: CreateContext<'a>) -> BoxFuture<'a, Result<()>> {
        Box::pin(manage::create::create(context))
    }

    fn check_create(&self, options: &mut Options, backing_len: Option<u64>) -> Result<CreateFacts> {
        manage::create::check(options, backing_len)
    }

    fn amend_options(&self) -> &'static [OptionSpec] {
        manage::amend::options::AMEND_OPTIONS
    }

    fn measure(&self, options: &mut Options, source: &MeasureSource) -> Result<MeasureReport> {
        manage::measure::measure(options, source)
    }

    fn measure_bitmaps(&self, options: &Options, bitmaps: &[BitmapSpec]) -> Result<Option<u64>> {
        manage::measure::measure_bitmaps(options, bitmaps)
    }
}

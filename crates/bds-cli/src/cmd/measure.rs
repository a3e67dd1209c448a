//! `measure`: computes how large a new image would be.

use std::ffi::OsStr;

use bds_core::driver::{BitmapSpec, MeasureReport, MeasureSource, Precision, StatusFlags};
use bds_core::graph::{BitmapInfo, NodeRef};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Options, Result};
use serde_json::json;

use crate::args::{Measure, Output};
use crate::cmd::create::{format_options, stored_format};
use crate::image;
use crate::image_spec::Spec;
use crate::printer;

pub(crate) fn run(args: &Measure) -> Result<()> {
    super::refuse(
        args.snapshot.is_some(),
        "-l",
        "internal snapshots are not read; use qemu-img measure -l",
    )?;
    let registry = bds_drivers::registry();
    let format = registry.format(stored_format(&args.output_format))?;
    let mut options = format_options(&args.options)?;
    let (source, bitmaps) = match (&args.size, &args.filename) {
        (Some(size), _) => {
            let virtual_len = super::size("image size", size)?;
            options.set("size", virtual_len);
            (MeasureSource { virtual_len, data: Some(Vec::new()) }, None)
        }
        (None, Some(name)) => image::block_on(inspect(args, name))?,
        (None, None) => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "Either --size N or one filename must be specified",
            ));
        }
    };
    let for_bitmaps = options.clone();
    let mut report = format.measure(&mut options, &source)?;
    if let Some(bitmaps) = bitmaps {
        report.bitmaps = format.measure_bitmaps(&for_bitmaps, &bitmaps)?;
    }
    refuse_rest(options, &args.output_format)?;
    print(args.output, report)
}

fn refuse_rest(options: Options, format: &str) -> Result<()> {
    options.finish(&format!("the format '{format}'"))
}

/// What an image holds: data, and persistent bitmaps if it can hold any.
async fn inspect(args: &Measure, name: &OsStr) -> Result<(MeasureSource, Option<Vec<BitmapSpec>>)> {
    let spec = Spec::read(name, &args.source)?;
    let graph = image::trusting_graph();
    let node = image::open(&graph, &spec).await?;
    let backend = image::backend(&node, false)?;
    let source = MeasureSource { virtual_len: backend.len(), data: Some(data(&backend).await?) };
    let bitmaps = node.stores_bitmaps().then(|| persistent_bitmaps(&node));
    // Of a raw image without bitmaps qemu-img says nothing about them.
    let bitmaps = bitmaps.filter(|all| !all.is_empty() || node.driver_name() != "raw");
    image::close(backend, node).await?;
    Ok((source, bitmaps))
}

fn persistent_bitmaps(node: &NodeRef) -> Vec<BitmapSpec> {
    let spec = |info: BitmapInfo| {
        let name = info.name.filter(|_| info.persistent)?;
        Some(BitmapSpec { name, granularity: info.granularity, len: node.len() })
    };
    node.bitmaps().into_iter().filter_map(spec).collect()
}

/// Ranges that hold data, in order, not touching.
async fn data(backend: &Backend) -> Result<Vec<std::ops::Range<u64>>> {
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    let (mut at, end) = (0, backend.len());
    while at < end {
        let run = backend.block_status(at, end - at, Precision::Exact).await?;
        if run.len == 0 {
            break;
        }
        let next = at + run.len;
        let is_data = run.flags.contains(StatusFlags::DATA | StatusFlags::ALLOCATED)
            && !run.flags.contains(StatusFlags::ZERO);
        if is_data {
            match ranges.last_mut() {
                Some(last) if last.end == at => last.end = next,
                _ => ranges.push(at..next),
            }
        }
        at = next;
    }
    Ok(ranges)
}

fn print(output: Output, report: MeasureReport) -> Result<()> {
    let MeasureReport { required, fully_allocated, bitmaps } = report;
    if output == Output::Json {
        let mut value = json!({"required": required, "fully-allocated": fully_allocated});
        if let Some(bytes) = bitmaps {
            value["bitmaps"] = json!(bytes);
        }
        return printer::json(&value);
    }
    printer::line(format_args!(
        "required size: {required}\nfully allocated size: {fully_allocated}"
    ))?;
    bitmaps.map_or(Ok(()), |bytes| printer::line(format_args!("bitmaps size: {bytes}")))
}

//! `check`: reports leaks and corruption of an image; repairs nothing.

use std::process::ExitCode;

use bds_core::driver::CheckReport;
use bds_core::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};

use crate::args::{Check, Output};
use crate::image;
use crate::image_spec::{self, Spec};
use crate::{printer, report};

const NO_CHECKS: u8 = 63;

pub(crate) fn run(args: &Check) -> ExitCode {
    match check(args) {
        Ok((format, report)) => match print(args, format, &report) {
            Ok(()) => verdict(&report),
            Err(error) => report::failure(&error),
        },
        Err(error) if error.kind() == ErrorKind::NotSupported && args.repair.is_none() => {
            if !args.quiet {
                printer::message(format_args!("bds: {}", report::message(&error)));
            }
            ExitCode::from(NO_CHECKS)
        }
        Err(error) => report::failure(&error),
    }
}

fn check(args: &Check) -> Result<(&'static str, CheckReport)> {
    super::refuse(
        args.repair.is_some(),
        "-r",
        "bds check only looks; repair with qemu-img check -r, on a copy if the image matters",
    )?;
    let cache = image_spec::cache_mode("-T", &args.cache)?;
    let mut spec = Spec::read(&args.filename, &args.source)?.cache(cache);
    spec.flags.for_check = true;
    image::block_on(async {
        let graph = image::trusting_graph();
        // Only this image is checked, so a missing backing file is no error.
        let node = image::open(&graph, &spec).await.map_err(|error| match error.kind() {
            // 63 means only "this format has no check".
            ErrorKind::NotSupported => error.with_kind(ErrorKind::InvalidImage),
            _ => error,
        })?;
        let backend = image::backend(&node, false)?;
        let format = node.driver_name();
        let report = backend.check(&|_, _| {}).await.map_err(|error| match error.kind() {
            ErrorKind::NotSupported => {
                Error::new(ErrorKind::NotSupported, "This image format does not support checks")
            }
            _ => error,
        })?;
        image::close(backend, node).await?;
        Ok((format, report))
    })
}

fn verdict(report: &CheckReport) -> ExitCode {
    ExitCode::from(match report {
        r if r.check_errors > 0 => 1,
        r if r.corruptions > 0 => 2,
        r if r.leaks > 0 => 3,
        _ => 0,
    })
}

fn print(args: &Check, format: &str, report: &CheckReport) -> Result<()> {
    if args.output == Output::Json {
        let value = as_json(&args.filename.to_string_lossy(), format, report);
        return printer::json(&value);
    }
    for message in &report.messages {
        printer::message(message);
    }
    if report.messages_dropped > 0 {
        printer::message(format_args!("({} more messages)", report.messages_dropped));
    }
    if args.quiet { Ok(()) } else { printer::text(&human(report)) }
}

fn human(report: &CheckReport) -> String {
    let mut out = String::new();
    if report.is_clean() {
        out += "No errors were found on the image.\n";
    }
    if report.corruptions > 0 {
        out += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        out += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        out +=
            &format!("\n{} internal errors have occurred during the check.\n", report.check_errors);
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        out += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end_offset > 0 {
        out += &format!("Image end offset: {}\n", report.image_end_offset);
    }
    out
}

#[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

/// Counts of zero are left out, except that of errors.
fn as_json(filename: &str, format: &str, report: &CheckReport) -> Value {
    let mut out = Map::new();
    for (key, count) in [
        ("image-end-offset", report.image_end_offset),
        ("total-clusters", report.total_clusters),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if count > 0 {
            out.insert(key.to_owned(), json!(count));
        }
    }
    out.insert("check-errors".to_owned(), json!(report.check_errors));
    out.insert("filename".to_owned(), json!(filename));
    out.insert("format".to_owned(), json!(format));
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_counts_are_printed() {
        let report = CheckReport {
            corruptions: 2,
            leaks: 1,
            total_clusters: 160,
            allocated_clusters: 1,
            image_end_offset: 393_216,
            ..CheckReport::default()
        };
        insta::assert_snapshot!(human(&report), @r"

        2 errors were found on the image.
        Data may be corrupted, or further writes to the image may corrupt it.

        1 leaked clusters were found on the image.
        This means waste of disk space, but no harm to data.
        1/160 = 0.62% allocated, 0.00% fragmented, 0.00% compressed clusters
        Image end offset: 393216
        ");
    }
}

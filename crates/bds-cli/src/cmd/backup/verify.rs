//! `backup verify`: proves the points of a directory against their manifests.

use bds_core::Result;
use bds_jobs::manifest::VerifyReport;
use serde_json::json;

use super::restore;
use crate::args::{BackupVerify, Output};
use crate::backup_set::{BackupSet, Point};
use crate::image;
use crate::interrupt::Interrupt;
use crate::printer;
use crate::progress::Progress;

/// Returns whether all is good.
pub(super) fn run(args: &BackupVerify) -> Result<bool> {
    let set = BackupSet::open(&args.directory)?;
    let points: Vec<_> = match args.point {
        Some(number) => vec![set.point(Some(number))?],
        None => set.points().iter().collect(),
    };
    let mut found = Vec::new();
    image::block_on(async {
        let interrupt = Interrupt::watch()?;
        for point in points {
            let report = verify_point(&set, point, &interrupt, args.progress && !args.quiet).await;
            found.push((point, report?));
        }
        Ok(())
    })?;
    let is_good = found.iter().all(|(_, report)| report.is_good());
    if args.output == Output::Json {
        let all = found.iter().map(|(point, report)| {
            let bad: Vec<_> = report.bad.iter().map(restore::range).collect();
            json!({ "point": point.number, "checked": report.checked, "bad": bad })
        });
        printer::json(&all.collect::<Vec<_>>().into())?;
    } else if !args.quiet {
        for (point, report) in &found {
            printer::line(restore::verdict(point.number, report))?;
        }
    }
    Ok(is_good)
}

/// Compares what a point shows with its manifest.
pub(super) async fn verify_point(
    set: &BackupSet,
    point: &Point,
    interrupt: &Interrupt,
    shows_progress: bool,
) -> Result<VerifyReport> {
    set.chain(point)?;
    let (backend, node) = restore::open_point(&image::trusting_graph(), set, point).await?;
    let mut progress = Progress::new(shows_progress);
    let report = point.manifest.verify(&backend, |done, total| {
        progress.show(done, total);
        !interrupt.has_arrived()
    });
    let report = report.await;
    match &report {
        Ok(_) => progress.finish(point.manifest.len()),
        Err(_) => progress.abandon(),
    }
    image::close(backend, node).await?;
    report
}

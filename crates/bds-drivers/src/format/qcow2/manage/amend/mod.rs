//! Changes format options of an open image: version, refcount width, lazy refcounts, data file.
//!
//! ```text
//! options     what is asked for, against the header that the file has: nothing is written
//! l2_tables   every L2 table of the image and its snapshots, once
//! expand      zero clusters become data or nothing: version 2 has no zero flag
//! snapshots   snapshot table of version 3, beside the old one
//! widths      a second refcount structure of another width, beside the old one
//! switch      cluster 0: all options take effect in the write of one sector
//! steps       progress, and the end of a cancelled change
//! ```
//!
//! Everything before the switch leaves an image that reads the same and whose counts are right,
//! and everything that the switch needs is durable before it. So a crash leaves the old options or
//! the new ones. What was written for a switch that did not come is not counted (`widths`), or
//! leaked (`expand`, `snapshots`). The argument in full: docs/qcow2.md.
//!
//! No guest request runs meanwhile: the request path holds them. Flushes, block status, `info` and
//! changes of stored bitmaps may; locks and `freeze` keep them out where that matters.

pub(in crate::format::qcow2) mod options;

mod expand;
mod l2_tables;
mod snapshots;
mod steps;
mod switch;
mod widths;

use std::sync::Arc;

use bds_core::driver::Amendment;
use bds_core::error::Result;

use self::options::AmendPlan;
use self::steps::Steps;
use crate::format::qcow2::file_read::read_cluster0;
use crate::format::qcow2::layout::cluster0::Strictness;
use crate::format::qcow2::state::Image;

impl Image {
    /// See [`bds_core::Driver::check_amend`]. Returns what is to change.
    pub(crate) async fn check_amend(&self, amendment: &Amendment) -> Result<AmendPlan> {
        let checked = async {
            self.check_usable()?;
            self.write_state.check()?;
            let old = read_cluster0(self.file.port(), Strictness::Use).await?;
            let mut plan = AmendPlan::new(amendment, &old)?;
            if plan.is_downgrade() {
                self.check_downgrade(&plan).await?;
            }
            self.plan_switch(&mut plan).await?;
            // Options of the open node that the new version does not have.
            self.config_for(&plan.new)?;
            if let Some(len) = plan.size.filter(|len| *len != self.disk_len()) {
                self.check_len(self.disk_len(), len)?;
                self.check_snapshots(plan.new.header.version).await?;
            }
            Ok(plan)
        };
        checked.await.map_err(|error| self.name_file(error))
    }

    /// See [`bds_core::Driver::amend`]. Runs in a task of its own.
    pub(crate) async fn amend(self: &Arc<Self>, amendment: &Amendment) -> Result<()> {
        let plan = self.check_amend(amendment).await?;
        let mut steps = Steps::new(&amendment.control);
        if plan.old != plan.new {
            self.clear_unmaintained(false).await?;
            // What the file has from here on is what holds.
            self.write_back_all_durably().await?;
            let done = self.carry_out(&plan, amendment, &mut steps).await;
            done.map_err(|error| self.name_error(error))?;
        }
        steps.finish();
        Ok(())
    }

    async fn carry_out(
        self: &Arc<Self>,
        plan: &AmendPlan,
        amendment: &Amendment,
        steps: &mut Steps,
    ) -> Result<()> {
        if plan.changes_width() {
            self.check_counts_fit(steps, &plan.new.header.geometry).await?;
        }
        if plan.is_downgrade() {
            self.expand_zero_clusters(steps).await?;
        }
        let table = match plan.is_upgrade() {
            true => self.write_snapshot_table(&plan.old.header).await?,
            false => None,
        };
        let switched = self.switch_options(amendment, table, steps).await;
        if let (Err(_), Some(table)) = (&switched, table) {
            self.give_back_unless_used(table);
        }
        switched?;
        // The old snapshot table is released.
        self.write_back_all_durably().await
    }
}

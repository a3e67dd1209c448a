//! `convert --bitmaps`: copies the persistent bitmaps of the input.
//!
//! They are added before the data is copied, so that what the output cannot hold is refused early,
//! and disabled, so that the copy is not recorded; they get their bits when the copy is done.

use std::sync::Arc;

use bds_core::graph::{BitmapInfo, BitmapOptions, NodeRef};
use bds_core::{Error, ErrorKind, Result};

use crate::args::Convert;
use crate::printer;

/// Bitmaps to be copied, in their order.
pub(crate) struct Bitmaps(Vec<(Arc<str>, BitmapInfo)>);

impl Bitmaps {
    /// Those of the input, if they are asked for. Reads nothing but what is in memory.
    pub(crate) fn of(args: &Convert, sources: &[NodeRef]) -> Result<Option<Self>> {
        let [source] = sources else { return Ok(None) };
        if !args.bitmaps {
            return Ok(None);
        }
        if !source.stores_bitmaps() {
            return Err(Error::new(ErrorKind::NotSupported, "Source lacks bitmap support"));
        }
        let mut found = Vec::new();
        for info in source.bitmaps().into_iter().filter(|info| info.persistent) {
            let Some(name) = info.name.clone() else { continue };
            if !info.inconsistent {
                found.push((name, info));
            } else if args.skip_broken_bitmaps {
                printer::message(format_args!(
                    "bds: warning: Skipping inconsistent bitmap '{name}'"
                ));
            } else {
                let message = format!(
                    "Cannot copy inconsistent bitmap '{name}'\n\
                     Try --skip-broken-bitmaps, or use 'bds bitmap --remove' to delete it"
                );
                return Err(Error::new(ErrorKind::InvalidImage, message));
            }
        }
        Ok(Some(Self(found)))
    }

    /// Adds them to the output, disabled.
    pub(crate) async fn add_to(&self, target: &NodeRef) -> Result<()> {
        if !target.stores_bitmaps() {
            let message =
                format!("Format driver '{}' does not support bitmaps", target.driver_name());
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        for (name, info) in &self.0 {
            let options = BitmapOptions {
                granularity: Some(info.granularity),
                persistent: true,
                disabled: true,
                ..BitmapOptions::named(&**name)
            };
            let added = target.add_bitmap(options).await;
            added.map_err(|e| e.context(format_args!("Failed to create bitmap {name}")))?;
        }
        Ok(())
    }

    /// Gives them their bits; those that record go on.
    pub(crate) async fn fill(&self, source: &NodeRef, target: &NodeRef) -> Result<()> {
        for (name, info) in &self.0 {
            let filled = async {
                target.merge_bitmaps(name, &[(source, name)]).await?;
                match info.recording {
                    true => target.enable_bitmap(name).await,
                    false => Ok(()),
                }
            };
            let filled = filled.await;
            filled.map_err(|e| e.context(format_args!("Failed to populate bitmap {name}")))?;
        }
        Ok(())
    }
}

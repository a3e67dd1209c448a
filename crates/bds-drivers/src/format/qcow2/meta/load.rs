//! Bringing tables into memory, each of them once however many ask for it.
//!
//! A load runs in a task of its own, so that one asker's end is not the others'. Whatever is loaded is handed out *held*: it cannot be
//! evicted before the asker has used it.

use std::sync::{Arc, OnceLock};

use bds_core::driver::BoxFuture;
use bds_core::error::Result;

use super::shared_load::{Flight, Hold};
use super::tables::{Slice, SliceId};
use crate::format::qcow2::layout::space::{MetaOffset, Offset};
use crate::format::qcow2::plan::What;
use crate::format::qcow2::state::Image;
use crate::format::qcow2::task::{Done, finish};

/// Ends a flight, also if its task was dropped with its executor.
struct Landing {
    image: Arc<Image>,
    what: What,
    flight: Arc<Flight>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.image.meta().flights.remove(&self.what);
        self.flight.done.set();
    }
}

impl Image {
    /// Loads `what`, or waits for the load that is under way.
    pub(crate) async fn load(self: &Arc<Self>, what: What) -> Result<Hold> {
        let (flight, is_ours) = {
            let mut meta = self.meta();
            if let Some(flight) = meta.flights.get(&what) {
                (Arc::clone(flight), false)
            } else {
                let flight = Arc::new(Flight { done: Done::new(), result: OnceLock::new() });
                meta.flights.insert(what, Arc::clone(&flight));
                (flight, true)
            }
        };
        if is_ours {
            let landing = Landing { image: Arc::clone(self), what, flight: Arc::clone(&flight) };
            let working = self.busy.begin();
            finish(async move {
                let result = landing.image.read_in(what).await;
                // The first and only one to set it.
                let _ = landing.flight.result.set(result);
                drop(landing);
                drop(working);
            })
            .await;
        } else {
            flight.done.wait().await;
        }
        match flight.result.get() {
            Some(Ok(hold)) => Ok(hold.clone()),
            Some(Err(error)) => Err(error.duplicate()),
            None => Ok(Hold::Nothing),
        }
    }

    async fn read_in(self: &Arc<Self>, what: What) -> Result<Hold> {
        match what {
            What::Slice(id) => self.read_slice(id).await,
            What::Table(table) => self.read_table(table).await,
            What::Block(index) => self.read_block(index).await,
        }
    }

    /// Loading a table loads its slices: boxed, to close the circle of types.
    fn load_boxed(self: &Arc<Self>, what: What) -> BoxFuture<'_, Result<Hold>> {
        Box::pin(self.load(what))
    }

    async fn read_table(self: &Arc<Self>, table: u32) -> Result<Hold> {
        let pieces = self.tables.slices_per_table();
        let mut held = Vec::with_capacity(pieces);
        for piece in 0..u32::try_from(pieces).expect("at most 4096 pieces") {
            let id = SliceId { table, piece };
            // One that is in memory or on its way is not read again.
            let there = self.tables.hold(id);
            match there {
                Some(slice) => held.push(slice),
                None => match self.load_boxed(What::Slice(id)).await? {
                    Hold::Slice(slice) => held.push(slice),
                    other => return Ok(other),
                },
            }
        }
        Ok(Hold::Slices(held))
    }

    async fn read_slice(self: &Arc<Self>, id: SliceId) -> Result<Hold> {
        let len = self.config.load().slice_len;
        let is_extended = self.geometry().has_extended_l2();
        let table = {
            let mut meta = self.meta();
            self.clean_now_and_then(&mut meta);
            meta.slices.evict(&self.tables, false);
            if let Some(slice) = self.tables.hold(id) {
                return Ok(Hold::Slice(slice));
            }
            let table = match self.tables.l1(id.table).table(self.geometry()) {
                Ok(Some(table)) => table,
                Ok(None) => return Ok(Hold::Nothing),
                Err(bad) => {
                    drop(meta);
                    let guest = self.geometry().guest_offset(u64::from(id.table), 0);
                    return Err(self.bad_entry(bad, guest.0));
                }
            };
            if meta.slices.is_unlinked(id.table) {
                // The file knows nothing of this table: what is not in memory is empty.
                let slice = Arc::new(Slice::empty(len, is_extended));
                return Ok(Hold::Slice(meta.slices.add(&self.tables, id, slice)));
            }
            table
        };
        if !self.is_whole_table(table) {
            return Err(self.lost_meta("an L2 table", table));
        }
        let bytes = self.read_file(table.plus(u64::from(id.piece) * len as u64), len).await?;
        let slice = Arc::new(Slice::decode(&bytes, is_extended));
        let mut meta = self.meta();
        Ok(Hold::Slice(meta.slices.add(&self.tables, id, slice)))
    }

    async fn read_block(self: &Arc<Self>, index: u64) -> Result<Hold> {
        let place = {
            let mut meta = self.meta();
            if let Some(block) = meta.counts.resident(index) {
                return Ok(Hold::Block(Arc::clone(&block.pin)));
            }
            meta.counts.evict();
            match meta.counts.block_place(index) {
                Ok(Some(place)) => place,
                // Looking again will tell what is wrong.
                Ok(None) | Err(_) => return Ok(Hold::Nothing),
            }
        };
        if !self.is_whole_table(place) {
            return Err(self.lost_meta("a refcount block", place));
        }
        let bytes = self.read_file(place, self.geometry().cluster_len()).await?;
        let pin = self.meta().counts.insert(index, place, bytes.into_boxed_slice());
        Ok(Hold::Block(pin))
    }

    /// Reads bytes of metadata from the image file; zeros past its end.
    pub(crate) async fn read_file(&self, at: MetaOffset, len: usize) -> Result<Vec<u8>> {
        let iov = self.pool.take(len).iov();
        let read = self.file.read(at, iov.clone());
        read.await.map_err(|e| self.name_error(e))?;
        Ok(iov.to_vec(0..len))
    }
}

//! Memory: registered regions of the caller's, and aligned buffers of the library's.

use std::ffi::c_void;
use std::sync::Arc;

use crate::abi::bds_memory;
use crate::abi::bds_status::{BDS_ERR_RANGE, BDS_OK, BDS_STILL_REFERENCED};
use crate::entry::{entry, entry_or};
use crate::failure::Failure;
use crate::ptr::{self, Out, Sink};
use crate::table::{Object, Removed, Table};

static REGIONS: Table<RegionObject> = Table::new(10);

/// A registered region: numbers only. Requests in flight share it.
pub(crate) struct Region {
    start: usize,
    len: usize,
}

struct RegionObject(Arc<Region>);

impl Object for RegionObject {}

impl Region {
    /// Refuses a segment that does not lie in the region.
    pub(crate) fn check(&self, segment: Sink, len: usize) -> Result<(), Failure> {
        let (start, len) = segment.range(len)?;
        let inside = start
            .checked_sub(self.start)
            .is_some_and(|begin| begin.checked_add(len).is_some_and(|end| end <= self.len));
        match inside {
            true => Ok(()),
            false => {
                Err(Failure::new(BDS_ERR_RANGE, "a segment lies outside the registered region"))
            }
        }
    }
}

/// The region of a handle.
pub(crate) fn find(memory: bds_memory) -> Result<Arc<Region>, Failure> {
    let found = REGIONS.get(memory.raw).map_err(|failure| failure.of("memory"))?;
    Ok(Arc::clone(&found.0))
}

/// Registers memory of the caller's, a guest's for example, for requests of queues. [any]
///
/// Requests that name the region are checked against it: addresses that a guest made up cannot
/// lead out of it. The memory must stay mapped until bds_memory_unref returned BDS_OK.
///
/// Errors: BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_memory_register(start: Sink, bytes: usize, out: Out<bds_memory>) -> i32 {
    entry("bds_memory_register", || {
        let out = out.check("out")?;
        let (start, len) = start.range(bytes)?;
        let object = RegionObject(Arc::new(Region { start, len }));
        out.set(bds_memory { raw: REGIONS.insert(object)? });
        Ok(0)
    })
}

/// Releases a handle. [any]
///
/// BDS_OK: the memory is the caller's again. BDS_STILL_REFERENCED: requests in flight use it, until
/// their completions are there.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_memory_unref(memory: bds_memory) -> i32 {
    entry("bds_memory_unref", || match REGIONS.remove(memory.raw)? {
        Removed::Taken(RegionObject(region)) => Ok(match Arc::into_inner(region) {
            Some(_) => BDS_OK as i32,
            None => BDS_STILL_REFERENCED as i32,
        }),
        Removed::InUse => Ok(BDS_STILL_REFERENCED as i32),
    })
}

/// Allocates zeroed memory for requests. [any]
///
/// `alignment`: a power of two from 8 to 65536; 4096 suits O_DIRECT on every device. Free it with
/// bds_buffer_free.
///
/// Errors: BDS_ERR_ARGUMENT, -ENOMEM.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_buffer_alloc(bytes: usize, alignment: usize, out: Out<*mut c_void>) -> i32 {
    entry("bds_buffer_alloc", || {
        let out = out.check("out")?;
        if !alignment.is_power_of_two() || !(8..=65536).contains(&alignment) {
            return Err(Failure::argument("alignment is no power of two from 8 to 65536"));
        }
        out.set(ptr::give_buffer(bytes, alignment)?);
        Ok(0)
    })
}

/// Frees memory of bds_buffer_alloc. NULL is ignored. [any]
///
/// No request may use it any more.
#[unsafe(no_mangle)]
pub extern "C" fn bds_buffer_free(buffer: ptr::Given) {
    entry_or("bds_buffer_free", (), || {
        buffer.free();
        Ok(())
    });
}

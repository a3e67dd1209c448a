//! The trait `Driver`: what an open driver implements. The rules that hold for all methods are in
//! the parent module.

use std::path::PathBuf;

use bds_io::IoVec;

use super::{
    Access, Amendment, Attempt, BackingRecord, BitmapStore, BoxFuture, CheckReport, Child,
    ImageInfo, Limits, NodeUse, Precision, ReadFlags, Reopen, ReopenContext, Role, StatusRun,
    Truncate, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};

/// A driver instance: an open image, protocol or filter.
///
/// Ranges given to a driver are inside the node (writes past the end only from parents that may
/// resize), aligned to [`Limits::request_alignment`], and split by its limits. Methods may be
/// called from many threads at once.
#[expect(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
pub trait Driver: Send + Sync + 'static {
    /// The driver's name as QEMU spells it ("qcow2").
    fn name(&self) -> &'static str;

    /// Length in bytes as the guest sees it.
    fn len(&self) -> u64;

    /// Limits that requests must keep. Read when the node is opened, when it is reopened and when
    /// anything below changes.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// True if the node shows its one child's data unchanged.
    fn is_filter(&self) -> bool {
        false
    }

    /// True if every change of this node's bytes must pass through it: a job's filter that tracks
    /// writes. Copies by the host (copy offload) then do not go to the node below around it.
    fn must_see_writes(&self) -> bool {
        false
    }

    /// True if unallocated parts show the backing child.
    fn supports_backing(&self) -> bool {
        false
    }

    /// Flags `write` honours itself.
    fn write_flags(&self) -> WriteFlags {
        WriteFlags::empty()
    }

    /// Flags `write_zeroes` honours itself; `None` if there is no such operation.
    fn zero_flags(&self) -> Option<ZeroFlags> {
        None
    }

    /// True if zero writes and discards must not run beside writes that overlap them: zeros are
    /// kept in two places, which such writes could reach in different orders.
    fn serialises_zeroes(&self) -> bool {
        false
    }

    /// True if it can only be read although writing was asked for (`auto_read_only`, or a medium
    /// that is write-protected).
    fn is_read_only(&self) -> bool {
        false
    }

    /// The name of the file that holds the bytes, for protocols that have one.
    fn filename(&self) -> Option<PathBuf> {
        None
    }

    /// Which file it is, as (device, inode), for protocols that have one: two names of one file
    /// agree.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// Reads at once if that needs no waiting (caches hold all of it). `None`: the caller calls
    /// [`Driver::read`]. Must not block, and leaves nothing behind when it declines (the buffer may
    /// be partly filled).
    fn try_read(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }

    /// Writes at once if that needs no waiting. `None`: nothing was changed, the caller calls
    /// [`Driver::write`].
    fn try_write(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }

    /// Called before every write, compressed write, zero write and discard of `len` bytes: a driver
    /// that limits their rate makes them wait here. A request that waits here has not begun:
    /// dropped, it has no effect. `None`: go.
    fn pace(&self, _len: u64) -> Option<BoxFuture<'_, ()>> {
        None
    }

    /// Fills `iov` from `offset`. Bytes past the end of what is stored are zeros.
    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>>;

    /// Writes `iov` at `offset`.
    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>>;

    /// Bytes of one compressed cluster; `None` if the node writes none. A filter returns its
    /// child's.
    fn compressed_unit(&self) -> Option<u32> {
        None
    }

    /// Writes one compressed cluster (or the tail of the image). An empty `iov` at the end pads the
    /// file.
    fn write_compressed(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        let name = self.name();
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotSupported, format!("{name} has no compressed clusters")))
        })
    }

    /// Makes the range read as zeros.
    fn write_zeroes(
        &self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Unsupported) })
    }

    /// Discards a range that is no longer needed. Advisory.
    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Unsupported) })
    }

    /// Writes cached metadata to the children (not necessarily to the medium). Called before
    /// `flush_to_disk`.
    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Makes the driver's own medium durable. The request path flushes children afterwards.
    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Status of a run at `offset`, of at most `len` bytes and at least one request alignment.
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>>;

    /// Changes the length.
    fn truncate(&self, _change: Truncate) -> BoxFuture<'_, Result<()>> {
        let name = self.name();
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotSupported, format!("{name} cannot be resized")))
        })
    }

    /// Facts about the image.
    fn info(&self) -> BoxFuture<'_, Result<ImageInfo>> {
        Box::pin(async { Ok(ImageInfo::default()) })
    }

    /// Bytes the node occupies on its host, where that is known.
    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async { Ok(None) })
    }

    /// Checks the image for leaks and corruption; changes nothing. `progress` is called with (done,
    /// total) bytes of metadata.
    fn check<'a>(
        &'a self,
        _progress: &'a (dyn Fn(u64, u64) + Send + Sync),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        let name = self.name();
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotSupported, format!("{name} has nothing to check")))
        })
    }

    /// Copies bytes from `source` (a child-level offload such as copy_file_range). `Unsupported`:
    /// copy by buffers.
    fn copy_range_from<'a>(
        &'a self,
        _source: &'a dyn Driver,
        _source_offset: u64,
        _offset: u64,
        _len: u64,
    ) -> BoxFuture<'a, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Unsupported) })
    }

    /// Fills `iov` from the snapshot of its child that this node keeps (`copy-before-write`).
    ///
    /// # Errors
    /// `PermissionDenied`: the range is not part of the snapshot, or was discarded. Otherwise, also
    /// if the snapshot is broken, an error of the kind that broke it.
    fn snapshot_read(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        no_snapshot(self.name())
    }

    /// Status of a run of the snapshot.
    ///
    /// # Errors
    /// As [`Driver::snapshot_read`].
    fn snapshot_status(
        &self,
        _offset: u64,
        _len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        no_snapshot(self.name())
    }

    /// Gives up the part of the snapshot that lies wholly in the range: it need not be kept any
    /// more, and reads of it fail.
    fn snapshot_discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        no_snapshot(self.name())
    }

    /// Sets the first backing child, or removes and returns the only one (`None`). No request is in
    /// flight meanwhile. Exchanging one backing node for another does not involve the driver: the
    /// graph re-points the child.
    ///
    /// # Errors
    /// Nothing has changed.
    fn set_backing(&self, _backing: Option<Child>) -> Result<Option<Child>> {
        let name = self.name();
        let words = format!("{name} cannot get or lose its backing node while it is open");
        Err(Error::new(ErrorKind::NotSupported, words))
    }

    /// Rewrites the backing file that the image itself records; `None`: it records none from then
    /// on. Durable when it returns. A crash on the way leaves the old record or the new one. The
    /// request path has flushed the node before.
    ///
    /// # Errors
    /// `NotSupported`: the format records none. Otherwise what [`Driver::check_backing_record`]
    /// refuses, before anything is written. After an I/O error the old record or the new one is
    /// there.
    fn set_backing_record(&self, _record: Option<BackingRecord>) -> BoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Err(no_backing_record(self.name()))))
    }

    /// Checks whether [`Driver::set_backing_record`] could be done now: limits, and space in the
    /// header. Writes nothing.
    ///
    /// # Errors
    /// `NotSupported`: the format records none; `InvalidInput`: the record breaks a rule of the
    /// format; `NoSpace`: it does not fit.
    fn check_backing_record(&self, _record: Option<BackingRecord>) -> BoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Err(no_backing_record(self.name()))))
    }

    /// Notes in the image what its backing node shows now, so that an open of the chain refuses
    /// another image in its place; `is_known` false: that is not known any more. Durable when it
    /// returns. True if there is such a note now; a format that keeps none writes nothing.
    ///
    /// # Errors
    /// What reading the backing node, and writing the header, can fail with: the note is the old
    /// one, the new one, or there is none.
    fn mark_base(&self, _is_known: bool) -> BoxFuture<'_, Result<bool>> {
        Box::pin(std::future::ready(Ok(false)))
    }

    /// Checks whether [`Driver::amend`] could make this change, and the change of length if there
    /// is an option `size`. Writes nothing.
    ///
    /// # Errors
    /// `NotSupported`: the format has no options that can be changed; `InvalidInput`,
    /// `NotSupported`, `LimitExceeded`: this change is not possible.
    fn check_amend<'a>(&'a self, _amendment: &'a Amendment) -> BoxFuture<'a, Result<()>> {
        Box::pin(std::future::ready(Err(no_amend(self.name()))))
    }

    /// Changes options of the image; the bytes that are read stay the same. `size` is not among
    /// them: the request path resizes afterwards. No read, write or discard of the node runs
    /// meanwhile; flushes and queries may. Durable when it returns. A crash on the way leaves the
    /// old options or the new ones, and at most leaked space.
    ///
    /// # Errors
    /// As [`Driver::check_amend`], before anything is written. `Cancelled`: nothing has changed.
    /// After an I/O error the old options hold, or the new ones if it came at the very end.
    fn amend(&self, _amendment: Amendment) -> BoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Err(no_amend(self.name()))))
    }

    /// Makes the whole image show its backing node: it holds nothing itself from then on. Other
    /// requests to the node wait meanwhile. Not necessarily durable when it returns.
    ///
    /// # Errors
    /// `NotSupported`: the format cannot do that. After another error parts may be empty.
    fn make_empty(&self) -> BoxFuture<'_, Result<()>> {
        let words = format!("{} images cannot be emptied", self.name());
        Box::pin(std::future::ready(Err(Error::new(ErrorKind::NotSupported, words))))
    }

    /// Invalidates cached facts about children (a length, an alignment, abilities of the file): a
    /// child was re-pointed, or a node below or this one was exchanged or reopened. Called with no
    /// request in flight, before [`Driver::limits`] is read again, and also if nothing has changed.
    /// Must not block or call into the graph.
    fn children_changed(&self) {}

    /// Permissions this node needs on one of its children and shares with the child's other
    /// parents, given what its own parents do with it (`node`). A pure function of its arguments
    /// and of options: it is called often, also for changes that are not committed. The default
    /// follows from the child's role, see [`Access::of_child`].
    fn child_access(&self, _name: &str, role: Role, node: &NodeUse) -> Access {
        Access::of_child(role, node)
    }

    /// Begins a drained section: no request enters from now on, and requests that the driver delays
    /// (throttled ones) must go. Called before the wait for requests in flight, once until
    /// [`Driver::drain_end`]. Must not block or call into the graph.
    fn drain_begin(&self) {}

    /// Ends a drained section. Alternates strictly with [`Driver::drain_begin`], which comes first.
    fn drain_end(&self) {}

    /// Prepares other flags or options, with no request in flight. All that can fail happens here;
    /// the result takes effect in [`Reopen::commit`], or not at all. The default takes any flags
    /// that the graph itself implements (discard, zero detection, flush switches) and refuses a
    /// change of `read_only` or `cache.direct`. The result does not borrow the context, so that the
    /// caller can see which options were not taken.
    ///
    /// # Errors
    /// Nothing has changed.
    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(std::future::ready(super::reopen::by_default(self.name(), context)))
    }

    /// Writes back caches and releases locks that keep other processes from writing. Nothing is
    /// written until [`Driver::activate`]. Called with no request in flight.
    ///
    /// # Errors
    /// The node is as active as before.
    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Takes locks again and reloads caches: other processes may have changed the bytes meanwhile.
    /// Children are active already. Called with no request in flight.
    ///
    /// # Errors
    /// The node stays inactive; it may be tried again.
    fn activate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// The place in the image where persistent bitmaps are stored; `None` if the format has none. A
    /// filter has none: the bitmaps of a node are not those of its child.
    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        None
    }

    /// For copy offload between two drivers of one kind.
    fn as_any(&self) -> &dyn std::any::Any;

    /// Closes the driver, once: writes back what is left, reports failures. Children are still
    /// open.
    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

fn no_backing_record(driver: &str) -> Error {
    Error::new(ErrorKind::NotSupported, format!("{driver} images record no backing file"))
}

fn no_amend(driver: &str) -> Error {
    let words = format!("Format driver '{driver}' does not support option amendment");
    Error::new(ErrorKind::NotSupported, words)
}

fn no_snapshot<T: Send + 'static>(name: &'static str) -> BoxFuture<'static, Result<T>> {
    Box::pin(async move {
        Err(Error::new(ErrorKind::NotSupported, format!("{name} keeps no snapshot")))
    })
}

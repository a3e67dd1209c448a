//! Types and constants of the C header, all in one place.
//!
//! Layouts are fixed for the life of a SONAME: structs that begin with `struct_size` may grow at
//! their end, all others have reserved words and never change. No struct but the handles is passed
//! by value. Numbers of codes, flags and opcodes are never used again for something else.
#![allow(non_camel_case_types, reason = "these are C's names")]

use std::ffi::{c_char, c_void};

use libc::iovec;

/// Major version of this header.
pub const BDS_VERSION_MAJOR: u32 = 0;
/// Minor version of this header.
pub const BDS_VERSION_MINOR: u32 = 1;
/// Patch version of this header.
pub const BDS_VERSION_PATCH: u32 = 0;

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name {
            /// The number. 0 is no handle.
            pub raw: u64,
        }
    )*};
}

handles! {
    /// A block graph with its events and limits. One reference.
    bds_context;
    /// A builder for the JSON that `json` parameters take. One reference.
    bds_options;
    /// A thread that serves queues. One reference.
    bds_iothread;
    /// A node of the graph: an open image, protocol or filter. One reference; the node lives at
    /// least as long as it.
    bds_node;
    /// The user of a node, through which it is read and written. One reference.
    bds_backend;
    /// Edits of the graph that take effect together. One reference.
    bds_change;
    /// A drained section. It ends with the handle.
    bds_section;
    /// A queue of requests and their completions. One reference.
    bds_queue;
    /// A registered region of the caller's memory. One reference.
    bds_memory;
    /// A block job. It runs whether or not there is a handle.
    bds_job;
    /// Something that holds until it is released: a frozen chain, blocked operations, copy-on-read.
    /// It ends with the handle.
    bds_guard;
}

/// Results. 0 and above: success. -4095 to -1: a negative errno. -10000 and below: one of these.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum bds_status {
    /// Success. Of an unref: the object has ended with this call.
    BDS_OK = 0,
    /// Of an unref: others hold the object, which lives on. The handle is stale all the same.
    BDS_STILL_REFERENCED = 1,
    /// The handle was released, is 0, or was never given out. Nothing has happened.
    BDS_ERR_STALE = -10001,
    /// The handle is of another kind.
    BDS_ERR_KIND = -10002,
    /// A pointer is NULL or misaligned, a size or a combination of arguments is wrong, or two
    /// handles belong to different contexts.
    BDS_ERR_ARGUMENT = -10003,
    /// The library has a bug: it panicked. What the call worked on is poisoned.
    BDS_ERR_PANIC = -10004,
    /// A panic has poisoned the object: it can only be queried and released.
    BDS_ERR_POISONED = -10005,
    /// The process is a fork of the one that used the library. Call exec.
    BDS_ERR_FORKED = -10006,
    /// An unknown flag, opcode, reserved word or tail of a struct is not zero: the program was
    /// written for a later version.
    BDS_ERR_VERSION = -10008,
    /// An option or argument has a value that is not possible, alone or for this graph.
    BDS_ERR_OPTION = -10009,
    /// The text is no JSON, or not of the kind that is wanted.
    BDS_ERR_JSON = -10010,
    /// The text is not UTF-8.
    BDS_ERR_UTF8 = -10011,
    /// No such node, backend, child or request. (A missing file is -ENOENT.)
    BDS_ERR_NOT_FOUND = -10012,
    /// The name is taken. (An existing file is -EEXIST.)
    BDS_ERR_EXISTS = -10013,
    /// Another user holds, locks, blocks or froze it, or permissions conflict; the message names
    /// both.
    BDS_ERR_IN_USE = -10014,
    /// The user lacks a permission on the node.
    BDS_ERR_PERMISSION = -10015,
    /// The object is in a state in which this cannot be done.
    BDS_ERR_STATE = -10017,
    /// This build, driver or version cannot do it.
    BDS_ERR_UNSUPPORTED = -10018,
    /// An image breaks the rules of its format.
    BDS_ERR_CORRUPT = -10019,
    /// It was cancelled, or the context was shut down.
    BDS_ERR_CANCELLED = -10020,
    /// The node is inactive: another process may write to its image.
    BDS_ERR_INACTIVE = -10022,
    /// The node, or one below it, is read-only.
    BDS_ERR_READ_ONLY = -10024,
    /// The range ends past the end, or is longer than a request may be.
    BDS_ERR_RANGE = -10025,
    /// A file named inside an image may not be opened; see `BDS_CONTEXT_SAME_DIRECTORY`.
    BDS_ERR_REFERENCE = -10026,
    /// As many objects of this kind exist as the process can ever have.
    BDS_ERR_EXHAUSTED = -10027,
}

/// Receives messages that no call can return: what the library's drivers and jobs log.
///
/// Called from one thread of the library, one message at a time, with none of the library's locks
/// held that a call could wait for. It must not call the library, throw or longjmp; a sink that
/// takes long delays later messages only, and when some thousand wait, the oldest are dropped and
/// their number is a message. `level`: `BDS_LOG_`; `target`: the part of the library, as
/// "bds_drivers::format::qcow2"; `message`: one line of text. Both strings last until it returns.
/// The sink is not called any more once bds_context_unref has returned BDS_OK for the context.
pub type bds_log_fn = Option<
    extern "C" fn(user_data: u64, level: i32, target: *const c_char, message: *const c_char),
>;

/// Files named inside images may be opened if they lie beside the image.
pub const BDS_CONTEXT_SAME_DIRECTORY: u32 = 1;
/// All files named inside images may be opened. For trusted images.
pub const BDS_CONTEXT_TRUST_REFERENCES: u32 = 2;
/// With BDS_CONTEXT_TRUST_REFERENCES: the format of a backing file whose image does not say it is
/// guessed.
pub const BDS_CONTEXT_PROBE_REFERENCES: u32 = 4;

/// An error that no call returned.
pub const BDS_LOG_ERROR: u32 = 1;
/// Something is not as it should be, and was dealt with.
pub const BDS_LOG_WARNING: u32 = 2;
/// Something worth knowing happened.
pub const BDS_LOG_INFO: u32 = 3;
/// For the search for faults.
pub const BDS_LOG_DEBUG: u32 = 4;
/// All of it.
pub const BDS_LOG_TRACE: u32 = 5;

/// Options of a context. Begin with BDS_CONTEXT_OPTIONS_INIT.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct bds_context_options {
    /// sizeof(bds_context_options) of the caller.
    pub struct_size: usize,
    /// `BDS_CONTEXT_` flags. 0: no file named inside an image is opened.
    pub flags: u32,
    /// What `log` receives: `BDS_LOG_`, and everything more important; 0: BDS_LOG_WARNING.
    pub log_level: u32,
    /// Receives messages; may be NULL. Messages of drivers go to the sinks of all contexts.
    pub log: bds_log_fn,
    /// Passed to `log`.
    pub log_user_data: u64,
}

/// Says what an event is about. The names in the JSON are QEMU's.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum bds_event_type {
    /// No event.
    BDS_EVENT_NONE = 0,
    /// A request failed, and the error policy says what happens to it.
    BDS_EVENT_IO_ERROR = 1,
    /// A write ended past the node's threshold. `value`: by how many bytes.
    BDS_EVENT_WRITE_THRESHOLD = 2,
    /// A backend got a medium.
    BDS_EVENT_MEDIUM_INSERTED = 3,
    /// A backend lost its medium.
    BDS_EVENT_MEDIUM_EJECTED = 4,
    /// A backend's medium was replaced.
    BDS_EVENT_MEDIUM_REPLACED = 5,
    /// A device was attached to a backend.
    BDS_EVENT_DEVICE_ATTACHED = 6,
    /// A device was detached from a backend.
    BDS_EVENT_DEVICE_DETACHED = 7,
    /// A node was opened.
    BDS_EVENT_NODE_OPENED = 8,
    /// A node was closed. `status`: 0, or -EIO if data written earlier may not be durable.
    BDS_EVENT_NODE_CLOSED = 9,
    /// The graph was changed. `value`: its epoch.
    BDS_EVENT_GRAPH_CHANGED = 10,
    /// The context was shut down.
    BDS_EVENT_SHUTDOWN = 11,
    /// Events were lost because they were not fetched. `value`: how many.
    BDS_EVENT_LOST = 12,
    /// An event that this header does not know; its JSON says what it is.
    BDS_EVENT_OTHER = 13,
    /// A job is in another state; its JSON says which.
    BDS_EVENT_JOB_STATUS = 14,
    /// A job's target is in sync: bds_job_complete ends it.
    BDS_EVENT_JOB_READY = 15,
    /// A job waits for bds_job_finalize.
    BDS_EVENT_JOB_PENDING = 16,
    /// A request of a job failed. `value`: the offset; `status`: the errno, negative.
    BDS_EVENT_JOB_ERROR = 17,
    /// A job is over. `status`: 0, BDS_ERR_CANCELLED, or -EIO with the reason in the JSON.
    BDS_EVENT_JOB_FINISHED = 18,
}

/// An event. 64 bytes, fixed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct bds_event {
    /// Number of the event in its context, from 1.
    pub sequence: u64,
    /// Depends on the type.
    pub value: u64,
    /// One of `bds_event_type`.
    pub r#type: u32,
    /// Depends on the type.
    pub status: i32,
    /// Zero.
    pub reserved: [u64; 5],
}

/// The node is opened read-only.
pub const BDS_OPEN_READ_ONLY: u32 = 1;
/// Read-only if the file cannot be written.
pub const BDS_OPEN_AUTO_READ_ONLY: u32 = 2;
/// The image is opened although another process writes to it. For reading facts only.
pub const BDS_OPEN_FORCE_SHARE: u32 = 4;
/// The page cache is bypassed (O_DIRECT).
pub const BDS_OPEN_DIRECT: u32 = 8;
/// Discards reach the file (`discard=unmap`).
pub const BDS_OPEN_UNMAP: u32 = 16;
/// The format is guessed if `driver` is NULL. Never for images that a guest can write raw.
pub const BDS_OPEN_PROBE: u32 = 32;

/// Limits of requests to a node. Set `struct_size` before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct bds_limits {
    /// sizeof(bds_limits) of the caller.
    pub struct_size: usize,
    /// Offsets and lengths of data requests work best on multiples of this.
    pub request_alignment: u32,
    /// Addresses of buffers work best on multiples of this.
    pub memory_alignment: u32,
    /// Most segments of a data request.
    pub max_iov: u32,
    /// Discards work on multiples of this.
    pub discard_alignment: u32,
    /// Zero writes work best on multiples of this.
    pub zero_alignment: u32,
    /// Zero.
    pub reserved: u32,
    /// Length of the node in bytes.
    pub length: u64,
    /// Longest data request that is not split; 0: no limit.
    pub max_transfer: u64,
    /// Best size of a data request; 0: unknown.
    pub opt_transfer: u64,
    /// Longest discard that is not split; 0: no limit.
    pub max_discard: u64,
    /// Longest zero write that is not split; 0: no limit.
    pub max_zero: u64,
}

/// State of a job. The names are QEMU's.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum bds_job_state {
    /// It has not begun.
    BDS_JOB_STATE_CREATED = 1,
    /// It works.
    BDS_JOB_STATE_RUNNING = 2,
    /// It has stopped at a pause point.
    BDS_JOB_STATE_PAUSED = 3,
    /// Source and target are in sync; it works until it is completed or cancelled.
    BDS_JOB_STATE_READY = 4,
    /// It has stopped at a pause point, and was ready.
    BDS_JOB_STATE_STANDBY = 5,
    /// Its work succeeded; other jobs of its group still work.
    BDS_JOB_STATE_WAITING = 6,
    /// The work of its group succeeded; it waits for bds_job_finalize.
    BDS_JOB_STATE_PENDING = 7,
    /// It failed or was cancelled, and gives back what it holds.
    BDS_JOB_STATE_ABORTING = 8,
    /// It is over and holds nothing; it waits for bds_job_dismiss.
    BDS_JOB_STATE_CONCLUDED = 9,
    /// It was dismissed.
    BDS_JOB_STATE_NULL = 10,
}

/// The job works, or is about to.
pub const BDS_JOB_IS_BUSY: u32 = 1;
/// The job is to stop at its next pause point, or has stopped.
pub const BDS_JOB_IS_PAUSED: u32 = 2;
/// A mirror's target has every write that the source completed.
pub const BDS_JOB_IS_SYNCED: u32 = 4;

/// Facts about a job for a progress display. Set `struct_size` before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct bds_job_info {
    /// sizeof(bds_job_info) of the caller.
    pub struct_size: usize,
    /// A bds_job_state.
    pub state: u32,
    /// `BDS_JOB_IS_` flags.
    pub flags: u32,
    /// 0, or once the job is over, why it failed: as bds_job_wait returns it.
    pub status: i32,
    /// Zero.
    pub reserved: u32,
    /// What is done, in bytes for most jobs.
    pub progress: u64,
    /// What is to be done by now; grows when a guest writes.
    pub total: u64,
    /// Speed limit in bytes a second; 0: none.
    pub speed: u64,
}

/// Permission: data that is read is what was written.
pub const BDS_PERM_CONSISTENT_READ: u64 = 1;
/// Permission: writes.
pub const BDS_PERM_WRITE: u64 = 2;
/// Permission: writes that change nothing a reader sees.
pub const BDS_PERM_WRITE_UNCHANGED: u64 = 4;
/// Permission: changes of the length.
pub const BDS_PERM_RESIZE: u64 = 8;
/// All permissions.
pub const BDS_PERM_ALL: u64 = 15;

/// The caller is given the error.
pub const BDS_ON_ERROR_REPORT: u32 = 1;
/// The error is hidden; the request succeeds.
pub const BDS_ON_ERROR_IGNORE: u32 = 2;
/// The request waits for `bds_backend_resume`.
pub const BDS_ON_ERROR_STOP: u32 = 3;
/// Waits if space ran out, is reported otherwise.
pub const BDS_ON_ERROR_ENOSPC: u32 = 4;

/// `name` claims a name that `bds_backend_find` finds.
pub const BDS_BACKEND_CLAIM_NAME: u32 = 1;
/// Reads and writes: `permissions` are those of a writer.
pub const BDS_BACKEND_WRITABLE: u32 = 2;

/// Options of a backend. Begin with BDS_BACKEND_OPTIONS_INIT.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct bds_backend_options {
    /// sizeof(bds_backend_options) of the caller.
    pub struct_size: usize,
    /// Names the user in messages, events and queries; NULL: no name.
    pub name: *const c_char,
    /// `BDS_PERM_` flags; 0: reads, and with BDS_BACKEND_WRITABLE writes and resizes.
    pub permissions: u64,
    /// What others may do meanwhile, `BDS_PERM_` flags; 0: everything. BDS_PERM_WRITE_UNCHANGED
    /// alone is the least that can be said.
    pub shared_permissions: u64,
    /// `BDS_ON_ERROR_`; 0: report, or as QEMU's drives while a device is attached.
    pub on_read_error: u32,
    /// As `on_read_error`, for writes and flushes. Both or none are given.
    pub on_write_error: u32,
    /// `BDS_BACKEND_` flags.
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// The write is durable when it completes.
pub const BDS_REQ_FUA: u32 = 1;
/// A zero write may deallocate.
pub const BDS_REQ_MAY_UNMAP: u32 = 2;
/// A zero write that would have to write bytes fails with BDS_ERR_UNSUPPORTED instead.
pub const BDS_REQ_NO_FALLBACK: u32 = 4;
/// The request fails with -EAGAIN instead of waiting for one that overlaps.
pub const BDS_REQ_NO_WAIT: u32 = 8;
/// The write excludes every request that overlaps it.
pub const BDS_REQ_SERIALISING: u32 = 16;
/// The write is stored compressed: one whole cluster, or the tail of the image.
pub const BDS_REQ_COMPRESSED: u32 = 32;

/// The range holds data.
pub const BDS_EXTENT_DATA: u32 = 1;
/// The range reads as zeros.
pub const BDS_EXTENT_ZERO: u32 = 2;
/// A layer that was asked decides the range.
pub const BDS_EXTENT_ALLOCATED: u32 = 4;
/// The range ends at the end of the node.
pub const BDS_EXTENT_EOF: u32 = 8;
/// The bytes are stored compressed.
pub const BDS_EXTENT_COMPRESSED: u32 = 16;
/// `map_offset` is the place of the bytes in a file.
pub const BDS_EXTENT_OFFSET_VALID: u32 = 32;

/// A run of bytes of one kind. 40 bytes, fixed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct bds_extent {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
    /// Place in the file, with BDS_EXTENT_OFFSET_VALID.
    pub map_offset: u64,
    /// Id of the node that decides the range; 0: none of those that were asked.
    pub node_id: u64,
    /// `BDS_EXTENT_` flags.
    pub flags: u32,
    /// How many layers below the first the deciding one lies.
    pub depth: u32,
}

/// What a request does.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum bds_opcode {
    /// Reads into the buffer.
    BDS_OP_READ = 1,
    /// Writes the buffer. Flags: FUA, NO_WAIT, SERIALISING, COMPRESSED.
    BDS_OP_WRITE = 2,
    /// Makes writes durable that completed before it was submitted.
    BDS_OP_FLUSH = 3,
    /// Discards a range.
    BDS_OP_DISCARD = 4,
    /// Makes a range read as zeros. Flags: FUA, MAY_UNMAP, NO_FALLBACK, NO_WAIT.
    BDS_OP_WRITE_ZEROES = 5,
    /// Describes a range, as bds_block_status: `buffer` is an array of `iovcnt` extents, `bytes`
    /// the length of the range, `base` the node above which layers are asked. The completion's
    /// `value` says how many extents were written.
    BDS_OP_BLOCK_STATUS = 6,
    /// Copies from `backend` to `target` on the host; BDS_ERR_UNSUPPORTED: use buffers.
    BDS_OP_COPY_RANGE = 7,
}

/// A request. 128 bytes, fixed. Zero what is not used.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct bds_request {
    /// One of `bds_opcode`.
    pub opcode: u32,
    /// `BDS_REQ_` flags.
    pub flags: u32,
    /// What it works on.
    pub backend: bds_backend,
    /// First byte.
    pub offset: u64,
    /// How many bytes; with `iov` the sum of its lengths, or 0.
    pub bytes: u64,
    /// Comes back in the completion.
    pub user_data: u64,
    /// One buffer of `bytes` bytes, or NULL and `iov`. Belongs to the library until the completion
    /// is taken.
    pub buffer: *mut c_void,
    /// Segments, or NULL. The array itself is copied at submission; the memory it names belongs
    /// to the library until the completion is taken.
    pub iov: *const iovec,
    /// How many segments; BLOCK_STATUS: how many extents the buffer holds.
    pub iovcnt: u64,
    /// COPY_RANGE: where to.
    pub target: bds_backend,
    /// COPY_RANGE: first byte there.
    pub target_offset: u64,
    /// A registered region in which all segments lie, or none. It stays registered until the
    /// completion is taken.
    pub memory: bds_memory,
    /// Written by `bds_queue_submit`.
    pub request_id: u64,
    /// BLOCK_STATUS: only layers above this node are asked; 0: all.
    pub base: bds_node,
    /// Must be 0.
    pub reserved: [u64; 3],
}

/// A completion. 64 bytes, fixed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct bds_completion {
    /// The request's.
    pub user_data: u64,
    /// The request's.
    pub request_id: u64,
    /// 0, or the error.
    pub status: i32,
    /// Zero.
    pub flags: u32,
    /// BLOCK_STATUS: how many extents were written; otherwise zero.
    pub value: u64,
    /// Zero.
    pub reserved: [u64; 4],
}

/// bds_queue_submit only hands requests over: it never reads or writes in the calling thread. By
/// default a request that does not need to wait is done by the submission, and its completion is
/// there when that returns.
pub const BDS_QUEUE_OFFLOAD: u32 = 1;

/// Options of a queue. Begin with BDS_QUEUE_OPTIONS_INIT.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct bds_queue_options {
    /// sizeof(bds_queue_options) of the caller.
    pub struct_size: usize,
    /// Most requests in flight, completions not taken included; 1 to 65536.
    pub depth: u32,
    /// `BDS_QUEUE_` flags.
    pub flags: u32,
    /// The thread that serves the requests; none: one that all such queues share.
    pub iothread: bds_iothread,
}

/// Drains the node and everything below it.
pub const BDS_DRAIN_SUBTREE: u32 = 1;

/// The new length may be shorter: data at the end is lost.
pub const BDS_RESIZE_SHRINK: u32 = 1;

/// The bitmap is stored in the image.
pub const BDS_BITMAP_PERSISTENT: u32 = 1;
/// The bitmap does not record until it is enabled.
pub const BDS_BITMAP_DISABLED: u32 = 2;

/// Being copied by a backup job.
pub const BDS_BLOCK_BACKUP_SOURCE: u32 = 1;
/// Being written by a backup job.
pub const BDS_BLOCK_BACKUP_TARGET: u32 = 2;
/// Being committed into the node below.
pub const BDS_BLOCK_COMMIT_SOURCE: u32 = 4;
/// Being committed into.
pub const BDS_BLOCK_COMMIT_TARGET: u32 = 8;
/// Being deleted by name (bds_monitor_del, bds_backend_revoke).
pub const BDS_BLOCK_DELETE: u32 = 16;
/// Being taken out of a backend, or another one put in its place.
pub const BDS_BLOCK_EJECT: u32 = 32;
/// Getting an overlay.
pub const BDS_BLOCK_EXTERNAL_SNAPSHOT: u32 = 64;
/// Getting an internal snapshot, or losing one.
pub const BDS_BLOCK_INTERNAL_SNAPSHOT: u32 = 128;
/// Being copied by a mirror job.
pub const BDS_BLOCK_MIRROR_SOURCE: u32 = 256;
/// Being written by a mirror job.
pub const BDS_BLOCK_MIRROR_TARGET: u32 = 512;
/// Changing its length for a user.
pub const BDS_BLOCK_RESIZE: u32 = 1024;
/// Being filled from below.
pub const BDS_BLOCK_STREAM: u32 = 2048;
/// Giving its place to another node.
pub const BDS_BLOCK_REPLACE: u32 = 4096;
/// All of them.
pub const BDS_BLOCK_ALL: u32 = 8191;

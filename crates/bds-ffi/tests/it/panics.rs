//! A driver that panics: the call returns `BDS_ERR_PANIC`, what it worked on is poisoned, requests
//! of queues have their completions, and everything can be released.

use std::any::Any;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use bds_core::driver::{
    BoxFuture, Category, Driver, DriverType, OpenContext, Precision, ReadFlags, StatusRun,
    WriteFlags,
};
use bds_core::options::OptionSpec;
use bds_core::{Error, ErrorKind, Result};
use bds_ffi::backend::{bds_backend_create_on, bds_backend_ref, bds_backend_unref};
use bds_ffi::bds_opcode::BDS_OP_READ;
use bds_ffi::bds_status::{
    BDS_ERR_PANIC, BDS_ERR_POISONED, BDS_ERR_STALE, BDS_OK, BDS_STILL_REFERENCED,
};
use bds_ffi::context::{bds_context_create, bds_context_unref};
use bds_ffi::error::{bds_error_message, bds_error_status};
use bds_ffi::io::{bds_block_status, bds_pread};
use bds_ffi::node::bds_node_unref;
use bds_ffi::ptr::{Array, In, Out, Sink};
use bds_ffi::queue::{
    bds_queue_create, bds_queue_in_flight, bds_queue_submit, bds_queue_unref, bds_queue_wait,
};
use bds_ffi::testing::open_driver;
use bds_ffi::{
    bds_backend, bds_completion, bds_context, bds_extent, bds_memory, bds_node, bds_queue,
    bds_request,
};
use bds_io::IoVec;

/// Where it panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Open,
    TryRead,
    Read,
    Status,
}

struct Panicking(At);

impl Panicking {
    fn reached(&self, at: At) {
        assert_ne!(self.0, at, "injected");
    }
}

impl DriverType for Panicking {
    fn name(&self) -> &'static str {
        "panicking"
    }

    fn category(&self) -> Category {
        Category::Protocol
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        &[]
    }

    fn open<'a>(
        &'a self,
        _context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async {
            self.reached(At::Open);
            Ok(Box::new(Panicking(self.0)) as Box<dyn Driver>)
        })
    }
}

impl Driver for Panicking {
    fn name(&self) -> &'static str {
        "panicking"
    }

    fn len(&self) -> u64 {
        1 << 20
    }

    fn try_read(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        self.reached(At::TryRead);
        None
    }

    fn read(&self, _offset: u64, _iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.reached(At::Read);
            Ok(())
        })
    }

    fn write(&self, _offset: u64, _iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn block_status(
        &self,
        _offset: u64,
        _len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async {
            self.reached(At::Status);
            Err(Error::new(ErrorKind::NotSupported, "no status"))
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn out<T>(place: &mut T) -> Out<T> {
    // SAFETY: a place of ours.
    unsafe { Out::new(place) }
}

fn none<T>() -> In<T> {
    // SAFETY: NULL is allowed where this is used.
    unsafe { In::new(ptr::null()) }
}

fn context() -> bds_context {
    let mut context = bds_context::default();
    assert_eq!(bds_context_create(none(), out(&mut context)), 0);
    context
}

fn node(context: bds_context, at: At) -> bds_node {
    let mut node = bds_node::default();
    assert_eq!(open_driver(context, Arc::new(Panicking(at)), out(&mut node)), 0);
    node
}

fn backend(node: bds_node) -> bds_backend {
    let mut backend = bds_backend::default();
    assert_eq!(bds_backend_create_on(node, none(), out(&mut backend)), 0);
    backend
}

fn read(backend: bds_backend) -> i32 {
    let mut bytes = [0u8; 512];
    // SAFETY: 512 bytes of ours, until the call returns.
    bds_pread(backend, unsafe { Sink::new(bytes.as_mut_ptr().cast::<c_void>()) }, 512, 0, 0)
}

fn release(context: bds_context, node: bds_node, backend: bds_backend) {
    assert_eq!(bds_backend_unref(backend), BDS_OK as i32);
    assert!(bds_node_unref(node) >= 0);
    let code = bds_context_unref(context);
    assert!(code == BDS_OK as i32 || code == BDS_STILL_REFERENCED as i32);
}

#[test]
fn a_panic_is_a_code_and_poisons_what_the_call_worked_on() {
    for at in [At::TryRead, At::Read] {
        let context = context();
        let node = node(context, at);
        let reader = backend(node);
        assert_eq!(read(reader), BDS_ERR_PANIC as i32, "{at:?}");
        assert_eq!(bds_error_status(), BDS_ERR_PANIC as i32);
        // SAFETY: valid until this thread's next failing call.
        let message = unsafe { std::ffi::CStr::from_ptr(bds_error_message()) };
        assert!(message.to_str().unwrap().contains("injected"), "{message:?}");
        assert_eq!(read(reader), BDS_ERR_POISONED as i32);
        let mut other = bds_backend::default();
        assert_eq!(bds_backend_ref(reader, out(&mut other)), BDS_ERR_POISONED as i32);
        // Another user of the node is refused by the node, without a panic.
        let second = backend(node);
        let code = read(second);
        assert!(code < 0 && code != BDS_ERR_PANIC as i32, "{code}");
        assert!(bds_backend_unref(second) >= 0);
        release(context, node, reader);
        assert_eq!(read(reader), BDS_ERR_STALE as i32);
    }
}

#[test]
fn a_panic_in_open_leaves_nothing() {
    let context = context();
    let mut node = bds_node::default();
    let driver = Arc::new(Panicking(At::Open));
    assert_eq!(open_driver(context, driver, out(&mut node)), BDS_ERR_PANIC as i32);
    assert_eq!(node.raw, 0);
    assert!(bds_context_unref(context) >= 0);
}

#[test]
fn a_panic_in_a_query_poisons() {
    let context = context();
    let node = node(context, At::Status);
    let reader = backend(node);
    let mut extent = bds_extent::default();
    let mut count = 0;
    // SAFETY: one extent of ours.
    let extents = unsafe { Array::new(&raw mut extent) };
    let code = bds_block_status(reader, bds_node::default(), 0, 512, extents, 1, out(&mut count));
    assert_eq!(code, BDS_ERR_PANIC as i32);
    assert_eq!(read(reader), BDS_ERR_POISONED as i32);
    release(context, node, reader);
}

#[test]
fn a_request_of_a_queue_that_panics_has_its_completion() {
    for at in [At::TryRead, At::Read] {
        let context = context();
        let node = node(context, at);
        let reader = backend(node);
        let mut queue = bds_queue::default();
        assert_eq!(bds_queue_create(context, none(), out(&mut queue)), 0);
        let mut bytes = [0u8; 512];
        let mut request = bds_request {
            opcode: BDS_OP_READ as u32,
            flags: 0,
            backend: reader,
            offset: 0,
            bytes: 512,
            user_data: 5,
            buffer: bytes.as_mut_ptr().cast(),
            iov: ptr::null(),
            iovcnt: 0,
            target: bds_backend::default(),
            target_offset: 0,
            memory: bds_memory::default(),
            request_id: 0,
            base: bds_node::default(),
            reserved: [0; 3],
        };
        let mut done = bds_completion {
            user_data: 0,
            request_id: 0,
            status: 0,
            flags: 0,
            value: 0,
            reserved: [0; 4],
        };
        // The first one panics; later ones are refused by the poisoned node.
        for round in 0..3 {
            // SAFETY: ours, until the completion, which is taken below.
            let (requests, completions) =
                unsafe { (Array::new(&raw mut request), Array::new(&raw mut done)) };
            assert_eq!(bds_queue_submit(queue, requests, 1), 1);
            assert_eq!(bds_queue_wait(queue, completions, 1, 1, -1), 1);
            assert_eq!((done.user_data, done.request_id), (5, request.request_id));
            assert!(done.status < 0);
            assert_eq!(done.status == BDS_ERR_PANIC as i32, round == 0, "{at:?} {round}");
        }
        assert_eq!(bds_queue_in_flight(queue), 0);
        assert_eq!(bds_queue_unref(queue), BDS_OK as i32);
        release(context, node, reader);
    }
}

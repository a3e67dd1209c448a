//! `Op`: one operation on a file as a value that engines execute, and the future that waits for it.
//!
//! An `Op` owns the file and the memory it points at. Engines keep it until the operation is over,
//! so the future may be dropped or forgotten at any time.

use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::completion::Completion;
use crate::context::background;
use crate::current::{self, Current};
use crate::host::Descriptor;
use crate::long_write::InEngine;
use crate::{IoVec, sys};

/// Result of an operation: a count of bytes, or 0.
pub(crate) type OpResult = io::Result<usize>;

/// Kind of an operation, with its arguments.
#[derive(Debug)]
pub(crate) enum OpKind {
    Read {
        offset: u64,
        iov: IoVec,
    },
    Write {
        offset: u64,
        iov: IoVec,
        dsync: bool,
    },
    SyncData,
    /// `mode`: FALLOC_FL_*.
    Allocate {
        mode: libc::c_int,
        offset: u64,
        len: u64,
    },
    SetLen {
        len: u64,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    ZeroOut {
        offset: u64,
        len: u64,
    },
    CopyRange {
        offset: u64,
        target: Arc<Descriptor>,
        target_offset: u64,
        len: usize,
    },
}

/// An operation with its file and memory.
#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) file: Arc<Descriptor>,
    pub(crate) kind: OpKind,
    /// A long buffered write is counted in the engine as long as that keeps it.
    _in_engine: Option<InEngine>,
}

impl Op {
    /// Executes it on this thread, blocking.
    pub(crate) fn run(&self) -> OpResult {
        let fd = self.file.as_fd();
        let no_bytes = |()| 0;
        match &self.kind {
            OpKind::Read { offset, iov } => sys::read_at(fd, *offset, iov, 0),
            OpKind::Write { offset, iov, dsync } => {
                let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
                sys::write_at(fd, *offset, iov, flags)
            }
            OpKind::SyncData => sys::sync_data(fd).map(no_bytes),
            OpKind::Allocate { mode, offset, len } => {
                sys::allocate_range(fd, *mode, *offset, *len).map(no_bytes)
            }
            OpKind::SetLen { len } => sys::set_len(fd, *len).map(no_bytes),
            OpKind::Discard { offset, len } => sys::discard(fd, *offset, *len).map(no_bytes),
            OpKind::ZeroOut { offset, len } => sys::zero_out(fd, *offset, *len).map(no_bytes),
            OpKind::CopyRange { offset, target, target_offset, len } => {
                sys::copy_range(fd, *offset, target.as_fd(), *target_offset, *len)
            }
        }
    }
}

/// Future of an operation. It begins when first polled, on the engine of the Context that polls, or
/// on the background Context if none does; from then on it runs to completion, even if this future
/// is dropped.
#[derive(Debug)]
#[must_use = "an operation begins when its future is polled"]
pub(crate) enum OpFuture {
    New(Option<Op>),
    Waiting(Arc<Completion<OpResult>>),
}

impl OpFuture {
    pub(crate) fn new(file: &Arc<Descriptor>, kind: OpKind) -> OpFuture {
        OpFuture::counted(file, kind, None)
    }

    /// As [`OpFuture::new`], for a write that counts while it is in the engine.
    pub(crate) fn counted(
        file: &Arc<Descriptor>,
        kind: OpKind,
        in_engine: Option<InEngine>,
    ) -> OpFuture {
        OpFuture::New(Some(Op { file: file.clone(), kind, _in_engine: in_engine }))
    }
}

impl Future for OpFuture {
    type Output = OpResult;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<OpResult> {
        match &mut *self {
            OpFuture::Waiting(completion) => completion.poll(cx),
            OpFuture::New(op) => {
                let op = op.take().expect("a future is not polled after it is ready");
                let completion = Completion::new(cx.waker().clone());
                let rest = current::with(|current| match current {
                    Current::Host(local) => {
                        local.submit(op, completion.clone());
                        None
                    }
                    _ => Some(op),
                });
                if let Some(op) = rest {
                    match background() {
                        Ok(background) => background.submit(op, completion.clone()),
                        // No thread can be started: it is executed here.
                        Err(_) => return Poll::Ready(op.run()),
                    }
                }
                self.set(OpFuture::Waiting(completion));
                Poll::Pending
            }
        }
    }
}

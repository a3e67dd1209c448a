//! What a request does: opcode and flags, checked, and their execution on a backend.

use std::sync::Arc;

use bds_core::driver::{Attempt, WriteFlags, ZeroFlags};
use bds_core::graph::NodeId;
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

use crate::abi::bds_status::BDS_ERR_VERSION;
use crate::abi::{
    BDS_REQ_COMPRESSED, BDS_REQ_FUA, BDS_REQ_MAY_UNMAP, BDS_REQ_NO_FALLBACK, BDS_REQ_NO_WAIT,
    BDS_REQ_SERIALISING,
};
use crate::abi::{bds_node, bds_opcode};
use crate::backend::BackendShared;
use crate::context::{Context, check_flags, check_same};
use crate::extents::{self, Question};
use crate::failure::Failure;
use crate::node;

/// Flags of a write.
const WRITE_FLAGS: u32 = BDS_REQ_FUA | BDS_REQ_NO_WAIT | BDS_REQ_SERIALISING | BDS_REQ_COMPRESSED;
/// Flags of a zero write.
const ZERO_FLAGS: u32 = BDS_REQ_FUA | BDS_REQ_MAY_UNMAP | BDS_REQ_NO_FALLBACK | BDS_REQ_NO_WAIT;

/// An operation with its checked flags.
#[derive(Clone)]
pub(crate) enum Operation {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
        flags: WriteFlags,
    },
    WriteCompressed {
        offset: u64,
    },
    Flush,
    Discard {
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    },
    /// Its memory is an array of extents.
    BlockStatus(Question),
    CopyRange {
        offset: u64,
        len: u64,
        target: Arc<BackendShared>,
        target_offset: u64,
    },
}

/// Checks a write's flags.
pub(crate) fn write(offset: u64, flags: u32) -> Result<Operation, Failure> {
    check_flags(flags, WRITE_FLAGS)?;
    if flags & BDS_REQ_COMPRESSED != 0 {
        return match flags & !BDS_REQ_COMPRESSED {
            0 => Ok(Operation::WriteCompressed { offset }),
            _ => Err(Failure::argument("a compressed write has no other flags")),
        };
    }
    let mut bits = WriteFlags::empty();
    bits.set(WriteFlags::FUA, flags & BDS_REQ_FUA != 0);
    bits.set(WriteFlags::NO_WAIT, flags & BDS_REQ_NO_WAIT != 0);
    bits.set(WriteFlags::SERIALISING, flags & BDS_REQ_SERIALISING != 0);
    Ok(Operation::Write { offset, flags: bits })
}

/// Checks a zero write's flags.
pub(crate) fn write_zeroes(offset: u64, len: u64, flags: u32) -> Result<Operation, Failure> {
    check_flags(flags, ZERO_FLAGS)?;
    let mut bits = ZeroFlags::empty();
    bits.set(ZeroFlags::FUA, flags & BDS_REQ_FUA != 0);
    bits.set(ZeroFlags::MAY_UNMAP, flags & BDS_REQ_MAY_UNMAP != 0);
    bits.set(ZeroFlags::NO_FALLBACK, flags & BDS_REQ_NO_FALLBACK != 0);
    bits.set(ZeroFlags::NO_WAIT, flags & BDS_REQ_NO_WAIT != 0);
    Ok(Operation::WriteZeroes { offset, len, flags: bits })
}

/// The node below which a block status does not ask; a handle of 0: none.
pub(crate) fn base(context: &Arc<Context>, base: bds_node) -> Result<Option<NodeId>, Failure> {
    if base.raw == 0 {
        return Ok(None);
    }
    let node = node::find(base, "base")?;
    check_same(context, &node.context)?;
    Ok(Some(node.id()))
}

/// The opcode with this number.
pub(crate) fn opcode(number: u32) -> Result<bds_opcode, Failure> {
    use bds_opcode::{
        BDS_OP_BLOCK_STATUS, BDS_OP_COPY_RANGE, BDS_OP_DISCARD, BDS_OP_FLUSH, BDS_OP_READ,
        BDS_OP_WRITE, BDS_OP_WRITE_ZEROES,
    };
    [
        BDS_OP_READ,
        BDS_OP_WRITE,
        BDS_OP_FLUSH,
        BDS_OP_DISCARD,
        BDS_OP_WRITE_ZEROES,
        BDS_OP_BLOCK_STATUS,
        BDS_OP_COPY_RANGE,
    ]
    .into_iter()
    .find(|code| *code as u32 == number)
    .ok_or_else(|| Failure::new(BDS_ERR_VERSION, format!("unknown opcode {number}")))
}

impl Operation {
    /// Does it at once if that needs no waiting. `None`: call `run`.
    pub(crate) fn try_now(&self, backend: &BackendShared, iov: &IoVec) -> Option<Result<()>> {
        match self {
            Self::Read { offset } => backend.backend.try_read(*offset, iov),
            Self::Write { offset, flags } if flags.is_empty() => {
                backend.backend.try_write(*offset, iov)
            }
            _ => None,
        }
    }

    /// Does it, after `try_now` declined. Returns the completion's value.
    pub(crate) async fn run(self, backend: &BackendShared, iov: IoVec) -> Result<u64> {
        let backend = &backend.backend;
        match self {
            Self::Read { offset } => backend.read_waiting(offset, iov).await?,
            Self::Write { offset, flags } => backend.write_waiting(offset, iov, flags).await?,
            Self::WriteCompressed { offset } => backend.write_compressed(offset, iov).await?,
            Self::Flush => backend.flush().await?,
            Self::Discard { offset, len } => backend.discard(offset, len).await?,
            Self::WriteZeroes { offset, len, flags } => {
                done(backend.write_zeroes(offset, len, flags).await?, "the range would be written")?
            }
            Self::BlockStatus(question) => {
                let count = extents::describe_into(backend, question, &iov).await?;
                return Ok(count as u64);
            }
            Self::CopyRange { offset, len, target, target_offset } => done(
                target.backend.copy_range_from(backend, offset, target_offset, len).await?,
                "the host cannot copy this range; read and write it",
            )?,
        }
        Ok(0)
    }
}

fn done(attempt: Attempt, why: &str) -> Result<()> {
    match attempt {
        Attempt::Done => Ok(()),
        Attempt::Unsupported => Err(Error::new(ErrorKind::NotSupported, why)),
    }
}

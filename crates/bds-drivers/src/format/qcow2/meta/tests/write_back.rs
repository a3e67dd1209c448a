//! Which writes a flush of the image file makes durable.

use bds_core::ErrorKind;
use bds_core::driver::OpenFlags;
use bds_core::options::Options;
use bds_io::{Sim, SimConfig};
use futures_util::poll;

use crate::format::qcow2::driver::Qcow2;
use crate::format::qcow2::fuzzing::{self, MemPort};

/// Metadata written while a flush is under way is not durable when it ends: what depends on it
/// needs another one.
#[test]
fn a_flush_is_not_credited_with_writes_made_during_it() {
    let file = MemPort::default();
    fuzzing::create(Options::new().with("size", 1 << 20), &file, None).expect("there is memory");
    Sim::new(1, SimConfig::calm()).block_on(async {
        let flags = OpenFlags::default();
        let opened = fuzzing::open_image(&file, None, None, flags).await.expect("just made");
        let image = &opened.as_any().downcast_ref::<Qcow2>().expect("it is qcow2").image;
        let needs_flush = || image.meta().pending_flush.needs_meta_flush();
        image.meta().pending_flush.note_written();
        file.hold_flushes(true);
        let mut flush = Box::pin(image.flush_meta());
        assert!(poll!(&mut flush).is_pending());
        image.meta().pending_flush.note_written();
        file.hold_flushes(false);
        flush.await.expect("memory does not fail");
        assert!(needs_flush(), "a flush was credited with what was written after it had begun");
        file.fail_flushes(true);
        assert!(image.flush_meta().await.is_err_and(|error| error.kind() == ErrorKind::Io));
        assert!(needs_flush(), "a flush that failed was credited");
        file.fail_flushes(false);
        image.flush_meta().await.expect("memory does not fail");
        assert!(!needs_flush());
        opened.close().await.expect("memory does not fail");
    });
}

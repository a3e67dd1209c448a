//! Tests the request variants for callers that have tried `try_read` or `try_write` themselves.

use std::sync::atomic::Ordering;

use crate::driver::WriteFlags;
use crate::test_kit::disk::{Config, DiskGraph};
use crate::test_kit::{iov, run};

#[test]
fn waiting_variants_do_not_retry_inline() {
    run(1, async {
        let (disk, state) = DiskGraph::new().disk(vec![0; 4096], Config::default()).await;
        let attempts = || state.attempts.swap(0, Ordering::SeqCst);
        let buffer = iov(&[7; 512], 1);
        assert!(disk.try_write(0, &buffer).is_none(), "the driver has no inline way");
        assert_eq!(attempts(), 1);
        disk.write_waiting(0, buffer.clone(), WriteFlags::empty()).await.unwrap();
        assert_eq!(attempts(), 0, "a write");
        assert!(disk.try_read(0, &buffer).is_none());
        assert_eq!(attempts(), 1);
        let read = iov(&[0; 512], 1);
        disk.read_waiting(0, read.clone()).await.unwrap();
        assert_eq!(attempts(), 0, "a read");
        assert_eq!(read.to_vec(0..512), [7; 512]);
        disk.read(0, read).await.unwrap();
        assert_eq!(attempts(), 1, "'read' tries");
    });
}

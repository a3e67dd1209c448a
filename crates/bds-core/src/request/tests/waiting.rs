//! Requests of callers that have tried the inline way themselves.

use std::sync::atomic::Ordering;

use super::fake::{Config, House};
use super::{iov, run};
use crate::driver::WriteFlags;

#[test]
fn what_was_just_tried_inline_is_not_tried_again() {
    run(1, async {
        let (disk, state) = House::new().disk(vec![0; 4096], Config::default()).await;
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

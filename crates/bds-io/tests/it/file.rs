//! Files of the host, on every engine.

use std::io::ErrorKind;
use std::path::Path;

use bds_io::file::Extent;
use bds_io::{Buf, ByteLock, FileKind, Fs, IoVec, OpenOptions, ZeroMode};

use crate::support::{bytes, on_every_engine, pattern, scratch, scratch_with};

#[test]
fn reads_return_what_was_written() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        let data = pattern(100_000, 1);
        context.block_on(async {
            for (offset, dsync) in [(0, false), (12_345, true)] {
                let written = file.write(offset, data.clone().into(), dsync).await.unwrap();
                assert_eq!(written, data.len());
                let buf = Buf::zeroed(data.len(), 1);
                assert_eq!(file.read(offset, buf.iov()).await.unwrap(), data.len());
                assert!(bytes(&buf.iov()) == data);
            }
            file.sync_data().await.unwrap();
        });
    });
}

#[test]
fn scattered_transfers_keep_their_order() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        let data = pattern(3 * 70_000, 2);
        let parts: IoVec = data.chunks(70_000).map(|part| IoVec::from(part.to_vec())).collect();
        context.block_on(async {
            assert_eq!(file.write(5, parts, false).await.unwrap(), data.len());
            let into: IoVec =
                [1, 99_999, 110_000].iter().map(|len| Buf::zeroed(*len, 1).iov()).collect();
            assert_eq!(file.read(5, into.clone()).await.unwrap(), data.len());
            assert!(bytes(&into) == data);
        });
    });
}

#[test]
fn reads_at_the_end_are_short() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        context.block_on(async {
            file.write(0, pattern(1000, 3).into(), false).await.unwrap();
            let buf = Buf::zeroed(4096, 1);
            assert_eq!(file.read(600, buf.iov()).await.unwrap(), 400);
            assert_eq!(file.read(1000, buf.iov()).await.unwrap(), 0);
            assert_eq!(file.read(1 << 40, buf.iov()).await.unwrap(), 0);
            assert_eq!(file.read(0, IoVec::new()).await.unwrap(), 0);
        });
    });
}

#[test]
fn cached_bytes_are_read_at_once() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        context.block_on(async { file.write(0, pattern(4096, 4).into(), false).await }).unwrap();
        let buf = Buf::zeroed(4096, 1);
        match file.try_read(0, &buf.iov()) {
            Some(read) => {
                assert_eq!(read.unwrap(), 4096);
                assert!(bytes(&buf.iov()) == pattern(4096, 4));
            }
            None => println!("skipped: this file system has no RWF_NOWAIT"),
        }
    });
}

#[test]
fn direct_files_read_what_was_written_aligned() {
    on_every_engine(|context| {
        let dir = tempfile::tempdir().unwrap();
        let options =
            OpenOptions { write: true, create: true, direct: true, ..OpenOptions::default() };
        let file = match Fs::Host.open(&dir.path().join("direct"), &options) {
            Ok(file) => file,
            Err(error) => return println!("skipped: no O_DIRECT here: {error}"),
        };
        let (memory, offset) = file.alignment().unwrap();
        assert!(memory.is_power_of_two() && offset.is_power_of_two(), "{memory} {offset}");
        context.block_on(async {
            let data = pattern(65_536, 5);
            let from = Buf::from_slice(&data);
            assert!(file.try_write(0, &from.iov()).is_none());
            assert_eq!(file.write(4096, from.iov(), false).await.unwrap(), data.len());
            let into = Buf::zeroed(data.len(), 4096);
            assert!(file.try_read(4096, &into.iov()).is_none());
            assert_eq!(file.read(4096, into.iov()).await.unwrap(), data.len());
            assert!(bytes(&into.iov()) == data);
            let error = file.read(1, into.slice(0..4096)).await.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        });
    });
}

#[test]
fn ranges_are_zeroed_and_punched() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        context.block_on(async {
            file.write(0, vec![1; 1 << 20].into(), false).await.unwrap();
            file.sync_data().await.unwrap();
            let full = file.allocated_len().unwrap();
            file.zero_range(0..65_536, ZeroMode::Allocate).await.unwrap();
            file.zero_range(65_536..262_144, ZeroMode::PunchHole).await.unwrap();
            assert!(file.allocated_len().unwrap() <= full - 131_072);
            let buf = Buf::zeroed(1 << 20, 1);
            assert_eq!(file.read(0, buf.iov()).await.unwrap(), 1 << 20);
            assert!(buf.iov().is_zero(0..262_144));
            assert_eq!(bytes(&buf.slice(262_144..1 << 20)), vec![1; (1 << 20) - 262_144]);
            assert_eq!(file.len().unwrap(), 1 << 20);
            file.zero_range(1 << 20..2 << 20, ZeroMode::Extend).await.unwrap();
            assert_eq!(file.len().unwrap(), 2 << 20);
            file.zero_range(3 << 20..4 << 20, ZeroMode::PunchHole).await.unwrap();
            assert_eq!(file.len().unwrap(), 2 << 20);
            file.zero_range(5..5, ZeroMode::PunchHole).await.unwrap();
        });
    });
}

#[test]
fn extents_distinguish_data_from_holes() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        context.block_on(async {
            file.set_len(4 << 20).await.unwrap();
            file.write(1 << 20, vec![1; 1 << 20].into(), false).await.unwrap();
        });
        let extent = |is_data, len| Some(Extent { is_data, len });
        let cases = [
            (0, extent(false, 1 << 20)),
            (4096, extent(false, (1 << 20) - 4096)),
            (1 << 20, extent(true, 1 << 20)),
            ((2 << 20) - 4096, extent(true, 4096)),
            (3 << 20, extent(false, 1 << 20)),
            (4 << 20, None),
            (5 << 20, None),
        ];
        for (offset, expected) in cases {
            assert_eq!(file.extent(offset).unwrap(), expected, "{offset}");
        }
    });
}

#[test]
fn ranges_are_copied_between_files() {
    on_every_engine(|context| {
        let ((_d1, from), (_d2, to)) = (scratch(), scratch());
        let data = pattern(100_000, 6);
        context.block_on(async {
            from.write(0, data.clone().into(), false).await.unwrap();
            let mut done = 0;
            while done < 90_000 {
                let copied = match from.copy_range_to(100 + done, &to, done, 90_000 - done).await {
                    Ok(copied) => copied,
                    Err(error) => return println!("skipped: no copy_file_range here: {error}"),
                };
                assert!(copied > 0);
                done += copied;
            }
            let buf = Buf::zeroed(90_000, 1);
            assert_eq!(to.read(0, buf.iov()).await.unwrap(), 90_000);
            assert_eq!(bytes(&buf.iov()), &data[100..90_100]);
        });
    });
}

#[test]
fn locks_of_another_description_are_seen() {
    let (dir, file) = scratch();
    let other =
        Fs::Host.open(&dir.path().join("disk"), &OpenOptions { write: true, ..Default::default() });
    let other = other.unwrap();
    let lock = ByteLock { offset: 100, len: 1 };
    assert!(!other.is_locked_by_others(lock).unwrap());
    file.lock_shared(lock).unwrap();
    assert!(other.is_locked_by_others(lock).unwrap());
    assert!(!file.is_locked_by_others(lock).unwrap(), "one's own lock is no other's");
    assert!(!other.is_locked_by_others(ByteLock { offset: 101, len: 50 }).unwrap());
    other.lock_shared(lock).unwrap();
    let clone = file.clone();
    file.unlock(lock).unwrap();
    assert!(clone.is_locked_by_others(lock).unwrap());
    drop(other);
    assert!(!clone.is_locked_by_others(lock).unwrap());
}

#[test]
fn locks_are_released_with_the_last_clone_and_operation() {
    on_every_engine(|context| {
        let (dir, file) = scratch();
        let lock = ByteLock { offset: 7, len: 1 };
        file.lock_shared(lock).unwrap();
        let clone = file.clone();
        context.block_on(async move {
            file.write(0, vec![1; 4096].into(), true).await.unwrap();
            file.sync_data().await.unwrap();
        });
        let other = Fs::Host.open(&dir.path().join("disk"), &OpenOptions::default()).unwrap();
        // Asking for an exclusive lock's conflicts needs no write access.
        assert!(other.is_locked_by_others(lock).unwrap());
        drop(clone);
        assert!(!other.is_locked_by_others(lock).unwrap());
    });
}

#[test]
fn redirect_closes_the_description_of_all_clones() {
    on_every_engine(|context| {
        let (dir, file) = scratch();
        let path = dir.path().join("disk");
        let lock = ByteLock { offset: 7, len: 1 };
        file.lock_shared(lock).unwrap();
        let clone = file.clone();
        context.block_on(async { file.write(0, vec![1; 4096].into(), false).await }).unwrap();
        let reader = Fs::Host.open(&path, &OpenOptions::default()).unwrap();
        assert!(reader.is_locked_by_others(lock).unwrap());

        file.redirect(&reader).unwrap();
        assert!(!reader.is_locked_by_others(lock).unwrap(), "its locks went with it");
        assert_eq!(clone.identity().unwrap(), reader.identity().unwrap());
        let (written, read) = context.block_on(async {
            let written = clone.write(0, vec![2; 512].into(), false).await;
            (written, file.read(0, IoVec::from(vec![0; 512])).await)
        });
        assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EBADF), "it only reads now");
        assert_eq!(read.unwrap(), 512);
        drop((file, clone));
        let again = context.block_on(reader.read(0, IoVec::from(vec![0; 512])));
        assert_eq!(again.unwrap(), 512, "the other one is a description of its own still");
    });
}

#[test]
fn kinds_and_identities() {
    let (dir, file) = scratch();
    assert_eq!(file.kind(), FileKind::Regular);
    let link = dir.path().join("link");
    std::fs::hard_link(dir.path().join("disk"), &link).unwrap();
    let same = Fs::Host.open(&link, &OpenOptions::default()).unwrap();
    assert_eq!(file.identity().unwrap(), same.identity().unwrap());
    let (_dir2, other) = scratch();
    assert_ne!(file.identity().unwrap(), other.identity().unwrap());
    let null = Fs::Host.open(Path::new("/dev/null"), &OpenOptions::default()).unwrap();
    assert_eq!(null.kind(), FileKind::Char);
    let directory = Fs::Host.open(dir.path(), &OpenOptions::default()).unwrap();
    assert_eq!(directory.kind(), FileKind::Directory);
}

#[test]
fn open_creates_only_with_the_option() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new");
    let open = |write, create, exclusive| {
        let options = OpenOptions { write, create, exclusive, ..OpenOptions::default() };
        Fs::Host.open(&path, &options).map(drop).map_err(|error| error.kind())
    };
    assert_eq!(open(true, false, false), Err(ErrorKind::NotFound));
    assert_eq!(open(true, true, false), Ok(()));
    assert_eq!(open(true, true, false), Ok(()), "an existing file is fine without `exclusive`");
    assert_eq!(open(true, true, true), Err(ErrorKind::AlreadyExists));
    assert_eq!(open(false, false, false), Ok(()));
}

#[test]
fn errors_keep_their_errno() {
    on_every_engine(|context| {
        let (dir, _) = scratch();
        let read_only = Fs::Host.open(&dir.path().join("disk"), &OpenOptions::default()).unwrap();
        let errno = |result: std::io::Result<usize>| result.unwrap_err().raw_os_error();
        context.block_on(async {
            let iov = IoVec::from(vec![0; 10]);
            assert_eq!(errno(read_only.write(0, iov.clone(), false).await), Some(libc::EBADF));
            assert_eq!(errno(read_only.write(0, iov.clone(), true).await), Some(libc::EBADF));
            assert_eq!(errno(read_only.read(u64::MAX, iov.clone()).await), Some(libc::EFBIG));
            let set_len = read_only.set_len(1).await.unwrap_err();
            assert_eq!(set_len.raw_os_error(), Some(libc::EINVAL));
        });
        let (_dir, file) = scratch();
        let backwards = std::ops::Range { start: 10, end: 5 };
        let zero = context.block_on(file.zero_range(backwards, ZeroMode::PunchHole)).unwrap_err();
        assert_eq!(zero.raw_os_error(), Some(libc::EINVAL));
    });
}

#[test]
fn writes_above_the_inline_limit_go_to_the_engine() {
    on_every_engine(|context| {
        let options = OpenOptions { inline_write_max_bytes: Some(0), ..OpenOptions::default() };
        let (_dir, file) = scratch_with(&options);
        let data = pattern(10_000, 7);
        context.block_on(async {
            assert_eq!(file.write(0, data.clone().into(), false).await.unwrap(), data.len());
            let buf = Buf::zeroed(data.len(), 1);
            file.read(0, buf.iov()).await.unwrap();
            assert!(bytes(&buf.iov()) == data);
        });
    });
}

#[test]
fn long_writes_that_start_together_reach_the_file() {
    on_every_engine(|context| {
        let (_dir, file) = scratch();
        const LEN: usize = 64 << 10;
        // Some start together, some while others are under way, some are alone.
        for count in [1_u8, 2, 3, 16] {
            let data: Vec<_> = (0..count).map(|n| pattern(LEN, n + 1)).collect();
            context.block_on(async {
                let writes = data.iter().enumerate().map(|(n, data)| {
                    let file = &file;
                    async move {
                        let at = (n * LEN) as u64;
                        assert_eq!(file.write(at, data.clone().into(), false).await.unwrap(), LEN);
                    }
                });
                futures_util::future::join_all(writes).await;
                for (n, data) in data.iter().enumerate() {
                    let buf = Buf::zeroed(LEN, 1);
                    file.read((n * LEN) as u64, buf.iov()).await.unwrap();
                    assert!(bytes(&buf.iov()) == *data, "write {n} of {count}");
                }
            });
        }
    });
}

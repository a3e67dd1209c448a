//! Tests of the preallocate filter. The sweeps (`sweep/`) inject faults into it, under qcow2.

use std::path::Path;
use std::sync::Arc;

use bds_core::driver::{Attempt, Prealloc, Truncate, WriteFlags, ZeroFlags};
use bds_core::graph::walk;
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Options, Result};
use bds_io::sim::{Fault, OpMask};
use bds_io::{Buf, OpenOptions, Sim, SimConfig};
use futures_util::future::join_all;
use serde_json::json;

use crate::kit::Fixture;

const ALIGN: u64 = 4096;
const AHEAD: u64 = 50_000;

/// An empty file below the filter `ahead`, below a format that writes anywhere.
struct Setup {
    fixture: Fixture,
    disk: Backend,
}

impl Setup {
    fn new(sim: Sim) -> Self {
        let mut registry = bds_drivers::registry();
        registry.register(Arc::new(growing::Log)).unwrap();
        let fixture = Fixture::with_registry(sim, registry);
        let create = OpenOptions { write: true, create: true, ..OpenOptions::default() };
        fixture.sim.fs().open(Path::new("/disks/f"), &create).unwrap();
        let disk = fixture.backend(json!({"driver": "log", "file": {
            "driver": "preallocate", "node-name": "ahead",
            "prealloc-align": ALIGN, "prealloc-size": AHEAD,
            "file": {"driver": "file", "node-name": "f", "filename": "/disks/f"},
        }}));
        Self { disk: disk.unwrap(), fixture }
    }

    fn len(&self, node: &str) -> u64 {
        self.fixture.graph.find(node).unwrap().len()
    }

    fn write(&self, at: u64, byte: u8, len: usize) -> Result<()> {
        self.fixture.write(&self.disk, at, &vec![byte; len])
    }

    fn zero(&self, at: u64, len: u64, flags: ZeroFlags) {
        let done = self.fixture.sim.block_on(self.disk.write_zeroes(at, len, flags)).unwrap();
        assert_eq!(done, Attempt::Done);
    }

    fn resize(&self, len: u64) -> Result<()> {
        let change = Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: true };
        self.fixture.sim.block_on(self.disk.truncate(change))
    }

    /// Closes all nodes; returns the bytes of the file.
    fn close(self) -> Vec<u8> {
        let node = self.disk.node().unwrap();
        drop(self.disk);
        let report = self.fixture.sim.block_on(node.close()).unwrap();
        assert!(report.is_clean(), "{report:?}");
        let file = json!({"driver": "file", "filename": "/disks/f", "read-only": true});
        let file = self.fixture.backend(file).unwrap();
        self.fixture.read(&file, 0, usize::try_from(file.len()).unwrap()).unwrap()
    }
}

/// No random delays or short transfers, so that operations can be counted.
fn calm() -> Sim {
    Sim::new(1, SimConfig::calm())
}

#[test]
fn the_file_grows_ahead_and_parents_see_the_data_length() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 1000).unwrap();
    assert_eq!((setup.len("ahead"), setup.len("f")), (1000, 53_248));
    let zeros = setup.fixture.sim.ops_of(OpMask::ZERO);
    for n in 1..50 {
        setup.write(n * 1000, 1, 1000).unwrap();
    }
    assert_eq!((setup.len("ahead"), setup.len("f")), (50_000, 53_248));
    assert_eq!(setup.fixture.sim.ops_of(OpMask::ZERO), zeros, "the space was allocated before");
    setup.write(53_000, 2, 1000).unwrap();
    assert_eq!((setup.len("ahead"), setup.len("f")), (54_000, 106_496));
    assert_eq!(setup.fixture.read(&setup.disk, 50_000, 10_000).unwrap()[..3000], [0; 3000]);
    let bytes = setup.close();
    assert_eq!(bytes.len(), 54_000);
    assert!(bytes[..50_000] == [1; 50_000] && bytes[53_000..] == [2; 1000]);
}

#[test]
fn zero_writes_to_unwritten_space_cost_no_io() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 1000).unwrap();
    let before = setup.fixture.sim.writes();
    setup.zero(1000, 5000, ZeroFlags::empty());
    setup.zero(7000, 1000, ZeroFlags::empty());
    assert_eq!((setup.fixture.sim.writes(), setup.len("ahead")), (before, 8000));
    // FUA and unmapping zero writes, and those over data, are done.
    setup.zero(8000, 100, ZeroFlags::FUA);
    assert!(setup.fixture.sim.writes() > before);
    setup.write(20_000, 3, 1000).unwrap();
    setup.zero(20_500, 100, ZeroFlags::empty());
    let bytes = setup.close();
    assert_eq!(bytes.len(), 21_000);
    assert!(bytes[1000..20_000].iter().all(|byte| *byte == 0));
    assert!(bytes[20_000..20_500] == [3; 500] && bytes[20_500..20_600] == [0; 100]);
}

#[test]
fn a_shrunk_and_regrown_range_reads_as_zeros() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 30_000).unwrap();
    setup.resize(10_000).unwrap();
    assert_eq!((setup.len("ahead"), setup.len("f")), (10_000, 10_000));
    setup.resize(20_000).unwrap();
    setup.write(20_000, 2, 1).unwrap();
    // A write into the space that was allocated.
    let before = setup.fixture.sim.writes();
    setup.resize(25_000).unwrap();
    assert_eq!((setup.fixture.sim.writes(), setup.len("ahead")), (before, 25_000));
    let bytes = setup.close();
    assert_eq!(bytes.len(), 25_000);
    assert!(bytes[..10_000] == [1; 10_000] && bytes[20_000] == 2);
    assert!(bytes[10_000..20_000].iter().chain(&bytes[20_001..]).all(|byte| *byte == 0));
}

/// A write far behind the end allocates space around itself, not for the whole hole.
#[test]
fn holes_stay_holes() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 1000).unwrap();
    setup.write(40 << 20, 2, 1000).unwrap();
    let used = setup.fixture.sim.block_on(
        setup
            .disk
            .node()
            .unwrap()
            .graph()
            .find("f")
            .map(|node| {
                let backend = Backend::new(&node, BackendOptions::default()).unwrap();
                async move { backend.allocated_len().await.unwrap().unwrap() }
            })
            .unwrap(),
    );
    assert!(used < 300_000, "{used}");
    assert_eq!(setup.close().len(), (40 << 20) + 1000);
}

#[test]
fn without_fast_zeroing_requests_pass_through() {
    let config = SimConfig { unsupported: OpMask::ZERO, ..SimConfig::default() };
    let setup = Setup::new(Sim::new(1, config));
    for n in 0..5 {
        setup.write(n * 1000, 1, 1000).unwrap();
    }
    assert_eq!((setup.len("ahead"), setup.len("f")), (5000, 5000));
    assert!(setup.close() == [1; 5000]);
}

#[test]
fn a_failed_preallocation_fails_no_write() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 1000).unwrap();
    setup.fixture.sim.fail_nth(0, Fault::sticky(libc::ENOSPC).on(OpMask::ZERO));
    let writes = (0..20_u64).map(|n| {
        let iov = Buf::from_slice(&[7; 3000]).iov();
        setup.disk.write(52_000 + n * 3000, iov, WriteFlags::empty())
    });
    for result in setup.fixture.sim.block_on(join_all(writes)) {
        result.unwrap();
    }
    assert_eq!((setup.len("ahead"), setup.len("f")), (112_000, 112_000));
    setup.fixture.sim.clear_faults();
    setup.write(112_000, 7, 10).unwrap();
    assert!(setup.len("f") > 150_000);
    let bytes = setup.close();
    assert!(bytes.len() == 112_010 && bytes[52_000..].iter().all(|byte| *byte == 7));
}

#[test]
fn a_failed_write_leaves_old_or_new_bytes() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 1000).unwrap();
    setup.fixture.sim.fail_nth(0, Fault::once(libc::EIO).on(OpMask::WRITE).partially());
    let write = setup.write(1000, 9, 3000);
    assert_eq!(write.unwrap_err().errno(), libc::EIO);
    setup.resize(20_000).unwrap();
    let bytes = setup.close();
    assert!(bytes[1000..4000].iter().all(|byte| *byte == 0 || *byte == 9));
    assert!(bytes.len() == 20_000 && bytes[4000..].iter().all(|byte| *byte == 0));
}

#[test]
fn many_writers_past_the_end_lose_nothing() {
    for seed in 0..50 {
        let setup = Setup::new(Sim::new(seed, SimConfig::default()));
        let mut order: Vec<u64> = (0..60).collect();
        order.rotate_left(usize::try_from(seed).unwrap());
        let writes = order.iter().map(|n| {
            let n = *n;
            let disk = &setup.disk;
            async move {
                let byte = u8::try_from(n + 1).unwrap();
                let iov = Buf::from_slice(&[byte; 5000]).iov();
                disk.write(n * 5000, iov, WriteFlags::empty()).await.unwrap();
            }
        });
        setup.fixture.sim.block_on(join_all(writes));
        let bytes = setup.close();
        let is_right = |(at, byte): (usize, &u8)| usize::from(*byte) == at / 5000 + 1;
        assert!(bytes.len() == 300_000 && bytes.iter().enumerate().all(is_right), "seed {seed}");
    }
}

/// A write is dropped while it allocates space, and another one starts there at once: late zeros
/// must not overwrite its bytes.
#[test]
fn a_dropped_preallocation_does_not_overwrite_a_later_write() {
    for seed in 0..300 {
        let setup = Setup::new(Sim::new(seed, SimConfig::default()));
        setup.write(0, 1, 1000).unwrap();
        setup.fixture.sim.block_on(async {
            let iov = Buf::from_slice(&[2; 1000]).iov();
            let mut growing = Box::pin(setup.disk.write(60_000, iov, WriteFlags::empty()));
            for _ in 0..=seed % 6 {
                if futures_util::poll!(growing.as_mut()).is_ready() {
                    break;
                }
                bds_io::yield_now().await;
            }
            drop(growing);
            let iov = Buf::from_slice(&[3; 9000]).iov();
            setup.disk.write(61_000, iov, WriteFlags::empty()).await.unwrap();
        });
        setup.fixture.sim.run_until_idle();
        let bytes = setup.close();
        assert!(bytes.len() == 70_000 && bytes[61_000..] == [3; 9000], "seed {seed}");
    }
}

#[test]
fn other_users_cannot_resize_the_file() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 1000).unwrap();
    let file = setup.fixture.graph.find("f").unwrap();
    let writer =
        || BackendOptions { name: "other".into(), writable: true, ..BackendOptions::default() };
    let error = Backend::new(&file, writer()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.to_string().contains("ahead.file"), "{error}");
    // Inactive, the file has no surplus; on activation the filter measures its length again, which
    // may have changed.
    let Setup { fixture, disk } = setup;
    let node = disk.node().unwrap();
    drop(disk);
    fixture.sim.block_on(fixture.graph.inactivate(&node)).unwrap();
    assert_eq!(file.len(), 1000);
    fixture.sim.block_on(fixture.graph.activate(&node)).unwrap();
    let disk = Backend::new(&node, writer()).unwrap();
    fixture.write(&disk, 1000, &[2; 500]).unwrap();
    assert!(file.len() > 50_000);
    assert_eq!(fixture.read(&disk, 0, 2000).unwrap()[999..1501], {
        let mut expected = [2; 502];
        (expected[0], expected[501]) = (1, 0);
        expected
    });
}

#[test]
fn reopen_read_only_trims_the_surplus() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 1000).unwrap();
    let Setup { fixture, disk } = setup;
    drop(disk);
    fixture.sim.block_on(fixture.graph.reap());
    let options = json!({
        "driver": "preallocate", "prealloc-size": AHEAD,
        "file": {"driver": "file", "node-name": "f", "filename": "/disks/f"},
    });
    let log = json!({"driver": "log", "node-name": "log", "file": options});
    let disk = fixture.backend(log).unwrap();
    fixture.write(&disk, 1000, &[2; 1000]).unwrap();
    let node = disk.node().unwrap();
    drop(disk);
    let file = fixture.graph.find("f").unwrap();
    assert!(file.len() > 2000);
    let mode = |is_read_only: bool| {
        let options = Options::new().with("read-only", is_read_only);
        let filter = walk::child(&node, "file").unwrap().0;
        fixture.sim.block_on(fixture.graph.reopen(&filter, options))
    };
    // The format above does not accept read-only, so only the surplus changes.
    let error = mode(true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    assert_eq!(file.len(), 2000);
    let disk = Backend::new(
        &node,
        BackendOptions { name: "test".into(), writable: true, ..BackendOptions::default() },
    )
    .unwrap();
    fixture.write(&disk, 2000, &[3; 1000]).unwrap();
    assert!(file.len() > 3000);
    drop(disk);
    let filter = walk::child(&node, "file").unwrap().0;
    fixture.sim.block_on(node.close()).unwrap();
    fixture
        .sim
        .block_on(fixture.graph.reopen(&filter, Options::new().with("read-only", true)))
        .unwrap();
    assert_eq!((filter.len(), file.len(), filter.is_writable()), (3000, 3000, false));
    fixture
        .sim
        .block_on(fixture.graph.reopen(&filter, Options::new().with("read-only", false)))
        .unwrap();
    let disk = Backend::new(
        &filter,
        BackendOptions { name: "test".into(), writable: true, ..BackendOptions::default() },
    )
    .unwrap();
    assert_eq!(fixture.read(&disk, 1000, 2000).unwrap()[999..1001], [2, 3]);
}

#[test]
fn wrong_options_are_refused_and_a_read_only_file_is_only_read() {
    let setup = Setup::new(calm());
    setup.write(0, 1, 1000).unwrap();
    let Setup { fixture, disk } = setup;
    drop(disk);
    fixture.sim.block_on(fixture.graph.reap());
    for align in [0, 100, 513] {
        let file = json!({"driver": "mem"});
        let options = json!({"driver": "preallocate", "prealloc-align": align, "file": file});
        let error = fixture.node(options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("prealloc-align"), "{error}");
    }
    let file = json!({"driver": "file", "filename": "/disks/f"});
    let options = json!({"driver": "preallocate", "read-only": true, "file": file});
    let disk = fixture.backend(options).unwrap();
    assert_eq!(fixture.read(&disk, 0, 1000).unwrap(), [1; 1000]);
    assert_eq!(disk.len(), 1000);
}

/// A format that writes past the end of its file, as qcow2 does, at the given offset.
mod growing {
    use bds_core::driver::{
        BoxFuture, Category, Child, Driver, DriverType, OpenContext, ReadFlags, Role, StatusFlags,
        StatusRun, Truncate, WriteFlags, ZeroFlags,
    };
    use bds_core::options::{OptionKind, OptionSpec};
    use bds_core::{Result, driver::Attempt};
    use bds_io::IoVec;

    /// A disk of 1 GiB, whatever the file's length.
    pub(super) struct Log;

    struct LogNode(Child);

    impl Driver for LogNode {
        fn name(&self) -> &'static str {
            "log"
        }

        fn len(&self) -> u64 {
            1 << 30
        }

        fn zero_flags(&self) -> Option<ZeroFlags> {
            Some(ZeroFlags::all())
        }

        fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
            self.0.read(offset, iov, flags)
        }

        fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
            self.0.write(offset, iov, flags)
        }

        fn write_zeroes(
            &self,
            offset: u64,
            len: u64,
            flags: ZeroFlags,
        ) -> BoxFuture<'_, Result<Attempt>> {
            self.0.write_zeroes(offset, len, flags)
        }

        fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
            self.0.truncate(change)
        }

        fn block_status(
            &self,
            _: u64,
            len: u64,
            _: bds_core::driver::Precision,
        ) -> BoxFuture<'_, Result<StatusRun>> {
            Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::DATA, map: None }) })
        }

        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    }

    impl DriverType for Log {
        fn name(&self) -> &'static str {
            "log"
        }

        fn category(&self) -> Category {
            Category::Format
        }

        fn open_options(&self) -> &'static [OptionSpec] {
            const FILE: OptionSpec =
                OptionSpec { name: "file", kind: OptionKind::Child, help: "", default: None };
            &[FILE]
        }

        fn open<'a>(
            &'a self,
            context: &'a mut OpenContext<'_>,
        ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
            Box::pin(async move {
                let file = context.child("file", Role::DATA | Role::PRIMARY).await?;
                Ok(Box::new(LogNode(file)) as Box<dyn Driver>)
            })
        }
    }
}

//! Regression tests for defects found in other qcow2 implementations.

use bds_core::driver::{Attempt, OpenFlags, ZeroFlags};
use bds_core::graph::NewImage;
use bds_core::{ErrorKind, Options};
use bds_io::{Sim, SimConfig};
use bds_testkit::{Chance, Op, Scratch, Step, Workload, pattern, qemu_img};
use serde_json::json;

use crate::kit::Fixture;
use crate::kit::{Disk, ImageKind, TestEnv};
use crate::sweep::crash;

fn sim(seed: u64) -> TestEnv {
    TestEnv::Sim(Sim::new(seed, SimConfig::default()))
}

/// A small write to a block that cannot be read must not overwrite the rest of the block.
#[test]
fn a_failed_read_of_neighbours_writes_nothing() {
    let fixture = Fixture::new(1);
    for is_zero in [false, true] {
        let mem = fixture
            .backend(json!({"driver": "mem", "node-name": format!("d{is_zero}"), "size": 16384}));
        let mem = mem.expect("mem opens");
        fixture.write(&mem, 0, &[1; 16384]).expect("memory does not fail");
        let rules = json!([{"iotype": "read", "errno": 5, "once": true}]);
        let options = json!({
            "driver": "blkdebug", "image": format!("d{is_zero}"), "align": 4096, "inject-error": rules,
        });
        let disk = fixture.backend(options).expect("blkdebug opens");
        let outcome = if is_zero {
            let zero = disk.write_zeroes(512, 512, ZeroFlags::empty());
            fixture.sim.block_on(zero).map(|done| assert_eq!(done, Attempt::Done))
        } else {
            fixture.write(&disk, 512, &[7; 512])
        };
        assert_eq!(outcome.map_err(|e| e.errno()), Err(libc::EIO));
        assert_eq!(fixture.read(&mem, 0, 16384).expect("memory does not fail"), [1; 16384]);
    }
}

/// Bytes copied into a data file are durable before an entry points at them: a cut between the two
/// shows the backing file.
#[test]
fn copied_bytes_of_a_data_file_are_durable_before_their_entry() {
    let kind =
        ImageKind::qcow2("f5", 4096).with_data_file().backed(4096 * 16).sized(4096 * 16, 4096 * 16);
    let small =
        |stamp, at: u64, len| Op::Write { at, bytes: pattern(stamp, at, len).into(), fua: false };
    for seed in 0..24 {
        let steps = vec![
            Step::Requests(vec![small(1, 4096 + 512, 512)]),
            Step::Requests(vec![small(2, 4096 * 5 + 1024, 512), small(3, 4096 * 7 + 100, 5000)]),
            Step::Requests(vec![Op::Flush]),
        ];
        crash::cut_at_every_write(&kind, &Workload { seed, steps });
    }
}

/// Images that are each other's backing file are refused, at once and by name.
#[test]
fn a_backing_chain_with_a_loop_is_refused() {
    for count in [1, 2, 3] {
        let env = sim(8);
        let graph = env.graph();
        env.block_on(async {
            for i in 0..count {
                let backing = format!("disk{}", (i + 1) % count);
                let options = Options::new()
                    .with("size", 1 << 20)
                    .with("backing_file", backing)
                    .with("backing_fmt", "qcow2");
                let image = NewImage {
                    format: "qcow2".into(),
                    path: env.path(&format!("disk{i}")),
                    options,
                    skip_backing: true,
                };
                graph.create_image(image).await.expect("the backing file is not opened");
            }
            let file = json!({"driver": "file", "filename": env.path("disk0")});
            let options = Options::from_json(json!({"driver": "qcow2", "file": file}));
            let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
            let opened = graph.open_with(options.expect("an object"), flags).await;
            let error = opened.expect_err("the chain has a loop");
            assert!(error.to_string().contains("disk"), "{error}");
        });
        let TestEnv::Sim(sim) = &env else { unreachable!("made above") };
        assert!(sim.ops() < 1000, "it took {} operations to notice", sim.ops());
    }
}

/// A disk size that is not whole sectors is not cut to whole sectors and written back so.
#[test]
fn an_odd_size_is_kept_or_refused() {
    let kind = ImageKind::qcow2("f10", 65536);
    for (at, bytes, is_readable) in
        [(24, 1000u64.to_be_bytes().to_vec(), true), (100, 109u32.to_be_bytes().to_vec(), false)]
    {
        let env = sim(10);
        env.make(&kind);
        let TestEnv::Sim(sim) = &env else { unreachable!("made above") };
        let mut image = sim.snapshot_file(env.path("disk"));
        image[at..at + bytes.len()].copy_from_slice(&bytes);
        sim.put_file(env.path("disk"), &image);
        let graph = env.graph();
        let error =
            env.block_on(Disk::open(&env, &kind, &graph)).expect_err("writing it is refused");
        assert_eq!(error.kind(), ErrorKind::InvalidImage, "{error}");
        let looked = env.block_on(Disk::open_read_only(&env, &kind, &graph));
        match looked {
            Ok(disk) => {
                assert!(is_readable);
                assert_eq!(disk.backend.len(), 1000);
                env.block_on(disk.close()).expect("nothing fails");
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::InvalidImage, "{error}"),
        }
        assert_eq!(sim.snapshot_file(env.path("disk")), image, "a refused image stays as it is");
    }
}

/// Random bytes, once more after `period` bytes and so on, one cluster in all.
fn periodic(period: usize) -> Vec<u8> {
    let mut chance = Chance::new(15);
    let unit: Vec<u8> = (0..period).map(|_| chance.draw().to_le_bytes()[3]).collect();
    unit.iter().copied().cycle().take(65536).collect()
}

/// Deflate streams of ours have back-references of 4 KiB at most, as QEMU's do.
#[test]
fn written_streams_need_no_window_above_four_kib() {
    for (period, is_compressed) in [(2048, 1), (8192, 0)] {
        let kind = ImageKind::qcow2("f15", 65536);
        let env = sim(15);
        env.make(&kind);
        let graph = env.graph();
        let bytes = periodic(period);
        env.block_on(async {
            let disk = Disk::open(&env, &kind, &graph).await.expect("it was just made");
            let op = Op::Compressed { at: 0, bytes: bytes.clone().into() };
            disk.request(&op).await.expect("nothing fails");
            disk.close().await.expect("nothing fails");
            let disk =
                Disk::open_read_only(&env, &kind, &graph).await.expect("it was just written");
            let report = disk.backend.check(&|_, _| {}).await.expect("it can be checked");
            assert_eq!(report.compressed_clusters, is_compressed, "period {period}");
            assert_eq!(disk.read(0, 65536).await.expect("nothing fails"), bytes);
        });
        let Some(img) = qemu_img() else { continue };
        let scratch = Scratch::new();
        let raw = scratch.path("raw");
        let path = env.on_host("disk", &scratch);
        let args =
            ["convert".as_ref(), "-O".as_ref(), "raw".as_ref(), path.as_os_str(), raw.as_os_str()];
        img.must(args);
        let read = std::fs::read(raw).expect("qemu-img wrote it");
        assert!(read[..65536] == bytes[..], "QEMU reads something else");
    }
}

/// Streams with back-references of 32 KiB are read.
#[test]
fn streams_with_a_large_window_are_read() {
    let kind = ImageKind::qcow2("f15", 65536);
    let env = sim(16);
    env.make(&kind);
    let graph = env.graph();
    env.block_on(async {
        let disk = Disk::open(&env, &kind, &graph).await.expect("it was just made");
        let op = Op::Compressed { at: 0, bytes: periodic(2048).into() };
        disk.request(&op).await.expect("nothing fails");
        disk.close().await.expect("nothing fails");
    });
    let TestEnv::Sim(sim) = &env else { unreachable!("made above") };
    let mut image = sim.snapshot_file(env.path("disk"));
    let at = |image: &[u8], at: u64| {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes"))
    };
    let mask = 0x00ff_ffff_ffff_fe00;
    let table = at(&image, at(&image, 40)) & mask;
    let entry = at(&image, table);
    assert_ne!(entry & 1 << 62, 0, "the cluster is compressed");
    let offset = entry & ((1 << 54) - 1);
    // The same place, another stream.
    let bytes = periodic(16384);
    let mut codec = flate2::Compress::new_with_window_bits(flate2::Compression::best(), false, 15);
    let mut stream = Vec::with_capacity(1 << 17);
    let done = codec.compress_vec(&bytes, &mut stream, flate2::FlushCompress::Finish);
    assert_eq!(done.expect("it fits"), flate2::Status::StreamEnd);
    assert!(stream.len() < 32768, "the window was used: {}", stream.len());
    let sectors = (offset % 512 + stream.len() as u64 - 1) / 512;
    let entry = 1 << 62 | sectors << 54 | offset;
    let (table, offset) =
        (usize::try_from(table).expect("small"), usize::try_from(offset).expect("small"));
    image[table..table + 8].copy_from_slice(&entry.to_be_bytes());
    image.resize(image.len().max(offset + stream.len()).next_multiple_of(512), 0);
    image[offset..offset + stream.len()].copy_from_slice(&stream);
    sim.put_file(env.path("disk"), &image);
    env.block_on(async {
        let disk = Disk::open_read_only(&env, &kind, &graph).await.expect("it opens");
        assert_eq!(disk.read(0, 65536).await.expect("the stream is whole"), bytes);
    });
}

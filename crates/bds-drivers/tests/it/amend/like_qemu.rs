//! The same amendments by QEMU and by us: same outcome, same image; each goes on with the other's.

use bds_testkit::{Chance, Tool, qemu_img, qemu_io};

use super::{HostImage, amendment, close, contents, format_data, graph, open, with_snapshots};
use crate::sweep::seeds;

/// Amends by us: the files afterwards, and the error.
fn by_us(host: &HostImage, seed: u64, options: &str) -> (HostImage, Option<String>) {
    let sim = host.sim(seed);
    let error = sim.block_on(async {
        let graph = graph(&sim);
        let disk = open(&graph, false).await.unwrap();
        let before = contents(&disk).await;
        let result = disk.amend(amendment(options)).await;
        let after = contents(&disk).await;
        assert_eq!(after[..before.len()], before, "{options}");
        let report = disk.check(&|_, _| {}).await.unwrap();
        assert!(report.is_clean(), "{options}: {report:?}");
        close(&graph, disk).await;
        result.err().map(|error| error.to_string())
    });
    (HostImage::of_sim(&sim).with_data_of(host), error)
}

/// Amends by QEMU: the error.
fn by_qemu(img: &Tool, host: &HostImage, options: &str) -> Option<String> {
    let out = img.run(["amend", "-f", "qcow2", "-o", options, &host.image()]);
    let words = out.stderr.trim().trim_start_matches("qemu-img: ").to_owned();
    (!out.ok()).then_some(words)
}

fn snapshots(img: &Tool, host: &HostImage) -> Vec<String> {
    let info = img.must(["info", "--output=json", &host.image()]).json();
    let all = info.get("snapshots").and_then(|all| all.as_array().cloned()).unwrap_or_default();
    all.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

/// The disk and all snapshots.
fn everything(img: &Tool, host: &HostImage) -> Vec<Vec<u8>> {
    let mut all = vec![host.read(img, None)];
    all.extend(snapshots(img, host).iter().map(|name| host.read(img, Some(name))));
    all
}

fn compare(img: &Tool, host: &HostImage, seed: u64, options: &str) -> HostImage {
    let before = everything(img, host);
    let (ours, error) = by_us(host, seed, options);
    let (code, report) = ours.check(img);
    assert_eq!(code, 0, "{options}: {report}");
    let theirs = HostImage::of_sim(&host.sim(seed)).with_data_of(host);
    let their_error = by_qemu(img, &theirs, options);
    match (&error, &their_error) {
        (None, None) => {}
        (Some(ours), Some(theirs)) => assert!(ours.contains(theirs.as_str()), "{ours}\n{theirs}"),
        other => panic!("{options}: {other:?}"),
    }
    assert_eq!(ours.format_data(img), theirs.format_data(img), "{options}");
    let grown = |mut bytes: Vec<u8>, len: usize| {
        bytes.resize(len, 0);
        bytes
    };
    for (i, (was, is)) in before.into_iter().zip(everything(img, &ours)).enumerate() {
        assert!(grown(was, is.len()) == is, "{options}: snapshot {i} changed");
    }
    ours
}

#[test]
fn every_option_has_the_same_outcome() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    let v3 = [
        "compat=0.10",
        "refcount_bits=64",
        "refcount_bits=8",
        "refcount_bits=1",
        "lazy_refcounts=on",
        "compat=v3,lazy_refcounts=off",
        "size=384k",
        "size=512k",
        "size=385000",
        "cluster_size=512",
        "nonsense=1",
        "extended_l2=on",
        "compat=foo",
        "refcount_bits=3",
        "refcount_bits=128",
        "compat=0.10,refcount_bits=8",
        "compat=0.10,lazy_refcounts=on",
        "backing_file=x",
        "backing_fmt=raw",
        "data_file=x",
        "data_file_raw=on",
        "preallocation=full",
    ];
    let plain = HostImage::new(&img, "cluster_size=4096", "384k");
    plain.io(&io, &["write -P 1 0 40k", "write -z 8k 8k", "write -z -u 20k 4k"]);
    let old = HostImage::new(&img, "compat=0.10,cluster_size=4096", "384k");
    old.io(&io, &["write -P 1 0 40k"]);
    for options in v3 {
        compare(&img, &plain, 1, options);
        compare(&img, &old, 1, options);
    }
    for options in
        ["compat=1.1", "compat=1.1,refcount_bits=32,lazy_refcounts=on,size=1M", "refcount_bits=8"]
    {
        compare(&img, &old, 1, options);
    }
}

#[test]
fn features_stand_against_a_downgrade_as_in_qemu() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    let backed = "backing_file=base.raw,backing_fmt=raw";
    for create in [
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
        "data_file=data.raw",
        "refcount_bits=8",
        "refcount_bits=64,cluster_size=512",
        "lazy_refcounts=on",
        backed,
        "backing_file=base.raw,backing_fmt=raw,cluster_size=512",
    ] {
        let host = HostImage::new(&img, create, "384k");
        host.io(&io, &["write -P 7 3k 100k", "write -z 8k 64k", "write -z -u 64k 64k"]);
        for options in [
            "compat=0.10",
            "compat=0.10,refcount_bits=16",
            "refcount_bits=4",
            "backing_file=base.raw,backing_fmt=raw",
            "backing_file=base.raw",
        ] {
            compare(&img, &host, 2, options);
        }
    }
    let host = HostImage::new(&img, "data_file=data.raw,data_file_raw=on", "384k");
    host.io(&io, &["write -P 7 3k 100k"]);
    let cleared = compare(&img, &host, 2, "data_file_raw=off");
    compare(&img, &cleared, 2, "data_file_raw=on");
    let source = HostImage::new(&img, "cluster_size=4096", "64k");
    source.io(&io, &["write -P 7 0 64k"]);
    let zstd = HostImage::new(&img, "cluster_size=4096", "64k");
    let args = ["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd"];
    img.must(args.into_iter().chain([&*source.image(), &*zstd.image()]));
    compare(&img, &zstd, 2, "compat=0.10");
    compare(&img, &zstd, 2, "refcount_bits=1");
}

#[test]
fn snapshots_keep_their_contents() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    for create in [
        "cluster_size=4096",
        "cluster_size=512",
        "cluster_size=4096,backing_file=base.raw,backing_fmt=raw",
        "cluster_size=512,refcount_bits=64,backing_file=base.raw,backing_fmt=raw",
    ] {
        let host = with_snapshots(&img, &io, create);
        let before = everything(&img, &host);
        for options in
            ["compat=0.10,refcount_bits=16", "refcount_bits=2", "refcount_bits=64", "size=512k"]
        {
            let (ours, error) = by_us(&host, 3, options);
            assert_eq!(error, None, "{create} {options}");
            let (code, report) = ours.check(&img);
            assert_eq!(code, 0, "{create} {options}: {report}");
            let after = everything(&img, &ours);
            for (i, (was, is)) in before.iter().zip(&after).enumerate() {
                assert!(is.starts_with(was), "{create} {options}: snapshot {i} changed");
            }
            // QEMU continues: each snapshot can be gone back to.
            for name in snapshots(&img, &ours) {
                // Two bits cannot count one more owner, and a snapshot has a length of its own.
                if options != "refcount_bits=2" && !options.contains("size") {
                    img.must(["snapshot", "-a", &name, &ours.image()]);
                    assert_eq!(ours.check(&img).0, 0, "{create} {options} {name}");
                }
            }
        }
        let (ours, error) = by_us(&host, 3, "refcount_bits=1");
        assert!(error.unwrap().contains("Cannot decrease refcount entry width to 1 bits: Cluster"));
        assert_eq!(everything(&img, &ours), before);
    }
}

/// QEMU 10.0.2 zeroes the cluster: the snapshot's data is lost.
#[test]
fn downgrade_keeps_a_snapshots_data_under_a_zero_cluster() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    let host = HostImage::new(&img, "", "1M");
    host.io(&io, &["write -P 7 0 64k", "write -P 8 64k 64k"]);
    host.snapshot(&img, "s");
    host.io(&io, &["write -z 0 64k"]);
    let (ours, error) = by_us(&host, 4, "compat=0.10");
    assert_eq!(error, None);
    assert_eq!(ours.check(&img).0, 0);
    assert!(ours.read(&img, Some("s"))[..65536].iter().all(|byte| *byte == 7));
    assert!(ours.read(&img, None)[..65536].iter().all(|byte| *byte == 0));
}

#[test]
fn persistent_bitmaps_survive_what_version_3_allows() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    let host = HostImage::new(&img, "cluster_size=4096", "384k");
    img.must(["bitmap", "--add", "-g", "4096", &host.image(), "b"]);
    host.io(&io, &["write -P 1 8k 16k"]);
    for options in ["refcount_bits=64", "lazy_refcounts=on", "refcount_bits=1"] {
        let (ours, error) = by_us(&host, 5, options);
        assert_eq!(error, None);
        assert_eq!(ours.check(&img).0, 0);
        let info = img.must(["info", "--output=json", &ours.image()]).json();
        let bitmap = info["format-specific"]["data"]["bitmaps"][0].clone();
        assert_eq!(bitmap["flags"], serde_json::json!(["auto"]), "{info}");
    }
    let (ours, error) = by_us(&host, 5, "compat=0.10");
    assert!(error.unwrap().contains("persistent bitmaps: remove them first"));
    assert_eq!(ours.format_data(&img), host.format_data(&img));
}

#[test]
fn random_amendments_one_after_the_other() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    for seed in seeds(3) {
        let mut chance = Chance::new(seed ^ 0xa3e4d);
        let cluster = [512, 1024, 4096, 65536][chance.below(4) as usize];
        let backing = ["", ",backing_file=base.raw,backing_fmt=raw"][chance.below(2) as usize];
        let mut host = HostImage::new(&img, &format!("cluster_size={cluster}{backing}"), "384k");
        for step in 0..6 {
            let writes: Vec<String> = (0..4)
                .map(|_| {
                    let kind = ["write -P 9", "write -z", "write -z -u", "discard"];
                    let kind = kind[chance.below(4) as usize];
                    let at = chance.below(90) * 4;
                    format!("{kind} {at}k {}k", 4 * (1 + chance.below(6).min(95 - at / 4)))
                })
                .collect();
            host.io(&io, &writes.iter().map(String::as_str).collect::<Vec<_>>());
            let options = [
                "compat=0.10,refcount_bits=16",
                "compat=1.1",
                "compat=1.1,refcount_bits=1",
                "compat=1.1,refcount_bits=64",
                "compat=1.1,refcount_bits=8,lazy_refcounts=on",
                "compat=1.1,lazy_refcounts=off",
            ][chance.below(6) as usize];
            println!("seed {seed} step {step} cluster {cluster}{backing}: {writes:?} {options}");
            host = compare(&img, &host, seed, options);
            if chance.below(2) == 0 {
                // And back by QEMU.
                assert_eq!(by_qemu(&img, &host, "compat=1.1,refcount_bits=16"), None);
            }
        }
        let sim = host.sim(seed);
        sim.block_on(async {
            let graph = graph(&sim);
            let disk = open(&graph, true).await.unwrap();
            assert!(format_data(&disk).await.is_object());
            close(&graph, disk).await;
        });
    }
}

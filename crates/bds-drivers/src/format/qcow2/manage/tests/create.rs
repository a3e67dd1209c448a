//! New images: plans, bytes, refusals, and the order of writing.

use bds_core::error::ErrorKind;
use futures_util::FutureExt;

use super::*;
use crate::format::qcow2::fuzzing::MemPort;
use crate::format::qcow2::layout::cluster0::{Cluster0, Parsed, Strictness};
use crate::format::qcow2::layout::units::Geometry;

fn options(list: &[(&str, &str)]) -> Options {
    let mut tree = Options::new();
    for (key, value) in list {
        tree.set(key, *value);
    }
    tree
}

fn make(list: &[(&str, &str)], file: &MemPort, data_file: Option<&MemPort>) -> Result<()> {
    let mut options = options(list);
    let context = CreateContext {
        file: file.child("file"),
        data_file: data_file.map(|d| d.child("data-file")),
        backing_len: None,
        options: &mut options,
    };
    create(context).now_or_never().expect("memory never waits")?;
    options.finish("qcow2")
}

fn parsed(bytes: &[u8]) -> Cluster0 {
    match Cluster0::parse(bytes, bytes.len() as u64, Strictness::Use).unwrap() {
        Parsed::Complete(image) => *image,
        Parsed::NeedMore(n) => panic!("wants {n} bytes"),
    }
}

#[test]
fn a_fresh_image_has_qemus_bytes() {
    let file = MemPort::default();
    make(&[("size", "1M")], &file, None).unwrap();
    let bytes = file.bytes();
    assert_eq!(bytes.len(), 196_616);
    let image = parsed(&bytes);
    assert_eq!(image.header.reftable_offset, 65_536);
    assert_eq!((image.header.l1_offset, image.header.l1_size), (196_608, 1));
    assert_eq!(bytes[65_536..65_544], 131_072u64.to_be_bytes());
    assert_eq!(bytes[131_072..131_084], [0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0]);
    let empty = MemPort::default();
    make(&[("size", "0")], &empty, None).unwrap();
    assert_eq!(empty.bytes().len(), 196_608);
}

#[test]
fn combinations_that_qemu_refuses_are_refused() {
    for (list, word) in [
        (&[][..], "needs a size"),
        (&[("size", "1M"), ("cluster_size", "256")], "power of two"),
        (&[("size", "1M"), ("cluster_size", "1000")], "power of two"),
        (&[("size", "1M"), ("cluster_size", "4M")], "power of two"),
        (&[("size", "1M"), ("cluster_size", "0")], "power of two"),
        (&[("size", "1M"), ("extended_l2", "on"), ("cluster_size", "8k")], "at least 16384"),
        (&[("size", "1M"), ("extended_l2", "on"), ("compat", "0.10")], "extended L2"),
        (&[("size", "1M"), ("lazy_refcounts", "on"), ("compat", "v2")], "lazy"),
        (&[("size", "1M"), ("refcount_bits", "8"), ("compat", "v2")], "refcount widths"),
        (&[("size", "1M"), ("refcount_bits", "0")], "power of two"),
        (&[("size", "1M"), ("refcount_bits", "3")], "power of two"),
        (&[("size", "1M"), ("refcount_bits", "128")], "power of two"),
        (&[("size", "1M"), ("compression_type", "zstd"), ("compat", "v2")], "compression"),
        (&[("size", "1M"), ("compression_type", "lz4")], "lz4"),
        (&[("size", "1M"), ("data_file", "d"), ("compat", "v2")], "data files"),
        (&[("size", "1M"), ("data_file", "d")], "not opened"),
        (&[("size", "1M"), ("data_file_raw", "on")], "requires data_file"),
        (
            &[("size", "1M"), ("data_file", "d"), ("data_file_raw", "on"), ("backing_file", "b")],
            "same time",
        ),
        (&[("size", "1M"), ("backing_fmt", "raw")], "without backing file"),
        (&[("size", "1M"), ("backing_file", "b"), ("preallocation", "metadata")], "extended_l2"),
        (&[("size", "1M"), ("backing_file", "b\0c")], "NUL"),
        (&[("size", "1M"), ("backing_file", "b"), ("backing_fmt", "sixteen bytes ok")], "too long"),
        (&[("size", "1M"), ("preallocation", "foo")], "foo"),
        (&[("size", "1M"), ("compat", "3")], "compat"),
        (&[("size", "200G"), ("cluster_size", "512")], "too large"),
        (&[("size", "8E")], "2^63"),
        (&[("size", "1M"), ("encryption", "on")], "encrypt"),
        (&[("size", "1M"), ("encrypt.format", "luks")], "encrypt.format"),
    ] {
        let file = MemPort::default();
        let error = make(list, &file, None).unwrap_err().to_string();
        assert!(error.contains(word), "{list:?}: {error}");
        assert_eq!(file.writes(), 0, "{list:?}");
    }
    let long = "x".repeat(1024);
    let file = MemPort::default();
    let error = make(&[("size", "1M"), ("backing_file", &long)], &file, None).unwrap_err();
    assert!(error.to_string().contains("1023"), "{error}");
    let error = make(
        &[("size", "1M"), ("cluster_size", "512"), ("backing_file", &long[..1000])],
        &file,
        None,
    );
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(file.writes(), 0);
}

#[test]
fn layouts_count_their_own_refcount_clusters() {
    for bits in [9, 12, 16, 21] {
        for order in 0..=6 {
            for ext in [false, true] {
                let Some(g) = Geometry::new(bits, ext, order) else { continue };
                for size in [0, 1, 1 << 20, (1 << 30) + 512, 100 << 30] {
                    for mapped in [false, true] {
                        let Ok(plan) = Layout::plan(&g, size, mapped, mapped) else {
                            assert!(
                                bits == 9 && size > 10 << 30,
                                "only the refcount table's limit"
                            );
                            continue;
                        };
                        let table = u64::from(plan.reftable_clusters);
                        assert!(plan.refblocks * g.refblock_entries() >= plan.clusters);
                        assert!(table * g.cluster_size() / 8 >= plan.refblocks);
                        assert!(
                            plan.refblocks == 1
                                || (plan.refblocks - 1) * g.refblock_entries() < plan.clusters
                        );
                        let end = plan.data_offset + plan.data_clusters * g.cluster_size();
                        assert_eq!(plan.clusters * g.cluster_size(), end);
                    }
                }
            }
        }
    }
}

#[test]
fn preallocated_images_have_the_length_qemu_gives_them() {
    for (list, len) in [
        (&[("size", "1M"), ("preallocation", "metadata")][..], 1_376_256),
        (&[("size", "1M"), ("preallocation", "full")], 1_376_256),
        (&[("size", "1M"), ("preallocation", "falloc"), ("cluster_size", "512")], 1_071_104),
        (&[("size", "1M"), ("preallocation", "metadata"), ("extended_l2", "on")], 1_376_256),
    ] {
        let file = MemPort::default();
        make(list, &file, None).unwrap();
        assert_eq!(file.bytes().len(), len, "{list:?}");
    }
    let (file, data) = (MemPort::default(), MemPort::new(vec![7; 100]));
    let raw = [("size", "1M"), ("data_file", "d.raw"), ("data_file_raw", "on")];
    make(&raw, &file, Some(&data)).unwrap();
    assert_eq!((file.bytes().len(), data.bytes().len()), (327_680, 1 << 20));
    assert_eq!(parsed(&file.bytes()).extensions.data_file.as_deref(), Some(&b"d.raw"[..]));
}

#[test]
fn old_bytes_of_a_device_do_not_show_through() {
    for (compat, extended) in [("v2", "off"), ("v3", "off"), ("v3", "on")] {
        let file = MemPort::new(vec![0xee; 2 << 20]);
        let list = [
            ("size", "512k"),
            ("preallocation", "metadata"),
            ("compat", compat),
            ("extended_l2", extended),
        ];
        make(&list, &file, None).unwrap();
        let bytes = file.bytes();
        let geometry = parsed(&bytes).header.geometry;
        let plan = Layout::plan(&geometry, 512 << 10, true, true).unwrap();
        let l2 = usize::try_from(plan.l2_offset).unwrap();
        let data = usize::try_from(plan.data_offset).unwrap();
        let word = u64::from_be_bytes(bytes[l2..l2 + 8].try_into().unwrap());
        let second = u64::from_be_bytes(bytes[l2 + 8..l2 + 16].try_into().unwrap());
        match (compat, extended) {
            ("v2", _) => assert!(bytes[data..data + (512 << 10)].iter().all(|b| *b == 0)),
            (_, "on") => assert_eq!(second, 0xffff_ffff_0000_0000),
            _ => assert_eq!(word & 1, 1),
        }
    }
}

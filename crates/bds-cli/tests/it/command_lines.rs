//! Tests qemu-img command lines as scripts write them: which are accepted, which are refused, and
//! the messages.

use bds_testkit::{pattern, qemu_img};

use crate::workdir::Workdir;

fn workdir() -> Workdir {
    let workdir = Workdir::new();
    workdir.write("r.raw", &pattern(1, 0, 1 << 20));
    workdir.must("convert -f raw -O qcow2 r.raw a.qcow2");
    workdir.must("create -q -f raw t.raw 1M");
    workdir
}

#[test]
fn qemu_img_spellings_of_options_are_accepted() {
    let workdir = workdir();
    for words in [
        // Abbreviated, repeated and joined options, as getopt_long takes them.
        "info --backing a.qcow2",
        "info --back --out json a.qcow2",
        "info -f raw -f qcow2 a.qcow2",
        "create -qfqcow2 b.qcow2 1M",
        "convert --par 2 --target-f qcow2 a.qcow2 o",
        "map --start 0 --max 64k a.qcow2",
        "compare --a-format raw --b-format raw r.raw r.raw",
        "compare --a-f raw --b-f qcow2 r.raw a.qcow2",
        "convert --output-format qcow2 --options compat=0.10 a.qcow2 o",
        // A protocol as a format.
        "info -f file a.qcow2",
        "map -f file a.qcow2",
        "create -q -f file o 1M",
        "convert -O file a.qcow2 o",
        "dd -O file if=a.qcow2 of=o",
        // Numbers.
        "create -q -f raw h.raw 0x1000",
        "create -q -f raw h.raw .5k",
        "create -q -f qcow2 -o cluster_size=0x1000,refcount_bits=0x8 b.qcow2 1M",
        "bench -c 0x10 -d 0x2 -s 0x200 -o 0x1000 -f raw r.raw",
        "bench -w -c 0x80 --flush-interval 0x40 --pattern 0xff -f raw t.raw",
        "bench -c 4 -S 0 -f raw r.raw",
        "convert -m 0x4 a.qcow2 o",
        "dd bs=0x200 count=0x2 if=a.qcow2 of=o",
        "resize -q -f raw h.raw +0x200",
        "convert -O qcow2 -o help",
        "create -q -f qcow2 -b a.qcow2 -F qcow2 -o backing_file=a.qcow2 b.qcow2",
        "create -q -u -f qcow2 -b gone.vmdk -F vmdk b.qcow2 1M",
    ] {
        workdir.must(words);
    }
    workdir.must("create -q -f raw h.raw 0x1000");
    assert_eq!(workdir.read("h.raw").len(), 0x1000);
}

#[test]
fn invalid_arguments_are_refused_and_named() {
    let workdir = workdir();
    for (command, words) in [
        ("create -q -f qcow2 -o size=1M s 2M", "must be specified only once"),
        (
            "create -q -u -f qcow2 -b gone -F nosuchformat s 1M",
            "'nosuchformat' is not an image format",
        ),
        ("create -q -f raw -b a.qcow2 s", "Backing file not supported for file format 'raw'"),
        ("create -q -f qcow2 -b a:b.qcow2 -F qcow2 s", "unknown protocol 'a'"),
        ("create -q -f raw s 0x1000k", "size"),
        ("create -q -f raw s 0x", "size"),
        ("convert --source a.qcow2 s", "--source"),
        ("convert --snapshot s1 -O raw a.qcow2 s", "-l is not supported"),
        ("bench --pattern 256 -w -f raw t.raw", "256"),
        ("bench -c 1k -f raw r.raw", "1k"),
        ("convert -m 4k a.qcow2 s", "4k"),
    ] {
        let output = workdir.bds(command);
        assert_eq!(output.code, 1, "{command}: {output:?}");
        assert!(output.stderr.contains(words), "{command}: {}", output.stderr);
        assert!(!workdir.dir().join("s").exists(), "{command}");
    }
}

#[test]
fn an_unknown_format_error_lists_formats_only() {
    let workdir = workdir();
    for command in [
        "convert -O vmdk a.qcow2 s",
        "info -f vmdk a.qcow2",
        "create -f vmdk s 1M",
        "measure -O vmdk a.qcow2",
    ] {
        let output = workdir.bds(command);
        assert!(output.stderr.contains("(there are: qcow2, raw)"), "{command}: {}", output.stderr);
    }
}

/// An unsupported option is called "not supported", never "not yet": that would be a promise.
#[test]
fn unsupported_options_are_reported_without_a_promise() {
    let workdir = workdir();
    for command in [
        "convert -l s a.qcow2 o",
        "check -r all a.qcow2",
        "measure -l s a.qcow2",
        "info --object secret,id=s a.qcow2",
    ] {
        let output = workdir.bds(command);
        assert!(output.stderr.contains("not supported"), "{command}: {}", output.stderr);
        let is_promise = output.stderr.split(|c: char| !c.is_alphabetic()).any(|w| w == "yet");
        assert!(!is_promise, "{command}: {}", output.stderr);
    }
}

#[test]
fn drivers_that_follow_from_the_name_may_be_left_out() {
    let workdir = workdir();
    for command in [
        "info --image-opts driver=qcow2,file.filename=a.qcow2",
        "info --image-opts file.filename=a.qcow2",
        "info --image-opts driver=qcow2,file.driver=file,file.filename=a.qcow2,backing=",
        "info --image-opts driver=qcow2,file.filename=file:a.qcow2",
        "check --image-opts driver=qcow2,file.filename=a.qcow2",
        "map --image-opts driver=qcow2,file.filename=a.qcow2,backing=",
        "convert --image-opts -O raw driver=qcow2,file.filename=a.qcow2 o",
        "convert -n -f qcow2 --target-image-opts a.qcow2 driver=raw,file.filename=t.raw",
        "compare --image-opts driver=raw,file.filename=r.raw file.filename=a.qcow2",
        "dd --image-opts if=driver=qcow2,file.filename=a.qcow2 of=o",
        "measure --image-opts driver=raw,file.filename=r.raw",
        "bench --image-opts -c 1 driver=throttle,limits.bps-total=1G,file.file.filename=a.qcow2,file.driver=qcow2",
        "info json:{\"file.filename\":\"a.qcow2\"}",
        "info json:{\"driver\":\"qcow2\",\"file\":{\"filename\":\"a.qcow2\"}}",
        "info json:{'driver':'qcow2','file':{'filename':'a.qcow2'}}",
        "info --image-opts {\"driver\":\"qcow2\",\"file\":{\"filename\":\"a.qcow2\"}}",
        "info --image-opts {'driver':'qcow2','file.filename':'a.qcow2'}",
        "info -f qcow2 json:{'file.filename':'a.qcow2'}",
    ] {
        workdir.must(command);
    }
    for command in [
        "info --image-opts filename=a.qcow2",
        "info --image-opts driver=qcow2,file.filename=nbd://host/x",
        "info json:{'driver':'qcow2'",
    ] {
        assert_eq!(workdir.bds(command).code, 1, "{command}");
    }
    let info = "info --output json --image-opts driver=qcow2,file.filename=a.qcow2";
    assert_eq!(workdir.must(info).json()["filename"], "a.qcow2");
}

/// The line that scripts read the defaults from.
#[test]
fn create_prints_what_qemu_img_prints() {
    if qemu_img().is_none() {
        return;
    }
    let workdir = workdir();
    for words in [
        "create -f qcow2 x 1.5M",
        "create -f qcow2 x 1000",
        "create -f qcow2 -o size=1M,cluster_size=4k -o cluster_size=0x2000 x",
        "create -f qcow2 -o lazy_refcounts=yes,refcount_bits=0x8 x 1M",
        "create -f qcow2 -o data_file=a,,b.data,data_file_raw=on x 1M",
        "create -f qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 x",
        "create -f qcow2 -u -b gone -F qcow2 x 1M",
        "create -f raw -o nocow=on,extent_size_hint=2M x 1k",
        "create -f file x 1M",
        "create x 1001",
    ] {
        let (ours, theirs) = (workdir.must(words), workdir.must_qemu(words));
        assert_eq!(ours.stdout, theirs.stdout, "{words}");
    }
}

//! Tests error messages, usage errors and help texts.

use bds_testkit::pattern;

use crate::workdir::Workdir;

fn workdir() -> Workdir {
    let workdir = Workdir::new();
    workdir.write("a.raw", &pattern(1, 0, 1 << 20));
    workdir.must("convert -f raw -O qcow2 a.raw a.qcow2");
    workdir
}

#[test]
fn errors_name_the_remedy() {
    let workdir = workdir();
    let mut text = String::new();
    for words in [
        "info nothing",
        "info -f qcow2 a.raw",
        "info -f foo a.raw",
        "info nbd://host/x",
        "info --image-opts driver=raw,file.driver=file,file.filename=a.raw,foo=1",
        "info --object secret,id=s a.raw",
        "resize a.raw 2M",
        "resize a.qcow2 1k",
        "resize a.qcow2 ten",
        "convert a.qcow2 a.qcow2",
        "convert a.qcow2",
        "convert -O foo a.qcow2 b",
        "convert -c -O raw a.qcow2 b",
        "convert -m 17 a.qcow2 b",
        "convert -l snap a.qcow2 b",
        "convert --bitmaps a.qcow2 b",
        "convert --skip-broken-bitmaps a.qcow2 b",
        "convert --target-is-zero a.qcow2 b",
        "convert -t fast a.qcow2 b",
        "check -r all a.qcow2",
        "check a.raw",
        "create -f qcow2 b",
        "create -f qcow2 b 12q",
        "create -f qcow2 -b a.qcow2 b",
        "create -f raw -o foo=1 b 1M",
        "measure",
        "mirror a.qcow2",
        "mirror --granularity 3k a.qcow2 b",
        "mirror --sync top a.qcow2 b",
        "mirror -B a.raw -F raw -O qcow2 a.qcow2 b",
        "mirror -o size=2M a.qcow2 b",
        "mirror -n a.qcow2 a.qcow2",
        "mirror -n a.qcow2 nothing",
        "bench -c 0 a.qcow2",
        "bench --flush-interval 4 a.qcow2",
        "dd if=a.qcow2",
        "dd if=a.qcow2 of=b seek=1",
    ] {
        let output = workdir.bds(words);
        text += &format!("$ bds {words}\n{}=> {}\n", output.stderr, output.code);
    }
    insta::assert_snapshot!(text);
}

#[test]
fn help_texts() {
    let workdir = Workdir::new();
    let mut text = workdir.must("--help").stdout;
    for verb in ["convert", "bench", "mirror"] {
        text +=
            &format!("\n$ bds {verb} --help\n{}", workdir.must(&format!("{verb} --help")).stdout);
    }
    insta::assert_snapshot!(text);
}

#[test]
fn usage_errors_have_qemus_exit_codes() {
    let workdir = workdir();
    for (words, code) in [
        ("", 1),
        ("frobnicate", 1),
        ("info", 1),
        ("info --zork a.raw", 1),
        ("compare a.raw", 2),
        ("--help", 0),
        ("--version", 0),
        ("info --help", 0),
    ] {
        assert_eq!(workdir.bds(words).code, code, "{words}");
    }
}

#[test]
fn an_image_probed_as_raw_is_read_and_never_written() {
    let workdir = workdir();
    let before = workdir.read("a.raw");
    assert!(workdir.bds("info a.raw").ok());
    assert!(workdir.bds("bench -c 1 a.raw").ok());
    for words in ["resize a.raw 2M", "bench -w -c 1 a.raw"] {
        let output = workdir.bds(words);
        assert_eq!(output.code, 1, "{words}");
        assert!(output.stderr.contains("-f raw"), "{}", output.stderr);
    }
    assert!(workdir.read("a.raw") == before);
}

#[test]
fn an_image_can_be_given_as_options_or_json() {
    let workdir = workdir();
    for words in [
        "compare -f raw -F qcow2 a.raw json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}",
        "compare --image-opts driver=raw,file.driver=file,file.filename=a.raw driver=qcow2,file.driver=file,file.filename=a.qcow2",
    ] {
        let output = workdir.bds(words);
        assert_eq!(output.stdout, "Images are identical.\n", "{words}: {output:?}");
    }
    workdir.must(
        "convert -n --target-image-opts a.raw driver=qcow2,file.driver=file,file.filename=a.qcow2",
    );
    assert!(workdir.bds("compare a.raw a.qcow2").ok());
}

#[test]
fn a_broken_image_is_refused_and_not_changed() {
    let workdir = workdir();
    let mut bytes = workdir.read("a.qcow2");
    // The size of the L1 table: far larger than any image needs.
    bytes[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
    workdir.write("broken.qcow2", &bytes);
    for words in
        ["info broken.qcow2", "check broken.qcow2", "map broken.qcow2", "convert broken.qcow2 x"]
    {
        let output = workdir.bds(words);
        assert_eq!(output.code, 1, "{words}: {output:?}");
        assert!(output.stderr.contains("broken.qcow2"), "{}", output.stderr);
    }
    assert!(workdir.read("broken.qcow2") == bytes);
}

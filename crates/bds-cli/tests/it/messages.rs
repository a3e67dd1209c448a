//! What the tool says when it cannot do what was asked, and how it explains itself.

use bds_testkit::pattern;

use crate::tool::Desk;

fn desk() -> Desk {
    let desk = Desk::new();
    desk.write("a.raw", &pattern(1, 0, 1 << 20));
    desk.must("convert -f raw -O qcow2 a.raw a.qcow2");
    desk
}

#[test]
fn mistakes_are_named_with_their_remedy() {
    let desk = desk();
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
        "convert --target-is-zero a.qcow2 b",
        "convert -t fast a.qcow2 b",
        "check -r all a.qcow2",
        "check a.raw",
        "create -f qcow2 b",
        "create -f qcow2 b 12q",
        "create -f qcow2 -b a.qcow2 b",
        "create -f raw -o foo=1 b 1M",
        "measure",
        "bench -c 0 a.qcow2",
        "bench --flush-interval 4 a.qcow2",
        "dd if=a.qcow2",
        "dd if=a.qcow2 of=b seek=1",
    ] {
        let output = desk.bds(words);
        text += &format!("$ bds {words}\n{}=> {}\n", output.stderr, output.code);
    }
    insta::assert_snapshot!(text);
}

#[test]
fn the_command_line_explains_itself() {
    let desk = Desk::new();
    let mut text = desk.must("--help").stdout;
    for verb in ["convert", "bench"] {
        text += &format!("\n$ bds {verb} --help\n{}", desk.must(&format!("{verb} --help")).stdout);
    }
    insta::assert_snapshot!(text);
}

#[test]
fn wrong_words_end_with_qemus_exit_codes() {
    let desk = desk();
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
        assert_eq!(desk.bds(words).code, code, "{words}");
    }
}

#[test]
fn what_is_guessed_to_be_raw_is_read_and_never_written() {
    let desk = desk();
    let before = desk.read("a.raw");
    assert!(desk.bds("info a.raw").ok());
    assert!(desk.bds("bench -c 1 a.raw").ok());
    for words in ["resize a.raw 2M", "bench -w -c 1 a.raw"] {
        let output = desk.bds(words);
        assert_eq!(output.code, 1, "{words}");
        assert!(output.stderr.contains("-f raw"), "{}", output.stderr);
    }
    assert!(desk.read("a.raw") == before);
}

#[test]
fn an_image_can_be_given_as_options_or_json() {
    let desk = desk();
    for words in [
        "compare -f raw -F qcow2 a.raw json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}",
        "compare --image-opts driver=raw,file.driver=file,file.filename=a.raw driver=qcow2,file.driver=file,file.filename=a.qcow2",
    ] {
        let output = desk.bds(words);
        assert_eq!(output.stdout, "Images are identical.\n", "{words}: {output:?}");
    }
    desk.must(
        "convert -n --target-image-opts a.raw driver=qcow2,file.driver=file,file.filename=a.qcow2",
    );
    assert!(desk.bds("compare a.raw a.qcow2").ok());
}

#[test]
fn a_broken_image_is_refused_and_left_alone() {
    let desk = desk();
    let mut bytes = desk.read("a.qcow2");
    // The size of the L1 table: far larger than any image needs.
    bytes[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
    desk.write("broken.qcow2", &bytes);
    for words in
        ["info broken.qcow2", "check broken.qcow2", "map broken.qcow2", "convert broken.qcow2 x"]
    {
        let output = desk.bds(words);
        assert_eq!(output.code, 1, "{words}: {output:?}");
        assert!(output.stderr.contains("broken.qcow2"), "{}", output.stderr);
    }
    assert!(desk.read("broken.qcow2") == bytes);
}

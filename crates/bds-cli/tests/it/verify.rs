//! Tests `verify`: manifests written, checked, and refused.

use bds_testkit::pattern;

use crate::workdir::Workdir;

fn workdir() -> Workdir {
    let workdir = Workdir::new();
    workdir.write("a.raw", &pattern(1, 0, 1 << 20));
    workdir.must("convert -f raw -O qcow2 a.raw a.qcow2");
    workdir
}

#[test]
fn one_manifest_proves_the_content_in_every_format() {
    let workdir = workdir();
    workdir.must("verify --write --note monday a.qcow2");
    let text = workdir.must("verify a.qcow2").stdout;
    assert!(text.starts_with("a.qcow2 is verified: content "), "{text}");
    workdir.must("verify -f raw -m a.qcow2.manifest a.raw");
    workdir.must("convert -c -O qcow2 a.qcow2 b.qcow2");
    let json = workdir.must("verify --output=json -m a.qcow2.manifest b.qcow2").stdout;
    assert!(json.contains("\"note\": \"monday\"") && json.contains("\"bad\": []"), "{json}");
}

#[test]
fn a_changed_byte_is_named_and_is_exit_code_two() {
    let workdir = workdir();
    workdir.must("verify -w a.qcow2");
    let mut bytes = pattern(1, 0, 1 << 20);
    bytes[200_000] ^= 1;
    workdir.write("a.raw", &bytes);
    let output = workdir.bds("verify -f raw -m a.qcow2.manifest a.raw");
    assert_eq!(output.code, 2);
    assert!(output.stdout.contains("bytes 196608 to 262143 differ"), "{}", output.stdout);
    let json = workdir.bds("verify -f raw --output=json -m a.qcow2.manifest a.raw");
    assert_eq!(json.code, 2);
    assert!(json.stdout.contains("\"start\": 196608"), "{}", json.stdout);
    assert_eq!(workdir.bds("verify -q -f raw -m a.qcow2.manifest a.raw").stdout, "");
}

#[test]
fn nothing_but_an_older_manifest_is_overwritten() {
    let workdir = workdir();
    workdir.must("verify -w a.qcow2");
    let output = workdir.bds("verify -w a.qcow2");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("--overwrite"), "{}", output.stderr);
    workdir.must("verify -w --overwrite a.qcow2");
    let before = workdir.must("info a.qcow2").stdout;
    let output = workdir.bds("verify -w --overwrite -m a.qcow2 a.qcow2");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("this is none"), "{}", output.stderr);
    assert_eq!(workdir.must("info a.qcow2").stdout, before);
}

#[test]
fn a_wrong_base_under_the_right_name_is_refused_and_both_are_named() {
    let workdir = workdir();
    workdir.must("verify -w a.qcow2");
    workdir.must("create -f qcow2 -F qcow2 -b a.qcow2 top.qcow2");
    workdir.must("verify -w --parent a.qcow2.manifest top.qcow2");
    workdir.must("verify --parent a.qcow2.manifest top.qcow2");

    workdir.write("a.raw", &pattern(2, 0, 1 << 20));
    workdir.must("convert -f raw -O qcow2 a.raw a.qcow2");
    workdir.must("verify -w --overwrite a.qcow2");
    let output = workdir.bds("verify --parent a.qcow2.manifest top.qcow2");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("but the increment was made on"), "{}", output.stderr);
    // The overlay notes what its backing file showed: that is found first.
    let output = workdir.bds("verify top.qcow2");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("is not what this overlay was made on"), "{}", output.stderr);
    let output = workdir.bds("verify -U top.qcow2");
    assert_eq!(output.code, 2, "the content that the overlay shows has changed");
}

#[test]
fn a_damaged_or_absent_manifest_is_an_error_and_not_a_difference() {
    let workdir = workdir();
    assert_eq!(workdir.bds("verify a.qcow2").code, 1);
    workdir.write("a.qcow2.manifest", b"not a manifest");
    let output = workdir.bds("verify a.qcow2");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("this is not a manifest"), "{}", output.stderr);
}

#[test]
fn a_fifo_or_a_directory_is_no_manifest_and_is_not_waited_for() {
    let workdir = workdir();
    let made = std::process::Command::new("mkfifo").arg(workdir.dir().join("fifo")).status();
    assert!(made.expect("mkfifo runs").success());
    for name in ["fifo", "."] {
        let output = workdir.bds(&format!("verify -m {name} a.qcow2"));
        assert_eq!(output.code, 1);
        assert!(output.stderr.contains("this is not a manifest"), "{}", output.stderr);
    }
}

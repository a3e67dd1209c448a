//! Copies that fail.

use bds_testkit::pattern;

use crate::tool::Desk;

#[test]
fn a_failed_convert_names_its_cause_and_its_output() {
    let desk = Desk::new();
    desk.write("in.raw", &pattern(1, 0, 1 << 20));
    desk.must("create -q -f qcow2 small.qcow2 512k");
    let output = desk.bds("convert -n -f raw -O qcow2 in.raw small.qcow2");
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("target is shorter"), "{}", output.stderr);
}

//! Tests the error message of a failed `convert`.

use bds_testkit::pattern;

use crate::workdir::Workdir;

#[test]
fn convert_error_names_cause_and_output() {
    let workdir = Workdir::new();
    workdir.write("in.raw", &pattern(1, 0, 1 << 20));
    let source = "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=in.raw,\
                  file.inject-error.0.event=none,file.inject-error.0.iotype=read";
    let output = workdir.bds(&format!("convert --image-opts -O raw {source} out.raw"));
    assert_eq!(output.code, 1);
    for words in [
        "in.raw: cannot read the source: ",
        "; the output 'out.raw' is incomplete: 0 of 1048576 bytes copied",
    ] {
        assert!(output.stderr.contains(words), "{}", output.stderr);
    }
}

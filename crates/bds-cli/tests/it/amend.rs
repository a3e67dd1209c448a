//! `amend` beside qemu-img's: the same images, help and messages.

use bds_testkit::{pattern, qemu_img};

use crate::workdir::Workdir;

/// The same image twice.
fn images() -> Option<Workdir> {
    qemu_img()?;
    let workdir = Workdir::new();
    workdir.write("a.raw", &pattern(1, 0, 1 << 20));
    for name in ["ours", "theirs"] {
        workdir.must_qemu(&format!("convert -f raw -O qcow2 a.raw {name}.qcow2"));
    }
    Some(workdir)
}

#[test]
fn images_are_amended_as_by_qemu_img() {
    let Some(workdir) = images() else { return };
    for words in [
        "-o refcount_bits=64",
        "-q -f qcow2 -o lazy_refcounts=on -o refcount_bits=8",
        "-p -t writethrough -o refcount_bits=16,compat=0.10",
        "-o compat=0.10",
        "-o compat=1.1,size=2M",
        "--force -t none -o refcount_bits=1",
    ] {
        workdir.must(&format!("amend {words} ours.qcow2"));
        workdir.must_qemu(&format!("amend {words} theirs.qcow2"));
        workdir.must_qemu("check -q ours.qcow2");
        workdir.must_qemu("compare ours.qcow2 theirs.qcow2");
        let data = |name: &str| {
            let info = workdir.must_qemu(&format!("info --output=json {name}.qcow2")).json();
            (info["virtual-size"].clone(), info["format-specific"].clone())
        };
        assert_eq!(data("ours"), data("theirs"), "{words}");
    }
}

#[test]
fn refusals_are_those_of_qemu_img() {
    let Some(workdir) = images() else { return };
    for words in [
        "amend ours.qcow2",
        "amend -o size=1M",
        "amend -o help",
        "amend -f nosuch -o help",
        "amend -f raw -o help a.raw",
        "amend -f raw -o size=2M a.raw",
        "amend -o cluster_size=512 ours.qcow2",
        "amend -o nonsense=1 ours.qcow2",
        "amend -o compat=foo ours.qcow2",
        "amend -o refcount_bits=3 ours.qcow2",
        "amend -o backing_file=x ours.qcow2",
        "amend -o data_file_raw=on ours.qcow2",
        "amend -o compat=0.10,refcount_bits=8 ours.qcow2",
    ] {
        let (our, their) = (workdir.bds(words), workdir.qemu_img(words));
        assert_eq!(our.code, their.code, "{words}: {our:?}");
        let said = their.stderr.lines().next().unwrap_or_default();
        let said = said.trim_start_matches("qemu-img: ");
        assert!(our.stderr.contains(said), "{words}: {} / {said}", our.stderr);
    }
}

#[test]
fn help_lists_the_options_that_can_be_changed() {
    let Some(workdir) = images() else { return };
    let ours = workdir.must("amend -f qcow2 -o help").stdout;
    assert_eq!(workdir.must("amend -o help ours.qcow2").stdout, ours);
    let names = |text: &str| -> Vec<String> {
        let names = text.lines().filter_map(|line| line.trim().split('=').next());
        names.filter(|name| !name.starts_with("encrypt.")).map(str::to_owned).collect()
    };
    let theirs = workdir.must_qemu("amend -f qcow2 -o help").stdout;
    assert_eq!(names(&ours), names(&theirs));
}

//! Tests references stored in images: the reference gate's decision, and what is refused whatever
//! it decides.

use std::sync::Arc;

use crate::ErrorKind;
use crate::graph::ReferenceGate;
use crate::graph::reference_gate::{DenyAll, Explicit, SameDirectory, TrustAll, UnderRoots};
use crate::test_kit::logging::{Fixture, Header, run, run_with};

const OPEN: &str = "driver=cow,node-name=top,read-only=on,file.driver=file,file.filename=dir/top";

fn backed_by(stored: &'static str) -> Header {
    Header { backing: Some(stored), backing_format: Some("cow"), data_file: None }
}

/// Opens `dir/top`, whose header stores `stored` as backing file, through this gate. The files are
/// dir/base, other/base, and dir/alias (a second name, not a link in the path).
fn check(gate: impl ReferenceGate, stored: &'static str, wanted: &str) {
    run_with(
        |config| config.gate = Arc::new(gate),
        |fixture| async move {
            fixture.image("dir/top", backed_by(stored));
            fixture.plain("dir/base");
            fixture.plain("other/base");
            fixture.plain("nbd:host");
            let opened_before =
                fixture.open("driver=file,filename=other/base,node-name=given,read-only=on").await;
            let opened = fixture.graph.open(crate::Options::parse(OPEN).unwrap()).await;
            let found = match opened {
                Ok(top) => {
                    let backing = crate::graph::walk::child(&top, "backing").unwrap().0;
                    assert!(!backing.is_writable());
                    crate::graph::walk::filename(&backing).unwrap().display().to_string()
                }
                Err(error) => {
                    assert!(error.to_string().contains(stored), "names what was stored: {error}");
                    assert!(error.to_string().contains("dir/top"), "names the image: {error}");
                    drop(opened_before);
                    fixture.graph.reap().await;
                    assert_eq!(fixture.graph.dump(), "");
                    format!("{:?}: {error}", error.kind())
                }
            };
            assert!(found.contains(wanted), "{stored}: wanted {wanted}, found {found}");
        },
    );
}

#[test]
fn reference_gates_by_table() {
    let refused = "ReferenceRefused";
    check(DenyAll, "base", refused);
    check(TrustAll::default(), "base", "dir/base");
    // QEMU does not read it as a file name, so it is refused although such a file exists.
    check(TrustAll::default(), "nbd:host", "unknown protocol 'nbd'");
    check(TrustAll::default(), "json:{\"driver\":\"null-co\"}", "unknown protocol 'json'");
    check(UnderRoots::new(["."]), "nbd:host", refused);
    check(SameDirectory, "nbd:host", refused);
    check(TrustAll::default(), "file:other/base", "other/base");
    check(Explicit::new().file("nbd:host", "other/base", "cow"), "nbd:host", "other/base");
    check(SameDirectory, "base", "dir/base");
    check(SameDirectory, "./base", refused);
    check(SameDirectory, "../other/base", refused);
    check(SameDirectory, "..", refused);
    check(SameDirectory, "gone", refused);
    check(UnderRoots::new(["dir"]), "base", "dir/base");
    check(UnderRoots::new(["other"]), "base", refused);
    check(Explicit::new(), "base", "not on the caller's list");
    check(Explicit::new().file("base", "other/base", "cow"), "base", "other/base");
    check(Explicit::new().file("base", "other/base", "file"), "base", "not an image format");
    check(Explicit::new().node("base", "given"), "base", "other/base");
    check(Explicit::new().node("base", "missing"), "base", "no node 'missing'");
}

#[test]
fn refusals_name_the_remedy() {
    run_with(
        |config| config.gate = Arc::new(DenyAll),
        |fixture| async move {
            fixture.image("dir/top", backed_by("base"));
            let error = fixture.open_error(OPEN).await.to_string();
            assert!(error.contains("cannot open backing file 'base'"), "{error}");
            assert!(error.contains("'backing' option"), "{error}");
            // The remedy works.
            fixture.plain("dir/base");
            let _top = fixture
                .open(&format!("{OPEN},backing.driver=file,backing.filename=dir/base"))
                .await;
        },
    );
}

#[test]
fn a_missing_format_is_probed_only_if_the_gate_allows_it() {
    let check_format = |fixture: Fixture, wanted: Result<&'static str, ErrorKind>| async move {
        fixture.image("dir/top", Header { backing: Some("base"), ..Header::default() });
        fixture.plain("dir/base");
        fixture.sim.put_file("dir/base", b"COW and more");
        let found = fixture.graph.open(crate::Options::parse(OPEN).unwrap()).await;
        let found =
            found.map(|top| crate::graph::walk::child(&top, "backing").unwrap().0.driver_name());
        assert_eq!(found.map_err(|error| error.kind()), wanted);
    };
    run(|fixture| check_format(fixture, Err(ErrorKind::ReferenceRefused)));
    run_with(
        |config| config.gate = Arc::new(TrustAll { may_probe: true }),
        |fixture| check_format(fixture, Ok("cow")),
    );
}

#[test]
fn a_stored_format_must_be_an_image_format() {
    run(|fixture| async move {
        for format in ["file", "pass", "nope"] {
            let header =
                Header { backing: Some("base"), backing_format: Some(format), data_file: None };
            fixture.image("dir/top", header);
            fixture.plain("dir/base");
            let error = fixture.open_error(OPEN).await;
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        }
    });
}

/// A loop is found before it exhausts a limit, whatever the names.
#[test]
fn chains_that_loop_are_refused_before_opening() {
    run(|fixture| async move {
        fixture.image("dir/top", backed_by("top"));
        let error = fixture.open_error(OPEN).await;
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert!(error.to_string().contains("loops"), "{error}");

        fixture.image("dir/top", backed_by("b"));
        fixture.image("dir/b", backed_by("c"));
        fixture.image("dir/c", backed_by("top"));
        assert!(fixture.open_error(OPEN).await.to_string().contains("loops"));

        // Two names of one file.
        fixture.image("dir/top", backed_by("alias"));
        fixture.sim.link("dir/top", "dir/alias");
        fixture.drivers.log();
        assert!(fixture.open_error(OPEN).await.to_string().contains("loops"));
        let opened = fixture.drivers.log().iter().filter(|line| line.starts_with("open")).count();
        assert_eq!(opened, 1, "only the top's own file");
        assert_eq!(fixture.graph.dump(), "");
    });
}

#[test]
fn chains_are_bounded() {
    let chain = |fixture: Fixture, fits: bool| async move {
        fixture.image("dir/top", backed_by("b"));
        fixture.image("dir/b", backed_by("c"));
        fixture.plain("dir/c");
        let opened = fixture.graph.open(crate::Options::parse(OPEN).unwrap()).await;
        match opened {
            Ok(top) => {
                assert!(fits);
                assert_eq!(crate::graph::walk::backing_chain(&top).len(), 3);
            }
            Err(error) => {
                assert!(!fits, "{error}");
                assert_eq!(error.kind(), ErrorKind::LimitExceeded);
            }
        }
    };
    run_with(|config| config.max_depth = 3, |fixture| chain(fixture, true));
    run_with(|config| config.max_depth = 2, |fixture| chain(fixture, false));
}

#[test]
fn a_data_file_is_neither_the_image_nor_part_of_its_chain() {
    run(|fixture| async move {
        fixture.plain("dir/base");
        let with = |data: &'static str, backing: Option<&'static str>| Header {
            backing,
            backing_format: Some("cow"),
            data_file: Some(data),
        };
        fixture.plain("dir/data");
        fixture.image("dir/top", with("dir/data", Some("base")));
        drop(fixture.open(OPEN).await);
        fixture.image("dir/top", with("dir/top", None));
        assert_eq!(fixture.open_error(OPEN).await.kind(), ErrorKind::InvalidImage);
        fixture.image("dir/top", with("dir/base", Some("base")));
        assert_eq!(fixture.open_error(OPEN).await.kind(), ErrorKind::InvalidImage);
        // A data file given by option is checked too.
        fixture.image("dir/top", with("dir/data", None));
        for child in ["data-file.driver=file,data-file.filename=dir/top", "data-file=top-file"] {
            let error =
                fixture.open_error(&format!("{OPEN},file.node-name=top-file,{child}")).await;
            assert_eq!(error.kind(), ErrorKind::InvalidImage, "{error}");
        }
    });
}

#[test]
fn a_data_file_is_writable_only_below_a_writable_image() {
    run(|fixture| async move {
        fixture.plain("dir/data");
        let header = Header { data_file: Some("dir/data"), ..Header::default() };
        fixture.image("dir/top", header);
        for (text, writable) in [("on", false), ("off", true)] {
            let top =
                fixture.open(&OPEN.replace("read-only=on", &format!("read-only={text}"))).await;
            let (data, _) = crate::graph::walk::child(&top, "data-file").unwrap();
            assert_eq!(data.is_writable(), writable);
            drop((top, data));
            fixture.graph.reap().await;
        }
    });
}

/// Resolved as in QEMU; the error says so if a file of that name lies beside the image.
#[test]
fn a_relative_data_file_is_resolved_from_the_working_directory() {
    run(|fixture| async move {
        fixture.plain("dir/data");
        fixture.image("dir/top", Header { data_file: Some("data"), ..Header::default() });
        let error = fixture.open_error(OPEN).await.to_string();
        assert!(error.contains("there is one beside the image only"), "{error}");
        fixture.plain("data");
        let top = fixture.open(OPEN).await;
        let (data, _) = crate::graph::walk::child(&top, "data-file").unwrap();
        assert_eq!(crate::graph::walk::filename(&data).unwrap().to_str(), Some("data"));
    });
    // The gate for files beside the image resolves it there.
    run_with(
        |config| config.gate = Arc::new(SameDirectory),
        |fixture| async move {
            fixture.plain("dir/data");
            fixture.image("dir/top", Header { data_file: Some("data"), ..Header::default() });
            drop(fixture.open(OPEN).await);
        },
    );
}

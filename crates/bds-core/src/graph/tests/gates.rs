//! Files named inside images: who lets them in, and what is refused whatever the gate says.

use std::sync::Arc;

use super::fakes::{Fixture, Header, run, run_with};
use crate::ErrorKind;
use crate::graph::ReferenceGate;
use crate::graph::reference_gate::{DenyAll, Explicit, SameDirectory, TrustAll, UnderRoots};

const OPEN: &str = "driver=cow,node-name=top,read-only=on,file.driver=file,file.filename=dir/top";

fn backed_by(stored: &'static str) -> Header {
    Header { backing: Some(stored), backing_format: Some("cow"), data_file: None }
}

/// Opens `dir/top`, whose backing file is stored under this name, through this gate. The files there are:
/// dir/base, other/base, and dir/alias (another name, no link by path).
fn check(gate: impl ReferenceGate, stored: &'static str, wanted: &str) {
    run_with(
        |config| config.gate = Arc::new(gate),
        |world| async move {
            world.image("dir/top", backed_by(stored));
            world.plain("dir/base");
            world.plain("other/base");
            world.plain("nbd:host");
            let by_hand =
                world.open("driver=file,filename=other/base,node-name=given,read-only=on").await;
            let opened = world.graph.open(crate::Options::parse(OPEN).unwrap()).await;
            let found = match opened {
                Ok(top) => {
                    let backing = crate::graph::walk::child(&top, "backing").unwrap().0;
                    assert!(!backing.is_writable());
                    crate::graph::walk::filename(&backing).unwrap().display().to_string()
                }
                Err(error) => {
                    assert!(error.to_string().contains(stored), "names what was stored: {error}");
                    assert!(error.to_string().contains("dir/top"), "names the image: {error}");
                    drop(by_hand);
                    world.graph.reap().await;
                    assert_eq!(world.graph.dump(), "");
                    format!("{:?}: {error}", error.kind())
                }
            };
            assert!(found.contains(wanted), "{stored}: wanted {wanted}, found {found}");
        },
    );
}

#[test]
fn gates() {
    let refused = "ReferenceRefused";
    check(DenyAll, "base", refused);
    check(TrustAll::default(), "base", "dir/base");
    // Not a file to QEMU, so not here either, although there is one.
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
    check(Explicit::new().node("base", "nobody"), "base", "no node 'nobody'");
}

#[test]
fn refusals_say_what_to_do() {
    run_with(
        |config| config.gate = Arc::new(DenyAll),
        |world| async move {
            world.image("dir/top", backed_by("base"));
            let error = world.refusal(OPEN).await.to_string();
            assert!(error.contains("cannot open backing file 'base'"), "{error}");
            assert!(error.contains("'backing' option"), "{error}");
            // The remedy works.
            world.plain("dir/base");
            let _top =
                world.open(&format!("{OPEN},backing.driver=file,backing.filename=dir/base")).await;
        },
    );
}

#[test]
fn a_format_is_stored_or_supplied_and_guessed_only_on_request() {
    let story = |world: Fixture, wanted: Result<&'static str, ErrorKind>| async move {
        world.image("dir/top", Header { backing: Some("base"), ..Header::default() });
        world.plain("dir/base");
        world.sim.put_file("dir/base", b"COW and more");
        let found = world.graph.open(crate::Options::parse(OPEN).unwrap()).await;
        let found =
            found.map(|top| crate::graph::walk::child(&top, "backing").unwrap().0.driver_name());
        assert_eq!(found.map_err(|error| error.kind()), wanted);
    };
    run(|world| story(world, Err(ErrorKind::ReferenceRefused)));
    run_with(
        |config| config.gate = Arc::new(TrustAll { may_probe: true }),
        |world| story(world, Ok("cow")),
    );
}

#[test]
fn stored_formats_are_formats() {
    run(|world| async move {
        for format in ["file", "pass", "nope"] {
            let header =
                Header { backing: Some("base"), backing_format: Some(format), data_file: None };
            world.image("dir/top", header);
            world.plain("dir/base");
            let error = world.refusal(OPEN).await;
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        }
    });
}

/// F8: a loop is found before it exhausts anything, under whatever names.
#[test]
fn chains_that_loop_are_refused_before_opening() {
    run(|world| async move {
        world.image("dir/top", backed_by("top"));
        let error = world.refusal(OPEN).await;
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert!(error.to_string().contains("loops"), "{error}");

        world.image("dir/top", backed_by("b"));
        world.image("dir/b", backed_by("c"));
        world.image("dir/c", backed_by("top"));
        assert!(world.refusal(OPEN).await.to_string().contains("loops"));

        // Two names of one file.
        world.image("dir/top", backed_by("alias"));
        world.sim.link("dir/top", "dir/alias");
        world.shared.log();
        assert!(world.refusal(OPEN).await.to_string().contains("loops"));
        let opened = world.shared.log().iter().filter(|line| line.starts_with("open")).count();
        assert_eq!(opened, 1, "only the top's own file");
        assert_eq!(world.graph.dump(), "");
    });
}

#[test]
fn chains_are_bounded() {
    let chain = |world: Fixture, fits: bool| async move {
        world.image("dir/top", backed_by("b"));
        world.image("dir/b", backed_by("c"));
        world.plain("dir/c");
        let opened = world.graph.open(crate::Options::parse(OPEN).unwrap()).await;
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
    run_with(|config| config.max_depth = 3, |world| chain(world, true));
    run_with(|config| config.max_depth = 2, |world| chain(world, false));
}

#[test]
fn a_data_file_is_neither_the_image_nor_part_of_its_chain() {
    run(|world| async move {
        world.plain("dir/base");
        let with = |data: &'static str, backing: Option<&'static str>| Header {
            backing,
            backing_format: Some("cow"),
            data_file: Some(data),
        };
        world.plain("dir/data");
        world.image("dir/top", with("dir/data", Some("base")));
        drop(world.open(OPEN).await);
        world.image("dir/top", with("dir/top", None));
        assert_eq!(world.refusal(OPEN).await.kind(), ErrorKind::InvalidImage);
        world.image("dir/top", with("dir/base", Some("base")));
        assert_eq!(world.refusal(OPEN).await.kind(), ErrorKind::InvalidImage);
        // Given by option, it is looked at too.
        world.image("dir/top", with("dir/data", None));
        for child in ["data-file.driver=file,data-file.filename=dir/top", "data-file=top-file"] {
            let error = world.refusal(&format!("{OPEN},file.node-name=top-file,{child}")).await;
            assert_eq!(error.kind(), ErrorKind::InvalidImage, "{error}");
        }
    });
}

#[test]
fn a_data_file_is_writable_only_below_a_writable_image() {
    run(|world| async move {
        world.plain("dir/data");
        let header = Header { data_file: Some("dir/data"), ..Header::default() };
        world.image("dir/top", header);
        for (text, writable) in [("on", false), ("off", true)] {
            let top = world.open(&OPEN.replace("read-only=on", &format!("read-only={text}"))).await;
            let (data, _) = crate::graph::walk::child(&top, "data-file").unwrap();
            assert_eq!(data.is_writable(), writable);
            drop((top, data));
            world.graph.reap().await;
        }
    });
}

/// As QEMU looks for it; the error says why it is not found where most people look.
#[test]
fn a_relative_data_file_counts_from_the_working_directory() {
    run(|world| async move {
        world.plain("dir/data");
        world.image("dir/top", Header { data_file: Some("data"), ..Header::default() });
        let error = world.refusal(OPEN).await.to_string();
        assert!(error.contains("there is one beside the image only"), "{error}");
        world.plain("data");
        let top = world.open(OPEN).await;
        let (data, _) = crate::graph::walk::child(&top, "data-file").unwrap();
        assert_eq!(crate::graph::walk::filename(&data).unwrap().to_str(), Some("data"));
    });
    // The gate for files beside the image finds it there.
    run_with(
        |config| config.gate = Arc::new(SameDirectory),
        |world| async move {
            world.plain("dir/data");
            world.image("dir/top", Header { data_file: Some("data"), ..Header::default() });
            drop(world.open(OPEN).await);
        },
    );
}

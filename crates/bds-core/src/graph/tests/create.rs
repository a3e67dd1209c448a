//! Making images: what is opened on the way, and what is left behind when it fails.

use super::fakes::{Fixture, run, run_with};
use crate::graph::{NewImage, NewImageReport};
use crate::{ErrorKind, Options, Result};

async fn create(world: &Fixture, path: &str, options: &str) -> Result<NewImageReport> {
    let image = NewImage {
        format: "cow".into(),
        path: path.into(),
        options: Options::parse(options).unwrap(),
        skip_backing: false,
    };
    world.graph.create_image(image).await
}

#[test]
fn the_backing_image_gives_the_size_and_the_data_file_is_made_beside_the_image() {
    run(|world| async move {
        world.plain("dir/base");
        let text = "backing_file=base,backing_fmt=cow,data_file=data,nocow=on";
        create(&world, "dir/new", text).await.unwrap();
        let log = world.shared.log();
        let line = "create Some(\"dir/new\") data Some(Some(\"dir/data\")) size Some(512)";
        assert!(log.contains(&line.to_owned()), "{log:?}");
        assert!(world.sim.exists("dir/new") && world.sim.exists("dir/data"));
        assert_eq!(world.graph.dump(), "", "everything is closed");
        let count = |what: &str| log.iter().filter(|line| line.starts_with(what)).count();
        assert_eq!(count("open"), count("close"));
    });
}

#[test]
fn a_failure_removes_what_was_made_and_nothing_else() {
    run(|world| async move {
        world.plain("there");
        for (path, options, kind) in [
            ("new", "size=1M,data_file=data,fail-create=on", ErrorKind::NoSpace),
            ("there", "size=1M,data_file=data,fail-create=on", ErrorKind::NoSpace),
            ("new", "size=1M,frob=1", ErrorKind::InvalidInput),
            ("new", "backing_file=gone,backing_fmt=cow", ErrorKind::NotFound),
            ("new", "backing_file=there", ErrorKind::InvalidInput),
            ("there", "backing_file=there,backing_fmt=cow,size=1M", ErrorKind::InvalidInput),
            ("new", "backing_file=there,backing_fmt=pass", ErrorKind::InvalidInput),
        ] {
            let error = create(&world, path, options).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{options}: {error}");
            let left: Vec<String> =
                world.sim.paths().iter().map(|path| path.display().to_string()).collect();
            assert_eq!(left, ["there"], "{options}");
            assert_eq!(world.graph.dump(), "", "{options}");
        }
    });
}

#[test]
fn with_a_size_an_unreadable_backing_image_is_only_reported() {
    run(|world| async move {
        let text = "backing_file=gone,backing_fmt=cow,size=4k";
        let report = create(&world, "new", text).await.unwrap();
        assert_eq!(report.backing_error.unwrap().kind(), ErrorKind::NotFound);
        let image = NewImage {
            format: "cow".into(),
            path: "new2".into(),
            options: Options::parse(text).unwrap(),
            skip_backing: true,
        };
        assert!(world.graph.create_image(image).await.unwrap().backing_error.is_none());
    });
}

#[test]
fn the_gate_is_asked_about_the_backing_image() {
    run_with(
        |config| config.gate = std::sync::Arc::new(crate::graph::gate::DenyAll),
        |world| async move {
            world.plain("base");
            let error =
                create(&world, "new", "backing_file=base,backing_fmt=cow").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReferenceRefused);
            assert!(!world.sim.exists("new"));
        },
    );
}

#[test]
fn formats_that_cannot_be_made_are_refused() {
    run(|world| async move {
        for (format, wanted) in [("pass", "not an image format"), ("nope", "unknown driver")] {
            let image = NewImage {
                format: format.into(),
                path: "new".into(),
                options: Options::new(),
                skip_backing: false,
            };
            let error = world.graph.create_image(image).await.unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    });
}

#[test]
fn dropping_a_create_half_way_leaves_no_file() {
    run(|world| async move {
        for polls in 0.. {
            let mut future = Box::pin(create(&world, "new", "size=1M,data_file=data"));
            let mut ended = false;
            for _ in 0..polls {
                ended = futures_util::poll!(&mut future).is_ready();
                if ended {
                    break;
                }
                bds_io::yield_now().await;
            }
            drop(future);
            if ended {
                break;
            }
            assert!(world.sim.paths().is_empty(), "after {polls} polls");
            while world.graph.0.reaper.arena.stats().dead > 0 {
                bds_io::yield_now().await;
            }
            assert_eq!(world.graph.dump(), "");
        }
    });
}

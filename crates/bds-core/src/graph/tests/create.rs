//! Making images: what is opened on the way, and what is left behind when it fails.

use super::fakes::{Fixture, Header, run, run_with};
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
fn the_backing_image_gives_the_size_and_the_data_file_has_the_name_given() {
    run(|world| async move {
        world.plain("dir/base");
        let text = "backing_file=base,backing_fmt=cow,data_file=data,nocow=on";
        create(&world, "dir/new", text).await.unwrap();
        let log = world.shared.log();
        let line = "create Some(\"dir/new\") data Some(Some(\"data\")) size Some(512)";
        assert!(log.contains(&line.to_owned()), "{log:?}");
        assert!(world.sim.exists("dir/new") && world.sim.exists("data"));
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
fn an_unreadable_backing_image_is_refused_unless_it_is_not_wanted() {
    run(|world| async move {
        let text = "backing_file=gone,backing_fmt=cow,size=4k";
        let error = create(&world, "new", text).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(!world.sim.exists("new"));
        let image = NewImage {
            format: "cow".into(),
            path: "new2".into(),
            options: Options::parse(text).unwrap(),
            skip_backing: true,
        };
        assert_eq!(world.graph.create_image(image).await.unwrap(), NewImageReport { len: 4096 });
    });
}

#[test]
fn a_file_of_an_image_that_is_used_is_never_emptied() {
    run(|world| async move {
        world.image("base", Header { data_file: Some("base-data"), ..Header::default() });
        world.plain("base-data");
        let header = Header { backing: Some("base"), backing_format: Some("cow"), data_file: None };
        world.image("top", header);
        let before = |name: &str| world.sim.snapshot_file(name);
        let files = ["top", "base", "base-data"];
        let old: Vec<Vec<u8>> = files.into_iter().map(before).collect();
        let refused = async |path: &str, options: &str, skip_backing: bool| {
            let options = Options::parse(options).unwrap();
            let image = NewImage { format: "cow".into(), path: path.into(), options, skip_backing };
            let error = world.graph.create_image(image).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{path}: {error}");
            assert!(error.to_string().contains("would destroy"), "{error}");
            let now: Vec<Vec<u8>> = files.into_iter().map(before).collect();
            assert!(now == old, "{path}");
            assert_eq!(world.sim.paths().len(), 3, "{path}: nothing is left behind");
        };
        for path in files {
            // All of its new backing chain, looked at or not.
            refused(path, "backing_file=top,backing_fmt=cow,size=1M", false).await;
            refused(path, "backing_file=top,backing_fmt=cow,size=1M", true).await;
            let data = format!("backing_file=top,backing_fmt=cow,size=1M,data_file={path}");
            refused("new", &data, false).await;
            refused("new", &data, true).await;
        }
        refused("new", "size=1M,data_file=new", false).await;
        // One that cannot be opened as what it is said to be.
        refused("top", "backing_file=top,backing_fmt=nope,size=1M", true).await;
        let tree = "driver=cow,file.driver=file,file.filename=top";
        let top = world.graph.open(Options::parse(tree).unwrap()).await.unwrap();
        for path in files {
            refused(path, "size=1M", false).await;
        }
        top.close().await.unwrap().into_result().unwrap();
        create(&world, "top", "size=1M").await.unwrap();
    });
}

#[test]
fn what_can_be_refused_beforehand_costs_no_old_content() {
    run(|world| async move {
        world.plain("there");
        world.plain("old-data");
        let files = ["there", "old-data"];
        let old = files.map(|name| world.sim.snapshot_file(name));
        for options in [
            "frob=1,size=1M",
            "nocow=maybe,size=1M",
            "backing_file=gone,backing_fmt=cow,size=1M",
            "backing_file=old-data,backing_fmt=nope,size=1M",
            "data_file=old-data",
            "size=much,data_file=old-data",
            "size=1M,data_file=there",
        ] {
            create(&world, "there", options).await.unwrap_err();
            assert!(files.map(|name| world.sim.snapshot_file(name)) == old, "{options}");
            let log = world.shared.log();
            assert!(!log.iter().any(|line| line.starts_with("empty")), "{options}: {log:?}");
        }
        create(&world, "there", "size=1M,data_file=old-data").await.unwrap();
        let log = world.shared.log();
        let emptied = log.iter().filter(|line| line.starts_with("empty")).count();
        assert_eq!(emptied, 2, "{log:?}");
    });
}

#[test]
fn the_gate_is_asked_about_the_backing_image() {
    run_with(
        |config| config.gate = std::sync::Arc::new(crate::graph::reference_gate::DenyAll),
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
fn a_node_that_the_gate_names_as_backing_image_stays_open() {
    let table = crate::graph::reference_gate::Explicit::new().node("base", "disk");
    run_with(
        |config| config.gate = std::sync::Arc::new(table),
        |world| async move {
            world.plain("base");
            let base = world.open("driver=cow,node-name=disk,file.driver=file,file.filename=base");
            let base = base.await;
            let report = create(&world, "new", "backing_file=base,backing_fmt=cow").await.unwrap();
            assert_eq!(report.len, 512);
            assert_eq!(world.graph.find("disk").unwrap().id(), base.id());
            let error =
                create(&world, "base", "backing_file=base,backing_fmt=cow").await.unwrap_err();
            assert!(error.to_string().contains("would destroy"), "{error}");
        },
    );
}

#[test]
fn formats_that_cannot_be_made_are_refused() {
    run(|world| async move {
        for (format, wanted) in [("pass", "not an image format"), ("nope", "not an image format")] {
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
            while world.graph.0.core.arena.stats().dead > 0 {
                bds_io::yield_now().await;
            }
            assert_eq!(world.graph.dump(), "");
        }
    });
}

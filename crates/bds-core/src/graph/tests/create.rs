//! Tests creation of images: nodes opened meanwhile, refusals, and cleanup after a failure.

use crate::graph::{NewImage, NewImageReport};
use crate::test_kit::logging::{Fixture, Header, run, run_with};
use crate::{ErrorKind, Options, Result};

async fn create(fixture: &Fixture, path: &str, options: &str) -> Result<NewImageReport> {
    let image = NewImage {
        format: "cow".into(),
        path: path.into(),
        options: Options::parse(options).unwrap(),
        skip_backing: false,
    };
    fixture.graph.create_image(image).await
}

#[test]
fn size_defaults_to_the_backing_image_and_the_data_file_name_is_kept() {
    run(|fixture| async move {
        fixture.plain("dir/base");
        let text = "backing_file=base,backing_fmt=cow,data_file=data,nocow=on";
        create(&fixture, "dir/new", text).await.unwrap();
        let log = fixture.drivers.log();
        let line = "create Some(\"dir/new\") data Some(Some(\"data\")) size Some(512)";
        assert!(log.contains(&line.to_owned()), "{log:?}");
        assert!(fixture.sim.exists("dir/new") && fixture.sim.exists("data"));
        assert_eq!(fixture.graph.dump(), "", "everything is closed");
        let count = |what: &str| log.iter().filter(|line| line.starts_with(what)).count();
        assert_eq!(count("open"), count("close"));
    });
}

#[test]
fn a_failed_create_removes_only_the_files_it_made() {
    run(|fixture| async move {
        fixture.plain("there");
        for (path, options, kind) in [
            ("new", "size=1M,data_file=data,fail-create=on", ErrorKind::NoSpace),
            ("there", "size=1M,data_file=data,fail-create=on", ErrorKind::NoSpace),
            ("new", "size=1M,frob=1", ErrorKind::InvalidInput),
            ("new", "backing_file=gone,backing_fmt=cow", ErrorKind::NotFound),
            ("new", "backing_file=there", ErrorKind::InvalidInput),
            ("there", "backing_file=there,backing_fmt=cow,size=1M", ErrorKind::InvalidInput),
            ("new", "backing_file=there,backing_fmt=pass", ErrorKind::InvalidInput),
        ] {
            let error = create(&fixture, path, options).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{options}: {error}");
            let left: Vec<String> =
                fixture.sim.paths().iter().map(|path| path.display().to_string()).collect();
            assert_eq!(left, ["there"], "{options}");
            assert_eq!(fixture.graph.dump(), "", "{options}");
        }
    });
}

#[test]
fn an_unreadable_backing_image_is_refused_unless_skipped() {
    run(|fixture| async move {
        let text = "backing_file=gone,backing_fmt=cow,size=4k";
        let error = create(&fixture, "new", text).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(!fixture.sim.exists("new"));
        let image = NewImage {
            format: "cow".into(),
            path: "new2".into(),
            options: Options::parse(text).unwrap(),
            skip_backing: true,
        };
        assert_eq!(fixture.graph.create_image(image).await.unwrap(), NewImageReport { len: 4096 });
    });
}

#[test]
fn create_never_empties_a_file_of_an_image_in_use() {
    run(|fixture| async move {
        fixture.image("base", Header { data_file: Some("base-data"), ..Header::default() });
        fixture.plain("base-data");
        let header = Header { backing: Some("base"), backing_format: Some("cow"), data_file: None };
        fixture.image("top", header);
        let before = |name: &str| fixture.sim.snapshot_file(name);
        let files = ["top", "base", "base-data"];
        let old: Vec<Vec<u8>> = files.into_iter().map(before).collect();
        let refused = async |path: &str, options: &str, skip_backing: bool| {
            let options = Options::parse(options).unwrap();
            let image = NewImage { format: "cow".into(), path: path.into(), options, skip_backing };
            let error = fixture.graph.create_image(image).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{path}: {error}");
            assert!(error.to_string().contains("would destroy"), "{error}");
            let now: Vec<Vec<u8>> = files.into_iter().map(before).collect();
            assert!(now == old, "{path}");
            assert_eq!(fixture.sim.paths().len(), 3, "{path}: nothing is left behind");
        };
        for path in files {
            // The whole new backing chain, whether it is opened or not.
            refused(path, "backing_file=top,backing_fmt=cow,size=1M", false).await;
            refused(path, "backing_file=top,backing_fmt=cow,size=1M", true).await;
            let data = format!("backing_file=top,backing_fmt=cow,size=1M,data_file={path}");
            refused("new", &data, false).await;
            refused("new", &data, true).await;
        }
        refused("new", "size=1M,data_file=new", false).await;
        // A backing image that cannot be opened in the given format.
        refused("top", "backing_file=top,backing_fmt=nope,size=1M", true).await;
        let tree = "driver=cow,file.driver=file,file.filename=top";
        let top = fixture.graph.open(Options::parse(tree).unwrap()).await.unwrap();
        for path in files {
            refused(path, "size=1M", false).await;
        }
        top.close().await.unwrap().into_result().unwrap();
        create(&fixture, "top", "size=1M").await.unwrap();
    });
}

#[test]
fn create_validates_before_it_empties_files() {
    run(|fixture| async move {
        fixture.plain("there");
        fixture.plain("old-data");
        let files = ["there", "old-data"];
        let old = files.map(|name| fixture.sim.snapshot_file(name));
        for options in [
            "frob=1,size=1M",
            "nocow=maybe,size=1M",
            "backing_file=gone,backing_fmt=cow,size=1M",
            "backing_file=old-data,backing_fmt=nope,size=1M",
            "data_file=old-data",
            "size=much,data_file=old-data",
            "size=1M,data_file=there",
        ] {
            create(&fixture, "there", options).await.unwrap_err();
            assert!(files.map(|name| fixture.sim.snapshot_file(name)) == old, "{options}");
            let log = fixture.drivers.log();
            assert!(!log.iter().any(|line| line.starts_with("empty")), "{options}: {log:?}");
        }
        create(&fixture, "there", "size=1M,data_file=old-data").await.unwrap();
        let log = fixture.drivers.log();
        let emptied = log.iter().filter(|line| line.starts_with("empty")).count();
        assert_eq!(emptied, 2, "{log:?}");
    });
}

#[test]
fn the_reference_gate_decides_on_the_backing_image() {
    run_with(
        |config| config.gate = std::sync::Arc::new(crate::graph::reference_gate::DenyAll),
        |fixture| async move {
            fixture.plain("base");
            let error =
                create(&fixture, "new", "backing_file=base,backing_fmt=cow").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReferenceRefused);
            assert!(!fixture.sim.exists("new"));
        },
    );
}

#[test]
fn a_backing_node_named_by_the_gate_stays_open() {
    let table = crate::graph::reference_gate::Explicit::new().node("base", "disk");
    run_with(
        |config| config.gate = std::sync::Arc::new(table),
        |fixture| async move {
            fixture.plain("base");
            let base =
                fixture.open("driver=cow,node-name=disk,file.driver=file,file.filename=base");
            let base = base.await;
            let report =
                create(&fixture, "new", "backing_file=base,backing_fmt=cow").await.unwrap();
            assert_eq!(report.len, 512);
            assert_eq!(fixture.graph.find("disk").unwrap().id(), base.id());
            let error =
                create(&fixture, "base", "backing_file=base,backing_fmt=cow").await.unwrap_err();
            assert!(error.to_string().contains("would destroy"), "{error}");
        },
    );
}

#[test]
fn formats_without_create_are_refused() {
    run(|fixture| async move {
        for (format, wanted) in [("pass", "not an image format"), ("nope", "not an image format")] {
            let image = NewImage {
                format: format.into(),
                path: "new".into(),
                options: Options::new(),
                skip_backing: false,
            };
            let error = fixture.graph.create_image(image).await.unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    });
}

#[test]
fn a_dropped_create_leaves_no_file() {
    run(|fixture| async move {
        for polls in 0.. {
            let mut future = Box::pin(create(&fixture, "new", "size=1M,data_file=data"));
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
            assert!(fixture.sim.paths().is_empty(), "after {polls} polls");
            while fixture.graph.0.core.arena.stats().dead > 0 {
                bds_io::yield_now().await;
            }
            assert_eq!(fixture.graph.dump(), "");
        }
    });
}

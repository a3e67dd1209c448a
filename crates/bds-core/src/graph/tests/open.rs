//! Tests opening trees of nodes: the resulting graph, and that a failure leaves no node.

use crate::driver::OpenFlags;
use crate::graph::NodeId;
use crate::test_kit::logging::{Fixture, run, run_with};
use crate::{ErrorKind, Options};

const TREE: &str = "driver=cow,node-name=top,file.driver=file,file.node-name=f,file.filename=a,\
                    backing.driver=pass,backing.node-name=p,backing.file.driver=cow,\
                    backing.file.node-name=base,backing.file.file.driver=file,\
                    backing.file.file.filename=b,backing.file.file.node-name=g";

fn with_files(fixture: &Fixture) {
    fixture.plain("a");
    fixture.plain("b");
}

#[test]
fn a_tree_of_options_becomes_a_tree_of_nodes() {
    run(|fixture| async move {
        with_files(&fixture);
        let top = fixture.open(TREE).await;
        insta::assert_snapshot!(fixture.graph.dump(), @r"
        base cow len=512 ro,discard refs=1
          used by edge 'p.file' does=---- lets=rwus
          file -> g (data|metadata|primary) does=r--- lets=r-u-
        f file len=512 rw,discard refs=1
          filename a
          used by edge 'top.file' does=rw-s lets=r-u-
        g file len=512 ro,discard refs=1
          filename b
          used by edge 'base.file' does=r--- lets=r-u-
        p pass len=512 ro,discard refs=1
          used by edge 'top.backing' does=---- lets=rwus
          file -> base (filtered|primary) does=---- lets=rwus
        top cow len=512 rw refs=1
          held by owner 'open'
          file -> f (data|metadata|primary) does=rw-s lets=r-u-
          backing -> p (cow) does=---- lets=rwus
        ");
        assert_eq!(top.count(), 1, "the creator holds the only reference");
        assert_eq!(
            fixture.graph.find("base").unwrap().limits().max_transfer,
            4096,
            "from its file"
        );
    });
}

#[test]
fn a_tree_in_json_opens_the_same_graph() {
    run(|fixture| async move {
        with_files(&fixture);
        let json = serde_json::json!({
            "driver": "cow", "node-name": "top", "cache": {"direct": true}, "read-only": true,
            "file": {"driver": "file", "node-name": "f", "filename": "a"},
            "backing": null,
        });
        let _top = fixture.graph.open(Options::from_json(json).unwrap()).await.unwrap();
        insta::assert_snapshot!(fixture.graph.dump(), @r"
        f file len=512 ro,direct,discard refs=1
          filename a
          used by edge 'top.file' does=r--- lets=r-u-
        top cow len=512 ro,direct refs=1
          held by owner 'open'
          file -> f (data|metadata|primary) does=r--- lets=r-u-
        ");
        insta::assert_snapshot!(fixture.graph.dot(), @r#"
        digraph bds {
          node [shape=box, fontname=monospace];
          "f" [label="a\nf\nfile ro\n512 bytes, 1 refs"];
          "top" [label="a\ntop\ncow ro\n512 bytes, 1 refs"];
          "top" -> "f" [label="file\ndoes=r--- lets=r-u-"];
          "owner 'open' of top" [shape=ellipse, label="owner 'open'"];
          "owner 'open' of top" -> "top" [style=dotted];
        }
        "#);
        insta::assert_snapshot!(format!("{:#}", fixture.graph.query()), @r#"
        [
          {
            "node-name": "f",
            "drv": "file",
            "ro": true,
            "file": "a",
            "cache": {
              "direct": true,
              "no-flush": false,
              "writeback": true
            },
            "detect_zeroes": "off",
            "virtual-size": 512,
            "children": []
          },
          {
            "node-name": "top",
            "drv": "cow",
            "ro": true,
            "file": "a",
            "cache": {
              "direct": true,
              "no-flush": false,
              "writeback": true
            },
            "detect_zeroes": "off",
            "virtual-size": 512,
            "children": [
              {
                "child": "file",
                "node-name": "f"
              }
            ]
          }
        ]
        "#);
    });
}

#[test]
fn a_failure_at_any_child_leaves_no_node() {
    run(|fixture| async move {
        with_files(&fixture);
        for place in ["", "file.", "backing.", "backing.file.", "backing.file.file."] {
            let error = fixture.open_error(&format!("{TREE},{place}fail-open=on")).await;
            assert!(error.to_string().contains("injected failure to open"), "{place}: {error}");
            assert_eq!(fixture.graph.dump(), "", "{place}");
            let log = fixture.drivers.log();
            let count = |what: &str| log.iter().filter(|line| line.starts_with(what)).count();
            assert_eq!(count("close"), count("open"), "{place}: closed once each: {log:?}");
            let opened = |name: &str| log.contains(&format!("open {name}"));
            let abandoned = |line: &String| line.strip_prefix("abandon ").is_some_and(opened);
            assert!(!log.iter().any(abandoned), "{place}: opened nodes are closed: {log:?}");
            assert!(fixture.graph.reports().is_empty());
        }
        let _top = fixture.open(TREE).await; // all names are free again
    });
}

#[test]
fn unknown_options_are_refused_by_name_before_any_open() {
    run(|fixture| async move {
        with_files(&fixture);
        let error = fixture.open_error(&format!("{TREE},frob=1")).await;
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let text = error.to_string();
        assert!(text.contains("'cow' does not know the option 'frob'"), "{text}");
        assert!(text.contains("file, backing, data-file"), "{text}");
        let error = fixture.open_error(&format!("{TREE},backing.file.file.frob.x=1")).await;
        assert!(error.to_string().contains("'file' does not know the option 'frob'"), "{error}");
        assert!(fixture.drivers.log().iter().all(|line| !line.starts_with("open top")));
        // Known, but not taken by the driver: the driver had opened and is closed.
        let error = fixture.open_error(&format!("{TREE},ignored=on")).await;
        assert!(error.to_string().contains("'ignored'"), "{error}");
        assert_eq!(fixture.graph.dump(), "");
    });
}

#[test]
fn wrong_common_options_are_refused() {
    run(|fixture| async move {
        with_files(&fixture);
        for (text, wanted) in [
            ("node-name=x", "option 'driver' is missing"),
            ("driver=nope", "unknown driver 'nope' (there are: cow, file, pass)"),
            ("driver=file,filename=a,node-name=1x", "a node name is a letter"),
            ("driver=file,filename=a,read-only=2", "'read-only' wants on or off"),
            ("driver=file,filename=a,discard=maybe", "one of unmap, on, ignore, off"),
            ("driver=file,filename=a,detect-zeroes=unmap", "needs discard=unmap"),
            ("driver=file,filename=a,force-share=on", "needs read-only=on"),
            ("driver=cow", "option 'file' is missing"),
            ("driver=cow,file=missing", "there is no node 'missing'"),
            ("driver=cow,file.filename=a", "cannot open 'file': option 'driver' is missing"),
            ("driver=file,filename=missing", "missing: "),
        ] {
            let error = fixture.open_error(text).await.to_string();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        assert_eq!(fixture.graph.dump(), "");
    });
}

#[test]
fn names_are_unique_and_freed_by_the_last_release() {
    run(|fixture| async move {
        with_files(&fixture);
        let first = fixture.open("driver=file,filename=a,node-name=x").await;
        let error = fixture.open_error("driver=file,filename=b,node-name=x").await;
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        let auto = fixture.open("driver=file,filename=b").await;
        assert_eq!(auto.name(), "#block000");
        drop(first);
        // Not reaped yet, but the name is free.
        assert_eq!(fixture.graph.find("x").unwrap_err().kind(), ErrorKind::NotFound);
        let second = fixture.open("driver=file,filename=b,node-name=x").await;
        fixture.graph.reap().await;
        assert_eq!(fixture.graph.find("x").unwrap().id(), second.id());
    });
}

#[test]
fn a_name_is_reserved_but_not_found_during_open() {
    run(|fixture| async move {
        with_files(&fixture);
        let error = fixture
            .open_error(
                "driver=cow,node-name=x,file.driver=file,file.filename=a,\
                 backing.driver=cow,backing.node-name=x,backing.file.driver=file,\
                 backing.file.filename=b",
            )
            .await;
        assert!(error.to_string().contains("'x' is taken"), "{error}");
        let error = fixture
            .open_error("driver=cow,node-name=x,file.driver=file,file.filename=a,backing=x")
            .await;
        assert!(error.to_string().contains("there is no node 'x'"), "{error}");
    });
}

#[test]
fn a_child_by_name_is_shared_and_counted() {
    run(|fixture| async move {
        with_files(&fixture);
        let base = fixture.open("driver=file,filename=b,node-name=base,read-only=on").await;
        let _one = fixture.open("driver=pass,node-name=one,file=base,read-only=on").await;
        let _two = fixture.open("driver=pass,node-name=two,file=base,read-only=on").await;
        assert_eq!(base.count(), 3);
        let error = fixture.open_error("driver=pass,file=base").await;
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert!(error.to_string().contains("'base', which is read-only"), "{error}");
        let holders: Vec<String> =
            fixture.graph.holders(base.id()).iter().map(|holder| holder.name.to_string()).collect();
        assert_eq!(holders, ["open", "one.file", "two.file"]);
    });
}

#[test]
fn one_call_opens_a_bounded_number_of_nodes() {
    run_with(
        |config| config.max_nodes_per_image = 4,
        |fixture| async move {
            with_files(&fixture);
            let error = fixture.open_error(TREE).await;
            assert_eq!(error.kind(), ErrorKind::LimitExceeded);
            assert_eq!(fixture.graph.dump(), "");
            let four = "driver=pass,file.driver=pass,file.file.driver=pass,\
                        file.file.file.driver=file,file.file.file.filename=a";
            let _four = fixture.open(four).await;
        },
    );
}

#[test]
fn a_dropped_open_leaves_no_node() {
    run(|fixture| async move {
        with_files(&fixture);
        // Dropped after every number of polls until it completes.
        for polls in 0.. {
            let graph = fixture.graph.clone();
            let text = format!("{TREE},fail-close=off");
            let future = graph.open(Options::parse(&text).unwrap());
            let ended = poll_some(future, polls).await;
            if ended {
                fixture.graph.reap().await;
            }
            while fixture.graph.0.core.arena.stats().dead > 0 {
                bds_io::yield_now().await;
            }
            assert_eq!(fixture.graph.dump(), "", "after {polls} polls");
            if ended {
                break;
            }
        }
        let log = fixture.drivers.log();
        let count = |what: &str| log.iter().filter(|line| line.starts_with(what)).count();
        assert_eq!(count("open"), count("close"));
    });
}

/// Polls `polls` times, then drops. True if the future completed.
async fn poll_some<T>(future: impl Future<Output = T>, polls: usize) -> bool {
    let mut future = Box::pin(future);
    for _ in 0..polls {
        if futures_util::poll!(&mut future).is_ready() {
            return true;
        }
        bds_io::yield_now().await;
    }
    false
}

#[test]
fn foreign_and_stale_ids_are_not_found() {
    run(|fixture| async move {
        with_files(&fixture);
        let node = fixture.open("driver=file,filename=a").await;
        let id = node.id();
        assert_eq!(NodeId::from_u64(id.to_u64()), id);
        assert!(fixture.graph.acquire(id).is_ok());
        for bits in [0, 1, u64::MAX, id.to_u64() ^ (1 << 63), id.to_u64() + 1] {
            assert!(fixture.graph.acquire(NodeId::from_u64(bits)).is_err(), "{bits:#x}");
        }
        drop(node);
        assert!(fixture.graph.acquire(id).is_err());
    });
}

#[test]
fn info_only_opens_no_reference() {
    run(|fixture| async move {
        fixture.image(
            "a",
            crate::test_kit::logging::Header { backing: Some("gone"), ..Default::default() },
        );
        let options = Options::parse("driver=cow,file.driver=file,file.filename=a").unwrap();
        let flags = OpenFlags { info_only: true, read_only: true, ..OpenFlags::default() };
        let node = fixture.graph.open_with(options, flags).await.unwrap();
        assert_eq!(crate::graph::walk::children(&node).len(), 1);
    });
}

//! Checks the table of [`ErrorKind`] on real calls: which refusal has which kind.

use crate::driver::{Prealloc, Truncate, WriteFlags, ZeroFlags};
use crate::error::{Error, ErrorKind};
use crate::event::ErrorAction;
use crate::graph::{Access, Perm};
use crate::options::Options;
use crate::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy, IoStatus};
use crate::test_kit::disk::{Config, DiskGraph};
use crate::test_kit::{iov, run};

const GROW: Truncate =
    Truncate { len: 2048, exact: true, prealloc: Prealloc::Off, zero_new: false };

fn writer() -> BackendOptions {
    BackendOptions { writable: true, ..BackendOptions::default() }
}

/// The errors of every request that would change the node.
async fn changes(backend: &Backend) -> Vec<Error> {
    let mut errors = vec![
        backend.write(0, iov(&[1; 16], 1), WriteFlags::empty()).await.unwrap_err(),
        backend.write_compressed(0, iov(&[1; 16], 1)).await.unwrap_err(),
        backend.write_zeroes(0, 16, ZeroFlags::empty()).await.unwrap_err(),
        backend.discard(0, 16).await.unwrap_err(),
        backend.truncate(GROW).await.unwrap_err(),
    ];
    errors.push(backend.write_at(0, &[1; 16]).unwrap_err());
    errors
}

fn kinds(errors: &[Error]) -> Vec<ErrorKind> {
    errors.iter().map(Error::kind).collect()
}

#[test]
fn a_read_only_node_refuses_every_change_as_read_only() {
    run(1, async {
        let disks = DiskGraph::new();
        let options = Options::new().with("read-only", true);
        let (node, _) =
            disks.node("disk", vec![0; 1024], Config { options, ..Config::default() }).await;
        let reader = Backend::new(&node, BackendOptions::default()).unwrap();
        assert_eq!(kinds(&changes(&reader).await), [ErrorKind::ReadOnly; 6]);
        assert_eq!(Backend::new(&node, writer()).unwrap_err().kind(), ErrorKind::ReadOnly);
        let access = reader.set_access(Perm::WRITE, Perm::all()).await.unwrap_err();
        assert_eq!(access.kind(), ErrorKind::ReadOnly);
        assert_eq!(node.enable_copy_on_read().unwrap_err().kind(), ErrorKind::ReadOnly);
    });
}

#[test]
fn a_missing_permission_is_permission_denied_and_names_the_user() {
    run(2, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let options = BackendOptions { name: "reader".into(), ..BackendOptions::default() };
        let reader = Backend::new(&node, options).unwrap();
        let errors = changes(&reader).await;
        assert_eq!(kinds(&errors), [ErrorKind::PermissionDenied; 6]);
        for error in errors {
            assert_eq!(error.errno(), libc::EACCES);
            assert!(error.to_string().contains("'reader'"), "{error}");
        }
        reader.set_access(Perm::WRITE, Perm::all()).await.unwrap();
        let resize = reader.truncate(GROW).await.unwrap_err();
        assert_eq!(resize.kind(), ErrorKind::PermissionDenied, "writing is not resizing");
        assert_eq!(Access::READ.perm & Perm::changes(), Perm::empty());
    });
}

/// A stopped request would wait for ever: no decision of the user gives it the permission.
#[test]
fn a_missing_permission_is_reported_whatever_the_error_policy() {
    run(3, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let reader = Backend::new(&node, BackendOptions::default()).unwrap();
        let stop = ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop };
        reader.set_policies(stop);
        assert_eq!(kinds(&changes(&reader).await), [ErrorKind::PermissionDenied; 6]);
        assert_eq!(reader.io_status(), IoStatus::Ok);
        assert_eq!(ErrorAction::Report.as_str(), "report");
    });
}

#[test]
fn an_inactive_node_refuses_every_change_as_inactive() {
    run(4, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let reader = Backend::new(&node, BackendOptions::default()).unwrap();
        disks.graph().inactivate(&node).await.unwrap();
        assert_eq!(kinds(&changes(&reader).await), [ErrorKind::Inactive; 6]);
        assert_eq!(Backend::new(&node, writer()).unwrap_err().kind(), ErrorKind::Inactive);
    });
}

#[test]
fn conflicts_blockers_ranges_and_missing_media_have_kinds_of_their_own() {
    run(5, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let alone = BackendOptions { shared: Perm::CONSISTENT_READ, ..writer() };
        let backend = Backend::new(&node, alone).unwrap();
        assert_eq!(Backend::new(&node, writer()).unwrap_err().kind(), ErrorKind::InUse);
        let blocker = node.block(crate::graph::BlockOps::RESIZE, "a test runs");
        assert_eq!(backend.truncate(GROW).await.unwrap_err().kind(), ErrorKind::InUse);
        drop(blocker);
        assert_eq!(backend.read_at(1020, &mut [0; 16]).unwrap_err().kind(), ErrorKind::OutOfRange);
        backend.eject().await.unwrap();
        assert_eq!(backend.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::NoMedium);
        assert_eq!(backend.truncate(GROW).await.unwrap_err().kind(), ErrorKind::NoMedium);
        assert_eq!(disks.graph().find("nothing").unwrap_err().kind(), ErrorKind::NotFound);
    });
}

//! Tests attached devices, names of backends, and the monitor's list.

use bds_refcount::Release;

use crate::driver::WriteFlags;
use crate::error::ErrorKind;
use crate::event::Event;
use crate::graph::{Access, BlockOps, Perm};
use crate::options::Options;
use crate::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy, IoStatus};
use crate::test_kit::disk::{Config, DiskGraph, On};
use crate::test_kit::{ended, iov, run};

const NONE: WriteFlags = WriteFlags::empty();
const STOP: ErrorPolicies = ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop };

fn writer(name: &str) -> BackendOptions {
    BackendOptions { name: name.into(), writable: true, ..Default::default() }
}

#[test]
fn a_device_holds_the_backend_from_attach_to_detach() {
    run(1, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let mut events = disks.graph().events();
        let drive = Backend::new(&node, BackendOptions { claims_name: true, ..writer("d0") });
        let drive = drive.unwrap();
        let device = drive.attach_device("virtio0").unwrap();
        let refused = drive.attach_device("scsi0").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        assert!(refused.to_string().contains("virtio0"), "{refused}");
        drop(drive);
        device.backend().write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        assert_eq!(disks.graph().backend("d0").unwrap().device().as_deref(), Some("virtio0"));
        device.detach();
        assert!(disks.graph().backend("d0").is_err(), "the device's was the last handle");
        assert_eq!(node.release(), Release::Last);
        let (backend, device) = ("d0".to_owned(), "virtio0".to_owned());
        let attached = Event::DeviceAttached { backend: backend.clone(), device: device.clone() };
        assert_eq!(events.try_next(), Some(attached));
        assert_eq!(events.try_next(), Some(Event::DeviceDetached { backend, device }));
    });
}

#[test]
fn detach_drops_permissions_and_resets_policies() {
    run(2, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let exclusive =
            BackendOptions { shared: Perm::empty(), policy: Some(STOP), ..writer("d0") };
        let drive = Backend::new(&node, exclusive).unwrap();
        assert!(Backend::new(&node, writer("other")).is_err());
        let device = drive.attach_device("virtio0").unwrap();
        assert_eq!(drive.policies(), STOP);
        drop(device);
        assert_eq!(drive.access(), Access::NONE);
        assert_eq!(drive.policies(), ErrorPolicies::REPORT);
        let other = Backend::new(&node, writer("other")).unwrap();
        let late = drive.write(0, iov(&[1; 16], 1), NONE).await.unwrap_err();
        assert_eq!(late.kind(), ErrorKind::PermissionDenied, "it may not write any more");
        drop(other);
        let access = Access::ALL;
        drive.set_access(access.perm, access.shared).await.unwrap();
        drive.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
    });
}

#[test]
fn attach_clears_errors_and_detach_ends_stopped_requests() {
    run(3, async {
        let disks = DiskGraph::new();
        let (node, state) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let drive =
            Backend::new(&node, BackendOptions { policy: Some(STOP), ..writer("d0") }).unwrap();
        state.fail_with(On::Write, ErrorKind::NoSpace);
        let stopped = |drive: Backend| {
            bds_io::spawn(async move { drive.write(0, iov(&[1; 16], 1), NONE).await })
        };
        let mut first = stopped(drive.clone());
        assert!(ended(&mut first).await.is_none());
        assert_eq!(drive.io_status(), IoStatus::NoSpace);
        state.clear_faults();
        let device = drive.attach_device("virtio0").unwrap();
        assert_eq!(drive.io_status(), IoStatus::Ok);
        ended(&mut first).await.unwrap().unwrap();

        state.fail_with(On::Write, ErrorKind::Io);
        let mut second = stopped(drive.clone());
        assert!(ended(&mut second).await.is_none());
        assert_eq!(drive.io_status(), IoStatus::Failed);
        drop(device);
        assert_eq!(drive.io_status(), IoStatus::Ok);
        assert!(ended(&mut second).await.unwrap().is_err());
    });
}

#[test]
fn nodes_and_backends_share_one_namespace() {
    run(4, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let graph = disks.graph();
        let named = |name: &str| Backend::empty(graph, BackendOptions::registered(name));
        assert_eq!(named("disk").unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(named("").unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(named("#block000").unwrap_err().kind(), ErrorKind::InvalidInput);
        let drive = named("drive").unwrap();
        assert_eq!(named("drive").unwrap_err().kind(), ErrorKind::AlreadyExists);
        let open =
            |name: &str| graph.open(Options::new().with("driver", "fake").with("node-name", name));
        assert_eq!(open("drive").await.unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert!(graph.find("drive").is_err(), "a backend is no node");
        assert!(graph.backend("disk").is_err(), "a node is no backend");
        // Unclaimed names only describe the backend, and may be equal.
        let _two = [Backend::new(&node, writer("cli")), Backend::new(&node, writer("cli"))];
        assert!(graph.backend("cli").is_err());
        assert_eq!(graph.backends().len(), 3);

        let again = graph.backend("drive").unwrap();
        drop(drive);
        assert!(named("drive").is_err(), "a handle is left");
        drop(again);
        named("drive").unwrap();
        disks.node("drive", vec![0; 16], Config::default()).await;
    });
}

#[test]
fn a_refused_backend_leaves_its_name_free() {
    run(5, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let _other = Backend::new(&node, BackendOptions { shared: Perm::empty(), ..writer("a") });
        let wanted = BackendOptions { claims_name: true, ..writer("drive") };
        assert_eq!(Backend::new(&node, wanted.clone()).unwrap_err().kind(), ErrorKind::InUse);
        assert_eq!(node.count(), 2, "no reference is left behind");
        Backend::empty(disks.graph(), wanted).unwrap();
    });
}

#[test]
fn the_monitors_backend_is_deleted_unless_used_or_blocked() {
    run(6, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let graph = disks.graph();
        let make = |claims_name| BackendOptions { claims_name, ..writer("d0") };
        let unnamed = graph.own_backend(Backend::new(&node, make(false)).unwrap());
        assert_eq!(unnamed.unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(node.count(), 1, "the handle is given up");

        let drive = Backend::new(&node, make(true)).unwrap();
        assert_eq!(graph.del_backend("d0").unwrap_err().kind(), ErrorKind::InvalidInput);
        graph.own_backend(drive.clone()).unwrap();
        let twice = graph.own_backend(drive.clone()).unwrap_err();
        assert_eq!(twice.kind(), ErrorKind::AlreadyExists);
        let device = drive.attach_device("virtio0").unwrap();
        drop(drive);
        let refused = graph.del_backend("d0").unwrap_err();
        assert!(refused.to_string().contains("virtio0"), "{refused}");
        drop(device);
        let blocker = node.block(BlockOps::DELETE, "a job runs");
        assert_eq!(graph.del_backend("d0").unwrap_err().kind(), ErrorKind::InUse);
        drop(blocker);
        let user = graph.backend("d0").unwrap();
        assert_eq!(graph.del_backend("d0").unwrap(), Release::NotLast);
        assert_eq!(graph.backend("d0").unwrap().len(), 1024, "others keep it");
        graph.own_backend(user).unwrap();
        assert_eq!(graph.del_backend("d0").unwrap(), Release::Last);
        assert_eq!(graph.del_backend("d0").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(node.release(), Release::Last);
    });
}

/// A graph with a backend on the monitor's list ends with its last user.
#[test]
fn the_monitors_list_does_not_keep_the_graph() {
    run(7, async {
        let disks = DiskGraph::new();
        let (node, state) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let drive = Backend::new(&node, BackendOptions { claims_name: true, ..writer("d0") });
        disks.graph().own_backend(drive.unwrap()).unwrap();
        drop(node);
        assert_eq!(disks.graph().nodes().len(), 1, "the monitor's backend holds it");
        let watch = std::sync::Arc::downgrade(&state);
        drop((disks, state));
        crate::test_kit::let_tasks_run().await;
        assert!(watch.upgrade().is_none(), "the driver is closed and gone");
    });
}

#[test]
fn query_backends_shows_names_device_and_medium() {
    run(8, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let drive = Backend::new(&node, writer("d0")).unwrap();
        let _device = drive.attach_device("virtio0").unwrap();
        let _empty = Backend::empty(disks.graph(), BackendOptions::default()).unwrap();
        let shown = disks.graph().query_backends();
        assert_eq!(shown[0]["device"], "d0");
        assert_eq!(shown[0]["qdev"], "virtio0");
        assert_eq!(shown[0]["io-status"], "ok");
        assert_eq!(shown[0]["inserted"]["node-name"], "disk");
        assert_eq!(shown[0]["inserted"]["ro"], false);
        assert_eq!(shown[0]["inserted"]["write_threshold"], 0);
        assert!(shown[1].get("inserted").is_none());
        node.set_write_threshold(Some(512));
        let shown = disks.graph().query_backends();
        assert_eq!(shown[0]["inserted"]["write_threshold"], 512);
        let options = Options::new().with("read-only", true);
        let (only_read, _) =
            disks.node("rom", vec![0; 512], Config { options, ..Config::default() }).await;
        let _reader = Backend::new(&only_read, BackendOptions::default()).unwrap();
        assert_eq!(disks.graph().query_backends()[2]["inserted"]["ro"], true);
    });
}

#[test]
fn a_jobs_backend_stays_at_its_node_when_others_move() {
    run(3, async {
        let disks = DiskGraph::new();
        let (node, _) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let (other, _) = disks.node("other", vec![0; 1024], Config::default()).await;
        let guest = Backend::new(&node, writer("guest")).unwrap();
        let read = Access { perm: Perm::CONSISTENT_READ, shared: Perm::all() };
        let job = Backend::new(&node, BackendOptions::job("backup0", read)).unwrap();
        assert_eq!(job.access(), read);

        disks.graph().replace(&node, &other).await.unwrap();
        assert_eq!(guest.node().unwrap().id(), other.id());
        assert_eq!(job.node().unwrap().id(), node.id());
        let holders = disks.graph().holders(node.id());
        assert!(holders.iter().any(|h| h.to_string().starts_with("job 'backup0'")), "{holders:?}");
    });
}

//! QEMU's block layer as a library: opens disk images as a graph of counted nodes, reads, writes
//! and changes them while they are in use.
//!
//! This crate holds no code of its own. It re-exports the crates that do the work, so that one
//! dependency is enough:
//!
//! | module | crate | what it holds |
//! |---|---|---|
//! | [`core`] | `bds-core` | the block graph, the driver contract, requests, options, errors |
//! | [`drivers`] | `bds-drivers` | image formats, protocols and filters |
//! | [`jobs`] | `bds-jobs` | block jobs: states, verbs, events, groups |
//! | [`io`] | `bds-io` | buffers, executor, engines, the simulated disk |
//! | [`refcount`] | `bds-refcount` | the arena, generational handles, counted references |
//!
//! [`prelude`] has the names that nearly every program needs.
//!
//! # Open an image, read and write it
//!
//! A [`Graph`](prelude::Graph) owns all nodes. Options are QEMU's (`blockdev-add`), as
//! `key=value,…` or JSON. A [`Backend`](prelude::Backend) is what a device, a job or a program does
//! its I/O through.
//!
//! ```
//! use bds::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("disk.qcow2").display().to_string();
//! let graph = Graph::new(GraphConfig::new(std::sync::Arc::new(bds::drivers::registry())));
//! bds::io::block_on(async {
//!     graph.create_image(NewImage {
//!         format: "qcow2".into(),
//!         path: path.clone().into(),
//!         options: Options::parse("size=1G")?,
//!         skip_backing: false,
//!     }).await?;
//!
//!     let options = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={path}");
//!     let disk = graph.open(Options::parse(&options)?).await?;
//!     let backend = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
//!     backend.write(4096, vec![0xa5; 512].into(), WriteFlags::empty()).await?;
//!     backend.flush().await?; // writes that completed before are durable now
//!
//!     let buf = Buf::zeroed(512, 512);
//!     backend.read(4096, buf.iov()).await?;
//!     assert_eq!(buf.iov().to_vec(0..512), [0xa5; 512]);
//!
//!     drop(backend);
//!     disk.close().await?.into_result()?; // a failed last flush is an error here
//!     Ok(())
//! })
//! # }
//! ```
//!
//! # References and handles
//!
//! [`NodeRef`](prelude::NodeRef) is a counted reference; [`NodeId`](prelude::NodeId) is 64 bits
//! that keep nothing alive. After the last reference is released, the id is stale for ever and
//! every use of it is an error.
//!
//! ```
//! use bds::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let graph = Graph::new(GraphConfig::new(std::sync::Arc::new(bds::drivers::registry())));
//! bds::io::block_on(async {
//!     let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
//!     let id = disk.id();
//!     assert_eq!(disk.release(), Release::Last); // a fact about this call
//!     assert!(graph.acquire(id).is_err());       // stale
//!     for report in graph.reap().await {         // closes it; flush errors are in the report
//!         report.into_result()?;
//!     }
//!     Ok(())
//! })
//! # }
//! ```
//!
//! # An overlay
//!
//! An overlay stores what differs from its backing image. Names stored inside an image (backing
//! files) are opened only if the graph's [`ReferenceGate`](core::graph::ReferenceGate) allows it;
//! the default refuses. Here the program itself names the backing node.
//!
//! ```
//! use bds::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let file = |name: &str| dir.path().join(name).display().to_string();
//! # let (base_path, top_path) = (file("base.qcow2"), file("top.qcow2"));
//! # let graph = Graph::new(GraphConfig::new(std::sync::Arc::new(bds::drivers::registry())));
//! bds::io::block_on(async {
//!     let file = "file.driver=file,file.filename";
//!     let base = format!("driver=qcow2,node-name=base,{file}={base_path}");
//!     let top = format!("driver=qcow2,backing=base,{file}={top_path}");
//!     for (path, options) in [
//!         (&base_path, "size=1M".to_owned()),
//!         (&top_path, format!("size=1M,backing_file={base_path},backing_fmt=qcow2")),
//!     ] {
//!         let (format, path) = ("qcow2".into(), path.into());
//!         let options = Options::parse(&options)?;
//!         graph.create_image(NewImage { format, path, options, skip_backing: true }).await?;
//!     }
//!     let base = graph.open(Options::parse(&base)?).await?;
//!     let top = graph.open(Options::parse(&top)?).await?;
//!     drop(base); // the edge from 'top' holds it now
//!
//!     let backend = Backend::new(&top, BackendOptions { writable: true, ..Default::default() })?;
//!     backend.write(0, vec![1; 512].into(), WriteFlags::empty()).await?; // stored in 'top'
//!     assert_eq!(graph.nodes().len(), 4); // two images, two files
//!     Ok(())
//! })
//! # }
//! ```
//!
//! # A live snapshot
//!
//! A snapshot is a graph change: all users of the node use the new overlay from one moment on, with
//! requests in flight. A list of edits takes effect as a whole or not at all.
//!
//! ```
//! use bds::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let file = |name: &str| dir.path().join(name).display().to_string();
//! # let (base_path, top_path) = (file("base.qcow2"), file("top.qcow2"));
//! # let graph = Graph::new(GraphConfig::new(std::sync::Arc::new(bds::drivers::registry())));
//! # let image = |path: &str| -> Result<NewImage, bds::core::Error> {
//! #     let (format, path) = ("qcow2".into(), path.into());
//! #     Ok(NewImage { format, path, options: Options::parse("size=1M")?, skip_backing: true })
//! # };
//! bds::io::block_on(async {
//!     graph.create_image(image(&base_path)?).await?;
//!     let file = "file.driver=file,file.filename";
//!     let open = format!("driver=qcow2,node-name=base,{file}={base_path}");
//!     let base = graph.open(Options::parse(&open)?).await?;
//!     let backend = Backend::new(&base, BackendOptions { writable: true, ..Default::default() })?;
//!     backend.write(0, vec![1; 4096].into(), WriteFlags::empty()).await?;
//!
//!     // The snapshot: 'base' keeps its data, writes go to 'top'.
//!     graph.create_image(image(&top_path)?).await?;
//!     let open = format!("driver=qcow2,node-name=top,{file}={top_path}");
//!     let top = graph.open(Options::parse(&open)?).await?;
//!     graph.change().append(&base, &top).commit().await?;
//!     assert_eq!(backend.node().expect("it has a medium").id(), top.id());
//!
//!     backend.write(0, vec![2; 512].into(), WriteFlags::empty()).await?;
//!     let buf = Buf::zeroed(4096, 512);
//!     backend.read(0, buf.iov()).await?;
//!     assert_eq!(buf.iov().to_vec(511..513), [2, 1]); // the overlay, then the image below
//!     Ok(())
//! })
//! # }
//! ```
//!
//! # Convert
//!
//! [`copy`](core::copy::copy) is the engine of `bds convert`: holes are not read, zeros are not
//! written where the target reads as zeros, several pieces are in flight.
//!
//! ```
//! use std::sync::Arc;
//!
//! use bds::core::copy::{CopyOptions, copy};
//! use bds::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let graph = Graph::new(GraphConfig::new(Arc::new(bds::drivers::registry())));
//! bds::io::block_on(async {
//!     let source = graph.open(Options::parse("driver=mem,node-name=source,size=1M")?).await?;
//!     let target = graph.open(Options::parse("driver=mem,node-name=target,size=1M")?).await?;
//!     let from = Backend::new(&source, BackendOptions { writable: true, ..Default::default() })?;
//!     let to = Backend::new(&target, BackendOptions { writable: true, ..Default::default() })?;
//!     from.write(65536, vec![7; 4096].into(), WriteFlags::empty()).await?;
//!
//!     let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
//!     let report = copy(&[Arc::new(from).into()], &to, &options).await?;
//!     assert_eq!((report.total, report.written), (1 << 20, 4096));
//!     to.flush().await?;
//!     Ok(())
//! })
//! # }
//! ```
//!
//! # A backup in twenty lines
//!
//! A [job](crate::jobs) runs beside the guest. This one copies the disk as it is when `prepare`
//! returns; what the guest overwrites meanwhile is copied before. The result of `wait` is announced
//! when the copy is durable.
//!
//! ```
//! use bds::jobs::backup::{Backup, BackupOptions};
//! use bds::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let graph = Graph::new(GraphConfig::new(std::sync::Arc::new(bds::drivers::registry())));
//! bds::io::block_on(async {
//!     let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
//!     let copy = graph.open(Options::parse("driver=mem,node-name=copy,size=1M")?).await?;
//!     let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
//!     guest.write(0, vec![1; 4096].into(), WriteFlags::empty()).await?;
//!
//!     let jobs = JobManager::new(&graph); // ended by the graph's shutdown
//!     let backup = Backup::prepare(BackupOptions::new(&disk, &copy, "backup0")).await?;
//!     let options = JobOptions { speed: 64 << 20, ..JobOptions::new("backup0") };
//!     let job = jobs.start(options, Box::new(backup)).await?;
//!     guest.write(0, vec![2; 4096].into(), WriteFlags::empty()).await?; // after the moment
//!     job.wait().await?;
//!
//!     let buf = Buf::zeroed(4096, 512);
//!     Backend::new(&copy, BackendOptions::default())?.read(0, buf.iov()).await?;
//!     assert_eq!(buf.iov().to_vec(0..4096), [1; 4096]);
//!     Ok(())
//! })
//! # }
//! ```
//!
//! Jobs that are started with [`start_group`](crate::jobs::JobManager::start_group), of any types,
//! take effect together or not at all. States, verbs and guarantees: `docs/jobs.md`.
//!
//! # In an event loop
//!
//! A [`Context`](io::Context) is one thread's executor, engine and clock. Its descriptor is
//! readable when it has something to do, so it fits any loop around `poll` or `epoll`.
//!
//! ```
//! use std::os::fd::BorrowedFd;
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicBool, Ordering};
//! use std::time::Duration;
//!
//! use bds::prelude::*;
//! use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let graph = Graph::new(GraphConfig::new(Arc::new(bds::drivers::registry())));
//! let context = Context::new(ContextOptions::default())?;
//! let done = Arc::new(AtomicBool::new(false));
//! let set_done = Arc::clone(&done);
//! let work = context.spawn(async move {
//!     let disk = graph.open(Options::parse("driver=mem,size=1M")?).await?;
//!     let backend = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
//!     backend.write(0, vec![1; 512].into(), WriteFlags::empty()).await?;
//!     set_done.store(true, Ordering::Release);
//!     Ok::<(), bds::core::Error>(())
//! });
//!
//! // SAFETY: the Context lives as long as the loop and keeps its descriptor open.
//! let fd = unsafe { BorrowedFd::borrow_raw(context.fd()) };
//! while !done.load(Ordering::Acquire) {
//!     poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE)?;
//!     context.turn(Some(Duration::ZERO))?;
//! }
//! context.block_on(work)?;
//! # Ok(())
//! # }
//! ```
//!
//! # Under tokio
//!
//! The futures run on any executor. Where the polling thread has no Context, operations go to one
//! background Context that all such threads share.
//!
//! ```
//! use bds::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let graph = Graph::new(GraphConfig::new(std::sync::Arc::new(bds::drivers::registry())));
//! let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build()?;
//! runtime.block_on(async {
//!     let disk = graph.open(Options::parse("driver=mem,size=1M")?).await?;
//!     let backend = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
//!     let writer = tokio::spawn(async move {
//!         backend.write(0, vec![1; 512].into(), WriteFlags::empty()).await?;
//!         backend.flush().await
//!     });
//!     writer.await??;
//!     Ok(())
//! })
//! # }
//! ```
//!
//! # Share buffers with a VM's guest
//!
//! An operation in flight owns its [`IoVec`](prelude::IoVec): a list of segments, each with an
//! anchor that keeps the memory mapped. A VMM makes its segments out of guest memory and hands over
//! the mapping as the anchor; nothing is copied, and dropping or forgetting a request's future at
//! any await is sound.
//!
//! ```
//! use std::sync::Arc;
//!
//! use bds::prelude::*;
//!
//! /// The guest's memory: unmapped when the last anchor is gone.
//! struct GuestMemory(Box<[std::cell::UnsafeCell<u8>]>);
//! // SAFETY: the bytes are reached through raw pointers only.
//! unsafe impl Sync for GuestMemory {}
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let graph = Graph::new(GraphConfig::new(Arc::new(bds::drivers::registry())));
//! let memory = Arc::new(GuestMemory((0..65536).map(|_| 0.into()).collect()));
//! let descriptor = (4096, 512); // from the guest's queue; check it against the memory's length
//! // SAFETY: the range lies inside the memory, which lives as long as the anchor; no references to
//! // it exist.
//! let iov = unsafe {
//!     IoVec::from_raw(memory.clone(), memory.0[descriptor.0].get(), descriptor.1)
//! };
//! bds::io::block_on(async {
//!     let disk = graph.open(Options::parse("driver=mem,size=1M")?).await?;
//!     let backend = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
//!     backend.write(0, vec![9; 512].into(), WriteFlags::empty()).await?;
//!     backend.read(0, iov.clone()).await?; // straight into the guest's memory
//!     assert_eq!(iov.to_vec(0..512), [9; 512]);
//!     Ok(())
//! })
//! # }
//! ```
#![forbid(unsafe_code)]

pub use bds_core as core;
pub use bds_drivers as drivers;
pub use bds_io as io;
pub use bds_jobs as jobs;
pub use bds_refcount as refcount;

/// The names that nearly every program needs: `use bds::prelude::*;`.
pub mod prelude {
    pub use bds_core::driver::{Attempt, Prealloc, Truncate, WriteFlags, ZeroFlags};
    pub use bds_core::graph::{
        Graph, GraphConfig, NewImage, NodeId, NodeRef, ReferenceGate, Release, Stale,
    };
    pub use bds_core::request::{Backend, BackendOptions};
    pub use bds_core::{Error, ErrorKind, Options};
    pub use bds_io::{Buf, Context, ContextOptions, IoVec};
    pub use bds_jobs::{JobHandle, JobManager, JobOptions, JobStatus};
}

/// The lines of the project's README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ReadmeOfTheProject;

/// The lines of the crate's README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeOfTheCrate;

//! Creates an image, as `qemu-img create` does it: everything is checked before a file is touched.
//!
//! ```text
//! options split ─► backing image opened read-only, for its length ─► options checked by the format
//!   ─► files opened or made, compared with all that are open here, locked  (what they hold is still there)
//!   ─► emptied ─► opened for writing ─► format writes the image ─► flushed, closed
//! ```
//!
//! A failure, or dropping the future, removes the files that were created here, and only those. Up
//! to the step "emptied" a file that existed before keeps its bytes.

use std::panic::Location;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::Holder;

use super::create_target::{Target, check_rest, protocol_of, unknown};
use super::inspect::{Inspected, file_options};
use super::open_node::SweepIfDropped;
use super::reference_gate::{self, GateDecision, GateQuestion, ReferenceFormat};
use crate::driver::{Access, Perm};
use crate::driver::{Child, CreateContext, DriverType, OpenFlags, ReferenceKind, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{CloseError, Graph, NodeRef, Root};
use crate::options::Options;

/// An image to be created.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The format's name.
    pub format: String,
    /// The file to hold it. Emptied if it exists, unless it belongs to an image that is open in
    /// this graph: that is refused.
    pub path: PathBuf,
    /// The format's create options (`size`, `backing_file`, `backing_fmt`, `data_file` and so on)
    /// and those of the protocol, if it knows them and the format does not.
    pub options: Options,
    /// Do without the backing image: it may be missing or unreadable. Then `size` must be given.
    pub skip_backing: bool,
}

/// Facts about the created image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewImageReport {
    /// The image's virtual size in bytes.
    pub len: u64,
}

/// The backing image of a new image.
#[derive(Default)]
struct NewBacking {
    /// The image, open until the new one is done: its files are refused as targets like those of
    /// any open image.
    node: Option<NodeRef>,
    len: Option<u64>,
    /// Its file, where it could not be opened and need not be.
    file: Option<(u64, u64)>,
}

/// A new image with its drivers and options resolved.
struct ResolvedImage<'a> {
    format: Arc<dyn DriverType>,
    path: &'a Path,
    options: Options,
    file_options: Options,
}

impl Graph {
    /// Creates an image file. A relative `backing_file` starts at the image's directory, a relative
    /// `data_file` at the working directory, as when it is opened; the backing image is opened
    /// through the gate.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::NewImage;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let image = NewImage {
    ///     format: "layer".into(),
    ///     path: "disk.img".into(),
    ///     options: Options::parse("size=1G")?,
    ///     skip_backing: false,
    /// };
    /// // With a driver that can, the file would be there now.
    /// let error = graph.create_image(image).await.unwrap_err();
    /// assert_eq!(error.to_string(), "'layer' is not an image format (there are: qcow2, raw)");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// No new file remains. Whatever can be checked is checked first; if that fails, an existing
    /// file is as it was.
    pub async fn create_image(&self, image: NewImage) -> Result<NewImageReport> {
        super::open_node::ensure_executor()?;
        let graph = self.clone();
        bds_io::spawn_now(async move { graph.make_image(image).await }).await
    }

    async fn make_image(&self, image: NewImage) -> Result<NewImageReport> {
        let NewImage { format, path, mut options, skip_backing } = image;
        let registry = &self.config().registry;
        let format = Arc::clone(registry.format(&format)?);
        if format.create_options().is_empty() {
            let message = format!("{} images cannot be created", format.name());
            return Err(Error::new(ErrorKind::NotSupported, message).file(&path));
        }
        let protocol = Arc::clone(registry.driver(protocol_of(&self.config().fs, &path))?);
        let file_options = split_options(&*format, &*protocol, &mut options)?;
        let image = ResolvedImage { format, path: &path, options, file_options };
        let mut guard = SweepIfDropped { graph: self.clone(), is_over: false };
        self.0.core.sweep_and_keep().await;
        let backing = self.find_backing(&path, &image.options, skip_backing).await?;
        let made = self.create_checked(image, &backing).await;
        let closed = match backing.node {
            Some(node) => match node.close().await {
                Ok(report) => report.into_result(),
                // The gate named a node that others use; it stays open.
                Err(CloseError::InUse { .. }) => Ok(()),
            },
            None => Ok(()),
        };
        if made.is_err() {
            self.0.core.sweep_and_keep().await;
        }
        guard.is_over = true;
        let report = made.map_err(|error| error.file(&path))?;
        closed.map(|()| report)
    }

    /// Checks the rest, and only then empties and writes.
    async fn create_checked(
        &self,
        image: ResolvedImage<'_>,
        backing: &NewBacking,
    ) -> Result<NewImageReport> {
        let ResolvedImage { format, path, options, mut file_options } = image;
        let mut checked = options.clone();
        let facts = format.check_create(&mut checked, backing.len)?;
        check_rest(&*format, &checked)?;
        let mut others: Vec<(u64, u64)> = backing.file.into_iter().collect();
        let file = Target::claim(self, path, &mut file_options, &others)?;
        file.check_len(facts.min_file_len)?;
        others.push(file.identity());
        let data_file = match data_path(path, &options) {
            Some(path) => Some(Target::claim(self, &path, &mut Options::new(), &others)?),
            None => None,
        };
        if let Some(data_file) = &data_file {
            data_file.check_len(facts.len)?;
        }
        let file = file.empty().await?;
        let data_file = match data_file {
            Some(data_file) => Some(data_file.empty().await?),
            None => None,
        };
        self.write_image(&*format, &file, data_file.as_ref(), options, backing.len).await?;
        for made in data_file.into_iter().chain([file]) {
            made.keep();
        }
        Ok(NewImageReport { len: facts.len })
    }

    /// Opens the created files, lets the format write, closes.
    async fn write_image(
        &self,
        format: &dyn DriverType,
        file: &Target,
        data_file: Option<&Target>,
        mut options: Options,
        backing_len: Option<u64>,
    ) -> Result<()> {
        let metadata =
            if data_file.is_some() { Role::METADATA } else { Role::METADATA | Role::DATA };
        let file = self.open_created(file, metadata | Role::PRIMARY).await?;
        let data_file = match data_file {
            Some(data_file) => Some(self.open_created(data_file, Role::DATA).await?),
            None => None,
        };
        let context = CreateContext {
            file: self.child_for_create("file", &file)?,
            data_file: match &data_file {
                Some(node) => Some(self.child_for_create("data-file", node)?),
                None => None,
            },
            backing_len,
            options: &mut options,
        };
        format.create(context).await?;
        check_rest(format, &options)?;
        for node in data_file.into_iter().chain([file]) {
            let report = node.close().await.map_err(Error::from)?;
            report.into_result()?;
        }
        Ok(())
    }

    async fn open_created(&self, made: &Target, role: Role) -> Result<NodeRef> {
        let flags = OpenFlags { role, ..OpenFlags::default() };
        let options = file_options(made.protocol(), made.path());
        let node = self.open_as(None, options, flags, Location::caller()).await?;
        Ok(node.held_as(Holder::new(HolderKind::Owner, "create")))
    }

    pub(super) fn child_for_create(&self, name: &'static str, node: &NodeRef) -> Result<Child> {
        let access = Access { perm: Perm::all(), shared: Perm::CONSISTENT_READ };
        let root = Root {
            kind: HolderKind::Owner,
            name: "create",
            access,
            is_fixed: true,
            is_backend: false,
        };
        let edge = self.attach_root(Some(node), &root)?;
        Ok(Child::new(name, (self.0.core.make_port)(edge)))
    }

    /// Opens the backing image, if one is named. If it is to be skipped, its files are found as far
    /// as possible.
    async fn find_backing(&self, path: &Path, options: &Options, skip: bool) -> Result<NewBacking> {
        let Some(stored) = options.peek_path("backing_file") else {
            return Ok(NewBacking::default());
        };
        let stored = stored.as_path();
        let format = text(options, "backing_fmt");
        let named = |error: Error| {
            error.context(format_args!("cannot open backing file '{}'", stored.display()))
        };
        if !skip {
            let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
            let node = self.open_backing(path, stored, format, flags).await.map_err(named)?;
            return Ok(NewBacking { len: Some(node.len()), node: Some(node), file: None });
        }
        // Only so that none of its files is used for the new image.
        let flags = OpenFlags { read_only: true, force_share: true, ..OpenFlags::default() };
        let node = self.open_backing(path, stored, format, flags).await.ok();
        let resolved = reference_gate::resolve(ReferenceKind::Backing, stored, Some(path));
        let file = Inspected::new(&self.config().fs, resolved).ok().map(|file| file.identity());
        Ok(NewBacking { node, len: None, file })
    }

    async fn open_backing(
        &self,
        path: &Path,
        stored: &Path,
        format: Option<&str>,
        flags: OpenFlags,
    ) -> Result<NodeRef> {
        let resolved = reference_gate::resolve(ReferenceKind::Backing, stored, Some(path));
        let question = GateQuestion {
            kind: ReferenceKind::Backing,
            stored_name: stored.as_os_str(),
            stored_format: format,
            depth: 0,
            parent_node: "create",
            parent_file: Some(path),
            resolved: &resolved,
            fs: &self.config().fs,
        };
        let (backing, wanted) = match self.config().gate.decide(&question) {
            GateDecision::Open { path, format } => (path, format),
            GateDecision::Node(name) => return self.find(&name),
            GateDecision::Refuse(why) => {
                let message = format!("{why}; give a size and do not look at it, or allow it");
                return Err(Error::new(ErrorKind::ReferenceRefused, message));
            }
        };
        let file = Inspected::new(&self.config().fs, backing)?;
        let format = match (wanted, format) {
            (ReferenceFormat::Named(name), _) => name,
            (_, Some(stored)) => stored.to_owned(),
            (_, None) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "a backing file needs its format: give 'backing_fmt'",
                )
                .file(path));
            }
        };
        self.config().registry.format(&format)?;
        let tree = Options::new().with("driver", format).with("file", file.options().into_json());
        self.open_as(None, tree, flags, Location::caller()).await
    }
}

fn data_path(path: &Path, options: &Options) -> Option<PathBuf> {
    let name = options.peek_path("data_file")?;
    Some(reference_gate::resolve(ReferenceKind::DataFile, name, Some(path)))
}

fn text<'a>(options: &'a Options, key: &str) -> Option<&'a str> {
    options.peek(key).and_then(|value| value.as_str())
}

/// Takes the options that only the protocol knows. The rest is the format's; unknown ones are
/// refused.
fn split_options(
    format: &dyn DriverType,
    protocol: &dyn DriverType,
    options: &mut Options,
) -> Result<Options> {
    let knows = |driver: &dyn DriverType, key: &str| {
        driver.create_options().iter().any(|spec| {
            spec.name == key || spec.name.split_once('.').is_some_and(|(group, _)| group == key)
        })
    };
    let keys: Vec<String> = options.keys().map(str::to_owned).collect();
    let mut taken = Options::new();
    for key in keys {
        if knows(format, &key) {
            continue;
        }
        if !knows(protocol, &key) {
            return Err(unknown(format, &key));
        }
        if let Some(value) = options.take(&key) {
            taken.set(&key, value);
        }
    }
    Ok(taken)
}

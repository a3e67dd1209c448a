//! Job `create`: makes an image file, or writes a new image into an open node (`blockdev-create`).
//!
//! Options are QAPI's `BlockdevCreateOptions`. Protocols (`file`) make a file; formats write into
//! the node that `file` names. Progress goes from 0 of 1 to 1 of 1. The job holds nothing but
//! references to its nodes. A forced cancel ends it; what was written stays.

use std::fmt;

use bds_core::driver::{BoxFuture, Category};
use bds_core::graph::{Graph, NewImage, NodeFormat, NodeRef, walk};
use bds_core::{Error, ErrorKind, Options, Result};

use crate::context::JobContext;
use crate::driver::{JobDriver, Outcome};
use crate::job::refused;
use crate::kinds::JobType;
use crate::options::JobOptions;

/// The work of a job `create`.
///
/// ```
/// use bds_core::Options;
/// use bds_jobs::create::Create;
/// use bds_jobs::JobManager;
///
/// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
/// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # config.fs = sim.fs();
/// # let graph = bds_core::graph::Graph::new(config);
/// # sim.block_on(async {
/// let jobs = JobManager::new(&graph);
/// let file = Options::parse("driver=file,filename=disk.qcow2,size=0")?;
/// jobs.start(Create::options("c0"), Create::prepare(&graph, file)?.into()).await?.wait().await?;
///
/// graph.add(Options::parse("driver=file,node-name=file,filename=disk.qcow2")?).await?;
/// let format = Options::parse("driver=qcow2,file=file,size=1G,cluster-size=2M")?;
/// jobs.start(Create::options("c1"), Create::prepare(&graph, format)?.into()).await?.wait().await?;
/// let disk = graph.open(Options::parse("driver=qcow2,file=file")?).await?;
/// assert_eq!(disk.len(), 1 << 30);
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub struct Create {
    graph: Graph,
    /// Taken when it runs.
    image: Option<Image>,
}

enum Image {
    File(NewImage),
    Format { node: NodeRef, format: NodeFormat },
}

impl fmt::Debug for Create {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.image {
            Some(Image::File(image)) => write!(f, "Create({})", image.path.display()),
            Some(Image::Format { node, format }) => {
                write!(f, "Create({} in '{}')", format.format, node.name())
            }
            None => f.write_str("Create"),
        }
    }
}

impl From<Create> for Box<dyn JobDriver> {
    fn from(job: Create) -> Self {
        Box::new(job)
    }
}

impl Create {
    /// Options of such a job: it takes effect by itself, and waits to be dismissed.
    pub fn options(id: impl Into<String>) -> JobOptions {
        JobOptions { auto_finalize: true, auto_dismiss: false, ..JobOptions::new(id) }
    }

    /// Checks what can be checked without touching a file.
    ///
    /// # Errors
    /// `InvalidInput`: no such driver, or a wrong option; `NotSupported`: the driver makes no
    /// images; `NotFound`: no such node.
    pub fn prepare(graph: &Graph, mut options: Options) -> Result<Self> {
        let Some(name) = options.take_str("driver")? else {
            return Err(refused("Parameter 'driver' is missing"));
        };
        let known = graph.config().registry.driver(&name);
        let driver = known
            .map_err(|_| refused(format!("Block driver '{name}' not found or not supported")))?;
        if driver.create_options().is_empty() {
            let message = "Driver does not support blockdev-create";
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        let image = match driver.category() {
            Category::Protocol => file_image(options)?,
            _ => node_image(graph, name, options)?,
        };
        Ok(Self { graph: graph.clone(), image: Some(image) })
    }

    async fn work(&mut self) -> Result<()> {
        match self.image.take() {
            Some(Image::File(image)) => {
                let path = image.path.display().to_string();
                self.graph.create_image(image).await.map(drop).map_err(|error| {
                    let reason = reason(&error);
                    let message = format!("Could not create '{path}': {reason}");
                    Error::new(error.kind(), message)
                })
            }
            Some(Image::Format { node, format }) => {
                self.graph.format_node(&node, format).await.map(drop)
            }
            None => Ok(()),
        }
    }
}

/// The system's words for the error if it has any, without the number; else its own.
fn reason(error: &Error) -> String {
    let system = error.cause().and_then(|cause| cause.downcast_ref::<std::io::Error>());
    let Some(code) = system.and_then(std::io::Error::raw_os_error) else {
        return error.to_string();
    };
    let words = std::io::Error::from_raw_os_error(code).to_string();
    words.split(" (os error").next().unwrap_or_default().to_owned()
}

/// A file of so many bytes.
fn file_image(mut options: Options) -> Result<Image> {
    let Some(path) = options.take_path("filename")? else {
        return Err(refused("Parameter 'filename' is missing"));
    };
    Ok(Image::File(NewImage { format: "raw".to_owned(), path, options, skip_backing: true }))
}

/// An image in an open node.
fn node_image(graph: &Graph, format: String, mut options: Options) -> Result<Image> {
    let Some(file) = options.take_str("file")? else {
        return Err(refused("Parameter 'file' is missing"));
    };
    let node = graph.find(&file)?;
    let data_file = match options.take_str("data-file")? {
        Some(name) => Some(graph.find(&name)?),
        None => None,
    };
    let mut spelled = with_our_names(options)?;
    if let Some(data_file) = &data_file {
        let name = walk::filename(data_file).ok_or_else(|| {
            let message = "it has no file name that the image could record";
            Error::new(ErrorKind::NotSupported, message).node(data_file.name())
        })?;
        spelled.set_path("data_file", name);
    }
    Ok(Image::Format { node, format: NodeFormat { format, options: spelled, data_file } })
}

/// QAPI's names as those of create options: `_` for `-`, `compat` for `version`.
fn with_our_names(mut options: Options) -> Result<Options> {
    let mut spelled = Options::new();
    if let Some(version) = options.take_str("version")? {
        let compat = match version.as_str() {
            "v2" => "0.10",
            "v3" => "1.1",
            _ => {
                return Err(refused(format!(
                    "Parameter 'version' does not accept value '{version}'"
                )));
            }
        };
        spelled.set("compat", compat);
    }
    let keys: Vec<String> = options.keys().map(str::to_owned).collect();
    for key in keys {
        if let Some(value) = options.take(&key) {
            spelled.set(&key.replace('-', "_"), value);
        }
    }
    Ok(spelled)
}

impl JobDriver for Create {
    fn job_type(&self) -> JobType {
        JobType::Create
    }

    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            ctx.progress().set_remaining(1);
            self.work().await?;
            ctx.progress().advance(1);
            Ok(())
        })
    }

    fn retire<'a>(&'a mut self, _: &'a JobContext, _: Outcome<'a>) -> BoxFuture<'a, Result<()>> {
        self.image = None;
        Box::pin(async { Ok(()) })
    }
}

//! Opens a node's children for its driver.
//!
//! A child comes from an option (a node's name, or a tree that describes one) or, if there is none,
//! from a name stored in the image, and then only through the reference gate. The driver gets a
//! child handle.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Strong};

use super::call::Call;
use super::inspect::Inspected;
use super::reference_gate::{self, GateDecision, GateQuestion, ReferenceFormat};
use crate::driver::Access;
use crate::driver::{
    BoxFuture, Child, ChildOpener, ChildRequest, NodeUse, OpenFlags, Reference, ReferenceKind, Role,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::change::perm::{self, Strictness};
use crate::graph::change::stage::Stage;
use crate::graph::model::edge::{Edge, EdgeParts, check_role};
use crate::graph::model::flags::inherited;
use crate::graph::model::node::Node;
use crate::graph::query::walk;
use crate::options::{ChildOption, Options};

pub(in crate::graph) struct Opener {
    call: Call,
    node_name: Arc<str>,
    flags: OpenFlags,
    /// With true if the child was opened inline for this node, and not found by name.
    edges: Vec<(Arc<Edge>, bool)>,
}

impl Opener {
    pub(in crate::graph) fn new(call: Call, node_name: Arc<str>, flags: OpenFlags) -> Self {
        Self { call, node_name, flags, edges: Vec::new() }
    }

    /// The edges whose child handle the driver kept. The others end here.
    pub(in crate::graph) fn into_children(self) -> Vec<(Arc<Edge>, bool)> {
        self.edges.into_iter().filter(|(edge, _)| Arc::strong_count(edge) > 1).collect()
    }

    async fn open(&mut self, request: ChildRequest) -> Result<Option<Child>> {
        let ChildRequest { name, role, option, reference } = request;
        self.check_role(name, role)?;
        let option = option.map(|value| ChildOption::from_json(name, value)).transpose()?;
        let is_inline = !matches!(option, Some(ChildOption::Node(_)));
        let target = match (option, reference) {
            (Some(ChildOption::None), _) | (None, None) => return Ok(None),
            (Some(ChildOption::Node(node)), _) => {
                Strong::clone(self.call.graph.find(&node)?.strong())
            }
            (Some(ChildOption::Tree(tree)), _) => self
                .open_tree(tree, role)
                .await
                .map_err(|error| error.context(format_args!("cannot open '{name}'")))?,
            (None, Some(_)) if self.flags.info_only => return Ok(None),
            (None, Some(reference)) => self.open_reference(&reference, role).await?,
        };
        self.check_file(name, role, &target)?;
        self.attach(name, role, target, is_inline).map(Some)
    }

    fn check_role(&self, name: &str, role: Role) -> Result<()> {
        check_role(self.edges.iter().map(|(edge, _)| edge.role()), name, role)
    }

    async fn open_tree(&self, tree: Options, role: Role) -> Result<Strong<Node>> {
        let mut call = self.call.clone();
        if role.contains(Role::COW) {
            call.depth += 1;
            let limit = call.graph.config().max_depth;
            if call.depth >= limit {
                return Err(Error::new(
                    ErrorKind::LimitExceeded,
                    format!("the backing chain is longer than {limit} images (max_depth)"),
                ));
            }
        }
        call.files_above = self.files();
        call.open_node(None, tree, inherited(self.flags, role)).await
    }

    /// Files of this image and those above.
    fn files(&self) -> Vec<(u64, u64)> {
        let mut files = self.call.files_above.clone();
        for (edge, _) in self.edges.iter().filter(|(edge, _)| !edge.role().contains(Role::COW)) {
            files.extend(walk::files_of_image(&edge.target()));
        }
        files
    }

    /// The file that names stored in this image are relative to.
    fn own_file(&self) -> Option<PathBuf> {
        let (primary, _) =
            self.edges.iter().find(|(edge, _)| edge.role().contains(Role::PRIMARY))?;
        walk::filename(&primary.target())
    }

    async fn open_reference(&self, reference: &Reference, role: Role) -> Result<Strong<Node>> {
        let file = self.own_file();
        let message = match reference.kind {
            ReferenceKind::Backing => "backing file",
            ReferenceKind::DataFile => "data file",
        };
        let named = |error: Error| {
            let stored = reference.stored_name.display();
            error.context(match &file {
                Some(file) => format!("cannot open {message} '{stored}' of '{}'", file.display()),
                None => format!("cannot open {message} '{stored}'"),
            })
        };
        self.open_reference_at(reference, role, file.clone()).await.map_err(named)
    }

    async fn open_reference_at(
        &self,
        reference: &Reference,
        role: Role,
        file: Option<PathBuf>,
    ) -> Result<Strong<Node>> {
        let Reference { kind, stored_name, stored_format } = reference;
        if stored_name.is_empty() || stored_name.as_bytes().contains(&0) {
            return Err(Error::new(ErrorKind::InvalidImage, "the stored name is not a file name"));
        }
        let config = self.call.graph.config();
        let resolved = reference_gate::resolve(*kind, stored_name, file.as_deref());
        let question = GateQuestion {
            kind: *kind,
            stored_name,
            stored_format: stored_format.as_deref(),
            depth: self.call.depth,
            parent_node: &self.node_name,
            parent_file: file.as_deref(),
            resolved: &resolved,
            fs: &config.fs,
        };
        let (path, format) = match config.gate.decide(&question) {
            GateDecision::Open { path, format } => (path, format),
            GateDecision::Node(name) => {
                return Ok(Strong::clone(self.call.graph.find(&name)?.strong()));
            }
            GateDecision::Refuse(why) => return Err(refused(*kind, &why)),
        };
        let beside = file.as_deref().and_then(Path::parent).map(|dir| dir.join(stored_name));
        let file = Inspected::new(&config.fs, path).map_err(|error| {
            let is_there = *kind == ReferenceKind::DataFile
                && beside.is_some_and(|file| config.fs.stat(&file).is_ok());
            if is_there { beside_only(error) } else { error }
        })?;
        if self.files().contains(&file.identity()) {
            let message = "the chain of images loops: this file is already part of it";
            return Err(Error::new(ErrorKind::InvalidImage, message).file(file.path()));
        }
        let tree = match kind {
            ReferenceKind::DataFile => file.options(),
            ReferenceKind::Backing => {
                let format = self.format(reference, &format, &file).await?;
                Options::new().with("driver", format).with("file", file.options().into_json())
            }
        };
        self.open_tree(tree, role).await
    }

    /// The format of a backing file: from the gate, the image, or, where the gate allows it, the
    /// bytes.
    async fn format(
        &self,
        reference: &Reference,
        wanted: &ReferenceFormat,
        file: &Inspected,
    ) -> Result<String> {
        let registry = &self.call.graph.config().registry;
        let name = match (wanted, &reference.stored_format) {
            (ReferenceFormat::Named(name), _) => name.clone(),
            (_, Some(stored)) => stored.clone(),
            (ReferenceFormat::StoredOrProbed, None) => {
                let guess = file.guess(registry).await?;
                guess.best().map_err(|error| error.file(file.path()))?.to_owned()
            }
            (ReferenceFormat::Stored, None) => {
                return Err(Error::new(
                    ErrorKind::ReferenceRefused,
                    "the image does not say its format, and it is not guessed; give it with the \
                     'backing' option, or store it in the image",
                ));
            }
        };
        registry.format(&name)?;
        Ok(name)
    }

    /// Refuses a child that is another part of the same image, or an image below itself.
    fn check_file(&self, name: &str, role: Role, target: &Node) -> Result<()> {
        if role.contains(Role::PRIMARY) {
            return Ok(());
        }
        let own = self.files();
        let mut below = Vec::new();
        for (edge, _) in self.edges.iter().filter(|(edge, _)| edge.role().contains(Role::COW)) {
            walk::each_below(edge.target().strong(), &mut |node| below.extend(node.own_identity()));
        }
        let clash = walk::files_of_image(target)
            .into_iter()
            .any(|file| own.contains(&file) || below.contains(&file));
        if !clash {
            return Ok(());
        }
        let file = walk::filename(target);
        let error = Error::new(
            ErrorKind::InvalidImage,
            format!("'{name}' is a file that the same chain of images already uses"),
        );
        Err(match file {
            Some(file) => error.file(file),
            None => error,
        })
    }

    fn attach(
        &mut self,
        name: &'static str,
        role: Role,
        target: Strong<Node>,
        is_inline: bool,
    ) -> Result<Child> {
        let gives_in = self.flags.auto_read_only && !target.could_write();
        let is_writable = !self.flags.read_only && !gives_in;
        let force_share = self.flags.force_share;
        // The node has no users yet; it may need its child for itself while it opens.
        let node_use = NodeUse { above: Access::NONE, is_writable, is_active: true, force_share };
        let access = Access::of_child(role, &node_use);
        let holds_bytes = !role.contains(Role::COW);
        if is_writable && holds_bytes && !target.could_write() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!(
                    "'{name}' is node '{}', which is read-only; open this node read-only too",
                    target.name()
                ),
            ));
        }
        let parts = EdgeParts {
            name,
            role,
            access,
            holder: Holder::new(HolderKind::Edge, format!("{}.{name}", self.node_name)),
            since: self.call.since,
            is_fixed: false,
            keep_alive: None,
            backend_in_flight: None,
        };
        let core = &self.call.graph.0.core;
        let edge = Edge::new(parts, Some(Strong::clone(&target)), &core.topology.stale_perms);
        let lock = core.lock();
        let mut stage = Stage::new(&core.arena);
        stage.attach(None, &edge, &target)?;
        let accesses = perm::compute(&stage, stage.starts(), Strictness::Checked)?;
        perm::apply(&lock, accesses);
        lock.attach(&target, &edge);
        drop(lock);
        let port = (core.make_port)(Arc::clone(&edge));
        self.edges.push((edge, is_inline));
        Ok(Child::new(name, port))
    }
}

impl ChildOpener for Opener {
    fn open_child<'a>(&'a mut self, request: ChildRequest) -> BoxFuture<'a, Result<Option<Child>>> {
        Box::pin(self.open(request))
    }
}

/// The usual reason why a data file is not found.
fn beside_only(error: Error) -> Error {
    error.context(
        "its name counts from the working directory, as in QEMU, and there is one beside the image only: change to \
         that directory, or name it with the 'data-file' option",
    )
}

fn refused(kind: ReferenceKind, why: &str) -> Error {
    let option = match kind {
        ReferenceKind::Backing => "backing",
        ReferenceKind::DataFile => "data-file",
    };
    Error::new(
        ErrorKind::ReferenceRefused,
        format!("{why}; name it with the '{option}' option, or open with a gate that allows it"),
    )
}

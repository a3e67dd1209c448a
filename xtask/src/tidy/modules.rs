//! Resolves Rust paths to the files that define what they name, for the modules of one crate.
//!
//! Knows `mod` (inline, in a file, with `#[path]`), `use` (nested, renamed, re-exported, glob),
//! `crate`, `self` and `super`. Expands no macro: a name that only a macro makes counts for the
//! file in which it would be looked up. Leaves test code out.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use syn::{Item, UseTree, Visibility};

use super::source::is_test_only;

/// Files by name, with their text.
pub(super) type Texts = BTreeMap<String, String>;

/// What a name stands for in a module.
#[derive(Clone, Debug)]
enum Definition {
    Item,
    Module(usize),
    /// `use` of this path, as it is written.
    Import(Vec<String>),
}

/// One module: a file or a block in one.
#[derive(Debug)]
pub(super) struct Module {
    parent: Option<usize>,
    /// Index into [`Modules::files`].
    pub(super) file: usize,
    /// `lib.rs`, `main.rs` or `mod.rs`: names its children, so re-exports there are no imports.
    pub(super) is_folder: bool,
    names: BTreeMap<String, Vec<Definition>>,
    globs: Vec<Vec<String>>,
}

/// The modules of one crate, the root first.
#[derive(Default)]
pub(super) struct Modules {
    pub(super) modules: Vec<Module>,
    /// Names and syntax trees of the files, each with the module it is.
    pub(super) files: Vec<(String, Rc<syn::File>, usize)>,
}

/// Where a path leads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) file: usize,
    /// Set if the path names a module.
    pub(super) module: Option<usize>,
}

/// One name that a `use` brings in.
pub(super) struct Leaf {
    pub(super) path: Vec<String>,
    /// `None` for `*`.
    pub(super) name: Option<String>,
}

impl Modules {
    /// Reads the crate whose root is the file `root`.
    pub(super) fn read(root: &str, texts: &Texts) -> Result<Self, String> {
        let mut this = Self::default();
        this.add_file(None, root, texts)?;
        Ok(this)
    }

    fn add_file(
        &mut self,
        parent: Option<usize>,
        name: &str,
        texts: &Texts,
    ) -> Result<usize, String> {
        let text = texts
            .get(name)
            .ok_or_else(|| format!("{name}: a `mod` names it, but it is missing"))?;
        let tree = Rc::new(syn::parse_file(text).map_err(|e| format!("{name}: {e}"))?);
        let file = self.files.len();
        self.files.push((name.to_owned(), Rc::clone(&tree), self.modules.len()));
        let (folder, base) = name.rsplit_once('/').unwrap_or(("", name));
        let is_folder = ["lib.rs", "main.rs", "mod.rs"].contains(&base);
        let children = match is_folder {
            true => folder.to_owned(),
            false => format!("{folder}/{}", base.trim_end_matches(".rs")),
        };
        self.add_module(parent, file, is_folder, &tree.items, &children, texts)
    }

    fn add_module(
        &mut self,
        parent: Option<usize>,
        file: usize,
        is_folder: bool,
        items: &[Item],
        folder: &str,
        texts: &Texts,
    ) -> Result<usize, String> {
        let module = self.modules.len();
        let (names, globs) = (BTreeMap::new(), Vec::new());
        self.modules.push(Module { parent, file, is_folder, names, globs });
        for item in items {
            if is_test_only(quote::ToTokens::to_token_stream(item)) {
                continue;
            }
            match item {
                Item::Mod(child) => {
                    let name = child.ident.to_string();
                    let index = match &child.content {
                        Some((_, items)) => {
                            let folder = format!("{folder}/{name}");
                            self.add_module(Some(module), file, false, items, &folder, texts)?
                        }
                        None => {
                            let path = self.file_of(child, file, folder, texts);
                            self.add_file(Some(module), &path, texts)?
                        }
                    };
                    self.define(module, name, Definition::Module(index));
                }
                Item::Use(item) if item.leading_colon.is_none() => {
                    for leaf in leaves(&item.tree) {
                        match leaf.name {
                            Some(name) => self.define(module, name, Definition::Import(leaf.path)),
                            None => self.modules[module].globs.push(leaf.path),
                        }
                    }
                }
                _ => {
                    if let Some(name) = name_of(item) {
                        self.define(module, name, Definition::Item);
                    }
                }
            }
        }
        Ok(module)
    }

    fn file_of(&self, child: &syn::ItemMod, parent: usize, folder: &str, texts: &Texts) -> String {
        let path = child.attrs.iter().find_map(|attribute| match &attribute.meta {
            syn::Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
                syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
                _ => None,
            },
            _ => None,
        });
        if let Some(path) = path {
            let beside = self.files[parent].0.rsplit_once('/').map_or("", |(folder, _)| folder);
            return format!("{beside}/{path}");
        }
        let flat = format!("{folder}/{}.rs", child.ident);
        if texts.contains_key(&flat) { flat } else { format!("{folder}/{}/mod.rs", child.ident) }
    }

    fn define(&mut self, module: usize, name: String, definition: Definition) {
        self.modules[module].names.entry(name).or_default().push(definition);
    }

    /// The module of this name inside `module`, if it is one of its own.
    pub(super) fn child(&self, module: usize, name: &str) -> Option<usize> {
        self.modules[module].names.get(name)?.iter().find_map(|definition| match definition {
            Definition::Module(index) => Some(*index),
            _ => None,
        })
    }

    /// Follows a path that stands in `module`. `None` if it leads out of the crate or to nothing
    /// known.
    pub(super) fn resolve(&self, module: usize, path: &[String]) -> Option<Found> {
        self.resolve_within(module, path, 0)
    }

    fn resolve_within(&self, from: usize, path: &[String], depth: usize) -> Option<Found> {
        if depth > 32 {
            return None; // imports that name each other
        }
        let (mut module, mut at) = (from, 0);
        while let Some(word) = path.get(at) {
            module = match word.as_str() {
                "crate" => 0,
                "self" => module,
                "super" => self.modules[module].parent?,
                _ => break,
            };
            at += 1;
        }
        while let Some(name) = path.get(at) {
            let is_last = at + 1 == path.len();
            match self.name(module, name, is_last, depth) {
                Some(Found { module: Some(next), .. }) => module = next,
                Some(item) => return Some(item),
                // A name that a macro makes, or one from outside.
                None if at > 0 => {
                    return Some(Found { file: self.modules[module].file, module: None });
                }
                None => return None,
            }
            at += 1;
        }
        Some(Found { file: self.modules[module].file, module: Some(module) })
    }

    /// What `name` stands for in `module`: at the end of a path rather an item, before it rather a
    /// module.
    fn name(&self, module: usize, name: &str, is_last: bool, depth: usize) -> Option<Found> {
        let scope = &self.modules[module];
        let mut found: Vec<Found> = Vec::new();
        for definition in scope.names.get(name).into_iter().flatten() {
            found.extend(match definition {
                Definition::Item => Some(Found { file: scope.file, module: None }),
                Definition::Module(index) => {
                    Some(Found { file: self.modules[*index].file, module: Some(*index) })
                }
                Definition::Import(path) => self.resolve_within(module, path, depth + 1),
            });
        }
        if found.is_empty() {
            for glob in &scope.globs {
                let target = self.resolve_within(module, glob, depth + 1).and_then(|f| f.module);
                if let Some(target) = target.filter(|target| *target != module) {
                    found.extend(self.name(target, name, is_last, depth + 1));
                }
            }
        }
        let wanted = found.iter().find(|found| found.module.is_none() == is_last);
        wanted.or(found.first()).copied()
    }
}

/// All names that a `use` brings in, with their paths.
pub(super) fn leaves(tree: &UseTree) -> Vec<Leaf> {
    fn collect(tree: &UseTree, before: &[String], found: &mut Vec<Leaf>) {
        let joined = |name: &syn::Ident| {
            let mut path = before.to_vec();
            if name != "self" || before.is_empty() {
                path.push(name.to_string());
            }
            path
        };
        match tree {
            UseTree::Path(path) => collect(&path.tree, &joined(&path.ident), found),
            UseTree::Name(name) => {
                let path = joined(&name.ident);
                found.push(Leaf { name: path.last().cloned(), path });
            }
            UseTree::Rename(name) => {
                found.push(Leaf { path: joined(&name.ident), name: Some(name.rename.to_string()) });
            }
            UseTree::Glob(_) => found.push(Leaf { path: before.to_vec(), name: None }),
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| collect(tree, before, found));
            }
        }
    }
    let mut found = Vec::new();
    collect(tree, &[], &mut found);
    found
}

/// Does this `use` also offer its names to others?
pub(super) fn is_reexport(item: &syn::ItemUse) -> bool {
    !matches!(item.vis, Visibility::Inherited)
}

fn name_of(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::TraitAlias(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}

/// Circles of a graph: the strongly connected sets of more than one node, the largest first.
pub(super) fn circles(nodes: usize, edges: &BTreeSet<(usize, usize)>) -> Vec<Vec<usize>> {
    let reach: Vec<BTreeSet<usize>> = (0..nodes)
        .map(|start| {
            let (mut seen, mut todo) = (BTreeSet::new(), vec![start]);
            while let Some(node) = todo.pop() {
                for (_, to) in edges.range((node, 0)..=(node, usize::MAX)) {
                    if seen.insert(*to) {
                        todo.push(*to);
                    }
                }
            }
            seen
        })
        .collect();
    let mut found = Vec::new();
    let mut taken: BTreeSet<usize> = BTreeSet::new();
    for node in 0..nodes {
        if taken.contains(&node) {
            continue;
        }
        let circle: Vec<usize> = (node..nodes)
            .filter(|other| {
                *other == node || (reach[node].contains(other) && reach[*other].contains(&node))
            })
            .collect();
        taken.extend(&circle);
        if circle.len() > 1 {
            found.push(circle);
        }
    }
    found.sort_by_key(|circle| std::cmp::Reverse(circle.len()));
    found
}

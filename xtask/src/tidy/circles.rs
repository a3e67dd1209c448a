//! Finds circles of imports between the files of a crate and compares the largest with the ratchet.
//!
//! File `a` imports file `b` if a `use` or a path in `a` names what `b` defines. An import through
//! a folder's `mod.rs` counts for the file behind the re-export; the re-exports themselves and `mod
//! x;` are no imports. A type that a file names only to write an `impl` block for it is none
//! either. Test code is left out.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::visit::{self, Visit};

use super::modules::{Found, Modules, Texts, circles, is_reexport, leaves};
use super::source::is_test_only;

/// The largest circle of a crate or of a folder in it.
#[derive(Debug, Default)]
pub(super) struct Circle {
    /// Each file with what it imports from the others.
    files: Vec<(String, Vec<String>)>,
}

impl Circle {
    /// How many files it has; 0 if there is no circle.
    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    /// A line for each file: its name and what it imports from the others.
    pub(super) fn lines(&self) -> impl Iterator<Item = String> {
        self.files.iter().map(|(file, imports)| format!("    {file} -> {}", imports.join(", ")))
    }
}

/// Imports between the files of one crate.
#[derive(Debug)]
pub(super) struct Imports {
    files: Vec<String>,
    edges: BTreeSet<(usize, usize)>,
}

impl Imports {
    /// Reads the crate whose root is the file `root`.
    pub(super) fn read(root: &str, texts: &Texts) -> Result<Self, String> {
        let modules = Modules::read(root, texts)?;
        let mut edges = BTreeSet::new();
        for (file, (_, tree, module)) in modules.files.iter().enumerate() {
            let (methods_of, used) = names(tree);
            let only_methods = methods_of.difference(&used).cloned().collect();
            let (modules, module) = (&modules, *module);
            let mut finder = Finder { modules, module, file, only_methods, edges: &mut edges };
            finder.visit_file(tree);
        }
        Ok(Self { files: modules.files.into_iter().map(|(name, ..)| name).collect(), edges })
    }

    /// The largest circle among the files below `folder`.
    pub(super) fn largest_circle(&self, folder: &str) -> Circle {
        let is_inside = |file: usize| self.files[file].starts_with(folder);
        let edges = self.edges.iter().copied();
        let edges = edges.filter(|(from, to)| is_inside(*from) && is_inside(*to)).collect();
        let Some(circle) = circles(self.files.len(), &edges).into_iter().next() else {
            return Circle::default();
        };
        let imports = |file: usize| {
            let others = circle.iter().filter(|to| edges.contains(&(file, **to)));
            others.map(|to| self.files[*to].trim_start_matches(folder).to_owned()).collect()
        };
        Circle {
            files: circle.iter().map(|file| (self.files[*file].clone(), imports(*file))).collect(),
        }
    }
}

/// Names that `impl` blocks without a trait are written for, and all names that are used otherwise.
fn names(tree: &syn::File) -> (BTreeSet<String>, BTreeSet<String>) {
    struct Names(BTreeMap<String, usize>, BTreeMap<String, usize>);
    impl Names {
        fn tokens(&mut self, tokens: TokenStream) {
            for token in tokens {
                match token {
                    TokenTree::Ident(name) => *self.1.entry(name.to_string()).or_default() += 1,
                    TokenTree::Group(group) => self.tokens(group.stream()),
                    _ => {}
                }
            }
        }
    }
    impl<'ast> Visit<'ast> for Names {
        fn visit_item_use(&mut self, _: &'ast syn::ItemUse) {}
        fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
            if item.trait_.is_none()
                && let syn::Type::Path(path) = &*item.self_ty
                && let Some(name) = path.path.get_ident()
            {
                *self.0.entry(name.to_string()).or_default() += 1;
            }
            visit::visit_item_impl(self, item);
        }
        fn visit_path(&mut self, path: &'ast syn::Path) {
            let first = path.segments.first().map(|segment| segment.ident.to_string());
            *self.1.entry(first.unwrap_or_default()).or_default() += 1;
            visit::visit_path(self, path);
        }
        fn visit_macro(&mut self, call: &'ast syn::Macro) {
            self.tokens(call.tokens.clone());
            visit::visit_macro(self, call);
        }
        fn visit_item(&mut self, item: &'ast syn::Item) {
            if !is_test_only(item.to_token_stream()) {
                visit::visit_item(self, item);
            }
        }
    }
    let mut names = Names(BTreeMap::new(), BTreeMap::new());
    names.visit_file(tree);
    let Names(methods_of, used) = names;
    // The path after `impl` was counted as a use as well.
    let used = used.into_iter().filter(|(name, count)| methods_of.get(name).unwrap_or(&0) < count);
    let used = used.map(|(name, _)| name).collect();
    (methods_of.into_keys().collect(), used)
}

/// Collects the imports of one file.
struct Finder<'a> {
    modules: &'a Modules,
    module: usize,
    file: usize,
    /// Types that are named here only to write `impl` blocks for them.
    only_methods: BTreeSet<String>,
    edges: &'a mut BTreeSet<(usize, usize)>,
}

impl Finder<'_> {
    fn import(&mut self, found: Option<Found>) {
        if let Some(found) = found.filter(|found| found.file != self.file) {
            self.edges.insert((self.file, found.file));
        }
    }

    fn path(&mut self, path: &[String]) {
        let found = self.modules.resolve(self.module, path);
        // One word that is also a module's name is a variable or the like.
        let is_item = |found: &Found| path.len() > 1 || found.module.is_none();
        let is_type_of_methods = path.first().is_some_and(|name| self.only_methods.contains(name));
        if !is_type_of_methods {
            self.import(found.filter(is_item));
        }
    }

    /// Paths among the tokens that a macro is given.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) => {
                    if colons != 2 {
                        self.path(&std::mem::take(&mut path));
                    }
                    path.push(name.to_string());
                    colons = 0;
                }
                TokenTree::Punct(mark) if mark.as_char() == ':' => colons += 1,
                other => {
                    self.path(&std::mem::take(&mut path));
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.tokens(group.stream());
                    }
                }
            }
        }
        self.path(&path);
    }

    fn enter<T: ToTokens>(&mut self, node: &T, into: impl FnOnce(&mut Self)) {
        if !is_test_only(node.to_token_stream()) {
            into(self);
        }
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        self.enter(item, |this| visit::visit_item(this, item));
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        self.enter(item, |this| visit::visit_impl_item(this, item));
    }

    fn visit_stmt(&mut self, statement: &'ast syn::Stmt) {
        self.enter(statement, |this| visit::visit_stmt(this, statement));
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let outer = self.module;
        let inner =
            item.content.is_some().then(|| self.modules.child(outer, &item.ident.to_string()));
        if let Some(inner) = inner.flatten() {
            self.module = inner;
            visit::visit_item_mod(self, item);
            self.module = outer;
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let is_folder = self.modules.modules[self.module].is_folder;
        if item.leading_colon.is_some() || (is_folder && is_reexport(item)) {
            return;
        }
        for leaf in leaves(&item.tree) {
            if leaf.name.as_ref().is_some_and(|name| self.only_methods.contains(name)) {
                continue;
            }
            // A folder that is imported as a whole: the paths that begin with its name say what of
            // it is used.
            let is_whole_folder = |found: &Found| {
                leaf.name.is_some()
                    && found.module.is_some_and(|module| self.modules.modules[module].is_folder)
            };
            let found = self.modules.resolve(self.module, &leaf.path);
            let found = found.filter(|found| !is_whole_folder(found));
            self.import(found);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let words: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
            self.path(&words);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}

    /// `pub(in crate::a)` imports nothing.
    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn imports(files: &[(&str, &str)]) -> Vec<String> {
        let texts =
            files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        let imports = Imports::read("src/lib.rs", &texts).expect("it is Rust");
        let name = |file: usize| imports.files[file].trim_start_matches("src/").to_owned();
        imports.edges.iter().map(|(from, to)| format!("{} -> {}", name(*from), name(*to))).collect()
    }

    #[test]
    fn uses_and_paths_are_imports() {
        for text in [
            "use crate::b::B;",
            "use super::b::{B as C};",
            "use crate::{b::{self}};",
            "use super::b::*;",
            "fn f() { super::b::g() }",
            "type T = Vec<crate::b::B>;",
            "fn f() { m!(x, crate::b::B::new()) }",
            "fn f() { use crate::b::B; }",
            "mod inner { use super::super::b::B; }",
            "impl crate::b::Trait for T {}",
        ] {
            let files = [
                ("src/lib.rs", "mod a; mod b;"),
                ("src/a.rs", text),
                ("src/b.rs", "pub struct B;"),
            ];
            assert_eq!(imports(&files), ["a.rs -> b.rs"], "{text}");
        }
    }

    #[test]
    fn what_is_no_import() {
        for text in [
            "pub(in crate::b) fn f() {}",
            "#[cfg(test)] mod tests { use crate::b::B; }",
            "#[cfg(test)] use crate::b::B;",
            "use std::b::B;",
            "use b::B;",
            "// crate::b::B",
            "use crate::b::B; impl B { fn more(&self) {} }",
            "#[doc = \"crate::b\"] fn f() { let b = 1; g(b); m!(b); }",
        ] {
            let files = [
                ("src/lib.rs", "mod a; mod b;"),
                ("src/a.rs", text),
                ("src/b.rs", "pub struct B;"),
            ];
            assert!(imports(&files).is_empty(), "{text}: {:?}", imports(&files));
        }
    }

    #[test]
    fn an_import_through_a_folder_counts_for_the_file_behind_it() {
        for text in
            ["use crate::f::B;", "use crate::f; fn g(_: f::B) {}", "use crate::f::{self, b::B};"]
        {
            let files = [
                ("src/lib.rs", "mod a; pub mod f;"),
                ("src/a.rs", text),
                ("src/f/mod.rs", "mod b; pub use self::b::B; pub struct Own;"),
                ("src/f/b.rs", "pub struct B;"),
            ];
            assert_eq!(imports(&files), ["a.rs -> f/b.rs"], "{text}");
        }
        let own = [
            ("src/lib.rs", "mod f;"),
            ("src/f/mod.rs", "mod b; pub use self::b::B; pub struct Own(B);"),
            ("src/f/b.rs", "use super::Own; pub struct B(Box<Own>);"),
        ];
        assert_eq!(imports(&own), ["f/mod.rs -> f/b.rs", "f/b.rs -> f/mod.rs"]);
    }

    #[test]
    fn the_largest_circle_is_found_in_the_crate_and_in_a_folder() {
        let files = [
            ("src/lib.rs", "mod a; mod f;"),
            ("src/a.rs", "use crate::f::b::B; pub struct A;"),
            ("src/f/mod.rs", "pub mod b; pub mod c; pub mod d;"),
            ("src/f/b.rs", "use super::c::C; pub struct B;"),
            ("src/f/c.rs", "use crate::a::A; use super::b::B; pub struct C;"),
            ("src/f/d.rs", "use super::b::B;"),
        ];
        let texts =
            files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        let imports = Imports::read("src/lib.rs", &texts).unwrap();
        assert_eq!(imports.largest_circle("src/").len(), 3);
        let inner: Vec<String> = imports.largest_circle("src/f/").lines().collect();
        assert_eq!(inner, ["    src/f/b.rs -> c.rs", "    src/f/c.rs -> b.rs"]);
        assert_eq!(imports.largest_circle("src/none/").len(), 0);
    }
}

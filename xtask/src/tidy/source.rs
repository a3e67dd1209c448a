//! Parses one Rust file and returns what the rules need: functions and their lengths, lines of test
//! code, uses of `unsafe`, identifiers.
//!
//! Functions and test code are read from the syntax tree, whatever stands before `fn` and wherever
//! in the file it lies. `unsafe` is looked for among the tokens, so that macros are searched and
//! strings and comments are not. Does not look into other files: `mod x;` below `#[cfg(test)]` is
//! one line of test code here.

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};
use syn::parse::{ParseStream, Parser};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, Block, Meta, Signature};

/// A file as far as the rules look at it.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// All functions with a body that are not test code, in the order of their beginnings: name and
    /// lines.
    pub(super) functions: Vec<(String, usize)>,
    /// How many lines belong to items that are only compiled for tests.
    pub(super) test_lines: usize,
    /// Lines with the keyword `unsafe`.
    pub(super) unsafe_lines: Vec<usize>,
}

impl Source {
    /// Reads a file's text.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let located = |error: syn::Error| {
            let at = error.span().start();
            format!("{}:{}: {error}", at.line, at.column + 1)
        };
        let mut found = Self::default();
        found.visit_file(&syn::parse_file(text).map_err(located)?);
        let tokens: TokenStream = text.parse().map_err(|error| located(syn::Error::from(error)))?;
        found.find_unsafe(tokens);
        found.unsafe_lines.dedup();
        Ok(found)
    }

    fn find_unsafe(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Ident(word) if word == "unsafe" => {
                    self.unsafe_lines.push(word.span().start().line);
                }
                TokenTree::Group(group) => self.find_unsafe(group.stream()),
                _ => {}
            }
        }
    }

    fn function(&mut self, signature: &Signature, body: &Block) {
        let from = signature.fn_token.span().start().line;
        let to = body.brace_token.span.close().end().line;
        self.functions.push((signature.ident.to_string(), to + 1 - from));
    }

    /// Goes on into `node`, unless it is only compiled for tests.
    fn enter<T: Spanned + quote::ToTokens>(&mut self, node: &T, into: impl FnOnce(&mut Self)) {
        if is_test_only(node.to_token_stream()) {
            let span = node.span();
            self.test_lines += span.end().line + 1 - span.start().line;
        } else {
            into(self);
        }
    }

    /// Functions that a macro is given or makes: `fn name`, and the first braces behind it.
    fn find_functions(&mut self, tokens: TokenStream) {
        let mut begun: Option<(usize, Option<String>)> = None;
        for token in tokens {
            match token {
                TokenTree::Ident(word) if word == "fn" => {
                    begun = Some((word.span().start().line, None));
                }
                TokenTree::Ident(word) => {
                    if let Some((_, name @ None)) = &mut begun {
                        *name = Some(word.to_string());
                    }
                }
                // A declaration ends here, and so does a type `fn(…)`.
                TokenTree::Punct(mark) if matches!(mark.as_char(), ';' | ',' | '=') => {
                    let is_alone = mark.spacing() == Spacing::Alone;
                    begun = begun.filter(|(_, name)| name.is_some() && !is_alone);
                }
                TokenTree::Group(group) => {
                    if group.delimiter() == Delimiter::Brace
                        && let Some((from, Some(name))) = begun.take()
                    {
                        self.functions.push((name, group.span_close().end().line + 1 - from));
                    }
                    self.find_functions(group.stream());
                }
                _ => {}
            }
        }
    }
}

/// All identifiers among the tokens of a file, with their lines. None if it is no Rust.
pub(super) fn identifiers(text: &str) -> Vec<(usize, String)> {
    fn collect(tokens: TokenStream, found: &mut Vec<(usize, String)>) {
        for token in tokens {
            match token {
                TokenTree::Ident(name) => {
                    found.push((name.span().start().line, name.to_string()));
                }
                TokenTree::Group(group) => collect(group.stream(), found),
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    collect(text.parse().unwrap_or_default(), &mut found);
    found
}

impl<'ast> Visit<'ast> for Source {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        self.enter(item, |this| visit::visit_item(this, item));
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        self.enter(item, |this| visit::visit_impl_item(this, item));
    }

    fn visit_trait_item(&mut self, item: &'ast syn::TraitItem) {
        self.enter(item, |this| visit::visit_trait_item(this, item));
    }

    fn visit_stmt(&mut self, statement: &'ast syn::Stmt) {
        self.enter(statement, |this| visit::visit_stmt(this, statement));
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.function(&item.sig, body);
        }
        visit::visit_trait_item_fn(self, item);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.find_functions(call.tokens.clone());
    }
}

/// Do the attributes in front of a piece of code say that only tests compile it?
pub(super) fn is_test_only(tokens: TokenStream) -> bool {
    let attributes = |input: ParseStream<'_>| {
        let attributes = input.call(Attribute::parse_outer)?;
        input.parse::<TokenStream>()?; // the rest, which the parser must not leave
        Ok(attributes)
    };
    let attributes = attributes.parse2(tokens).unwrap_or_default();
    let cfg = attributes.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    cfg.filter_map(|attribute| attribute.parse_args::<Meta>().ok()).any(|meta| needs_test(&meta))
}

/// Can this condition hold for tests only?
fn needs_test(condition: &Meta) -> bool {
    let Meta::List(list) = condition else { return condition.path().is_ident("test") };
    let parts =
        list.parse_args_with(syn::punctuated::Punctuated::<Meta, syn::Token![,]>::parse_terminated);
    let parts = parts.unwrap_or_default();
    let mut needs = parts.iter().map(needs_test);
    match list.path.get_ident().map(ToString::to_string).as_deref() {
        Some("all") => needs.any(|needs| needs),
        Some("any") => !parts.is_empty() && needs.all(|needs| needs),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn functions(text: &str) -> Vec<(String, usize)> {
        Source::parse(text).expect("it is Rust").functions
    }

    #[test]
    fn every_way_to_begin_a_function_is_known() {
        for before in [
            "",
            "pub ",
            "pub(crate) ",
            "pub(super) ",
            "pub(in crate::tidy) ",
            "const ",
            "pub(super) const ",
            "async ",
            "pub(super) async ",
            "unsafe ",
            "pub(in crate::tidy) const unsafe ",
            "extern \"C\" ",
            "pub unsafe extern \"C\" ",
            "#[inline] #[must_use] pub ",
        ] {
            let text =
                format!("{before}fn name<T>(_: T)\nwhere\n    T: Copy,\n{{\n    go();\n}}\n");
            assert_eq!(functions(&text), [("name".to_owned(), 6)], "{before}fn");
            let text = format!("impl X {{\n    {before}fn name() {{\n    }}\n}}\n");
            assert_eq!(functions(&text), [("name".to_owned(), 2)], "{before}fn in an impl");
        }
    }

    #[test]
    fn functions_are_found_where_they_lie() {
        let text = "trait T {\n    fn none();\n    fn some() {\n        fn inner() {}\n    }\n}\n\
                    mod m {\n    fn deep() {\n    }\n}\n";
        let found = functions(text);
        let found: Vec<(&str, usize)> = found.iter().map(|(name, n)| (&**name, *n)).collect();
        assert_eq!(found, [("some", 3), ("inner", 1), ("deep", 2)]);
    }

    #[test]
    fn functions_in_macros_are_measured() {
        let text = "macro_rules! make {\n    ($t:ty) => {\n        impl $t {\n            pub(super) const fn made(&self) -> u8 {\n                \
                    let f: fn(u8) = g;\n                0\n            }\n        }\n    };\n}\nproptest! {\n    #[test]\n    fn holds(n in 0..9) {\n    }\n}\n";
        assert_eq!(functions(text), [("made".to_owned(), 4), ("holds".to_owned(), 2)]);
    }

    #[test]
    fn what_only_tests_compile_is_left_out_and_nothing_behind_it() {
        let text = "#[cfg(test)]\nuse a::b;\nfn first() {}\n#[cfg(all(test, unix))]\nfn second() {\n}\nstruct S;\nimpl S {\n    #[cfg(test)]\n    fn third() {}\n    \
                    fn fourth() {}\n}\nfn fifth() {\n    #[cfg(test)]\n    fn sixth() {}\n}\n#[cfg(test)]\nmod tests {\n    fn seventh() {}\n}\nfn eighth() {}\n";
        let source = Source::parse(text).unwrap();
        let names: Vec<&str> = source.functions.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["first", "fourth", "fifth", "eighth"]);
        assert_eq!(source.test_lines, 2 + 3 + 2 + 2 + 4);
    }

    #[test]
    fn conditions_that_also_hold_without_tests_are_no_test_code() {
        for condition in ["not(test)", "any(test, unix)", "any()", "unix", "feature = \"test\""] {
            let text = format!("#[cfg({condition})]\nfn f() {{}}\n");
            assert_eq!(functions(&text).len(), 1, "{condition}");
        }
        for condition in ["test", "all(unix, test)", "any(test, all(test, unix))"] {
            let text = format!("#[cfg({condition})]\nfn f() {{}}\n");
            assert!(functions(&text).is_empty(), "{condition}");
        }
    }

    #[test]
    fn unsafe_is_a_keyword_and_not_a_word() {
        let lines = |text: &str| Source::parse(text).expect("it is Rust").unsafe_lines;
        for text in [
            "// unsafe\nfn f() {}\n",
            "/* unsafe */\n",
            "/// unsafe\nfn f() {}\n",
            "const A: &str = \"unsafe\";\n",
            "const A: &str = r#\"\nunsafe { \"x\" }\n\"#;\n",
            "#![forbid(unsafe_code)]\n",
            "fn not_unsafe() {}\n",
        ] {
            assert_eq!(lines(text), [0usize; 0], "{text}");
        }
        assert_eq!(lines("fn f() {\n    g(\"quoted\", unsafe { h() }); // unsafe\n}\n"), [2]);
        assert_eq!(lines("unsafe impl Send for X {}\nunsafe trait T {}\n"), [1, 2]);
        assert_eq!(lines("unsafe fn f() {}\n\nfn g() {\n    m!(unsafe { f() });\n}\n"), [1, 4]);
        assert_eq!(
            lines("macro_rules! m {\n    () => {\n        unsafe { f() }\n    };\n}\n"),
            [3]
        );
        assert_eq!(
            lines("unsafe extern \"C\" {\n    fn f();\n}\n#[unsafe(no_mangle)]\nfn g() {}\n"),
            [1, 4]
        );
        assert_eq!(lines("#[cfg(test)]\nmod tests {\n    fn f() { unsafe { g() } }\n}\n"), [3]);
    }

    #[test]
    fn what_is_not_rust_is_named_with_its_place() {
        let error = Source::parse("fn f() {\n    let = 1;\n}\n").unwrap_err();
        assert!(error.starts_with("2:9: "), "{error}");
    }
}

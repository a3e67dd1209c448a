//! Renders a graph as SVG: boxes with a title and details, lines from each parent to its children.
//!
//! `drawing` holds the boxes and lines, `layout` places them, `svg` writes the document. Chains run
//! straight down; a child without children of its own (the file of an image) is placed to the right
//! of its parent. Long texts are shortened; the whole text is in the element's `<title>`, which
//! viewers show as a tooltip.

mod drawing;
mod layout;
mod svg;

pub(crate) use self::drawing::{Drawing, Link, Shape};

impl Drawing {
    /// Returns the drawing as an SVG document.
    pub(crate) fn svg(&self) -> String {
        svg::document(self, &layout::place(self))
    }
}

//! Writes a placed drawing as an SVG document.

use std::fmt::Write as _;

use super::drawing::{Drawing, LINE_MAX, Link, Shape, shortened};
use super::layout::{LINE_HEIGHT, Layout, PADDING, Rect, Route};

const STROKE: &str = "#555";
/// Fonts whose characters are as wide as the layout assumes.
const FONTS: &str = "DejaVu Sans Mono, Menlo, Consolas, monospace";

/// Returns the whole document.
pub(super) fn document(drawing: &Drawing, layout: &Layout) -> String {
    let Layout { width, height, .. } = layout;
    let mut out = String::new();
    let _ = writeln!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="{FONTS}" font-size="13">"#
    );
    let _ = writeln!(
        out,
        r#"<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{STROKE}"/></marker></defs>"#
    );
    let _ = writeln!(out, r#"<rect width="{width}" height="{height}" fill="white"/>"#);
    for (link, route) in drawing.links.iter().zip(&layout.routes) {
        write_link(&mut out, link, *route, layout.boxes[link.from], layout.boxes[link.to]);
    }
    for (shape, place) in drawing.shapes.iter().zip(&layout.boxes) {
        write_shape(&mut out, shape, *place);
    }
    out.push_str("</svg>\n");
    out
}

fn write_shape(out: &mut String, shape: &Shape, place: Rect) {
    let Rect { x, y, width, height } = place;
    let (fill, tooltip) = (shape.fill, escaped(&shape.tooltip));
    let _ = writeln!(out, "<g><title>{tooltip}</title>");
    let _ = writeln!(
        out,
        r#"<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{STROKE}"/>"#
    );
    let lines = std::iter::once(&shape.title).chain(&shape.details);
    for (number, line) in lines.enumerate() {
        let text_x = x + PADDING;
        let text_y = y + PADDING + number * LINE_HEIGHT + LINE_HEIGHT * 3 / 4;
        let weight = if number == 0 { r#" font-weight="bold""# } else { "" };
        let text = escaped(&shortened(line, LINE_MAX));
        let _ = writeln!(out, r#"<text x="{text_x}" y="{text_y}"{weight}>{text}</text>"#);
    }
    out.push_str("</g>\n");
}

/// Where a label stands, and which end of it.
struct Label {
    x: usize,
    y: usize,
    anchor: &'static str,
}

fn write_link(out: &mut String, link: &Link, route: Route, from: Rect, to: Rect) {
    let (path, label) = line(route, from, to);
    let (text, tooltip) = (escaped(&shortened(&link.label, LINE_MAX)), escaped(&link.tooltip));
    let Label { x, y, anchor } = label;
    let _ = writeln!(
        out,
        r#"<g><title>{tooltip}</title><path d="{path}" fill="none" stroke="{STROKE}" marker-end="url(#tip)"/>"#
    );
    let _ = writeln!(
        out,
        r#"<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{STROKE}" stroke="white" stroke-width="4" paint-order="stroke">{text}</text></g>"#
    );
}

/// Returns the path of a line and the place of its label.
fn line(route: Route, from: Rect, to: Rect) -> (String, Label) {
    match route {
        Route::Beside => {
            let (x1, x2, y2) = (from.right(), to.x, to.middle_y());
            // As level as the parent's side allows.
            let y1 = y2.clamp(from.y + PADDING, from.bottom() - PADDING);
            let bend = (x1 + x2) / 2;
            let path = format!("M{x1} {y1} C{bend} {y1} {bend} {y2} {x2} {y2}");
            // Off the curve: below its end if it comes from above.
            let y = if y1 < y2 { y2 + LINE_HEIGHT } else { y2 - 6 };
            (path, Label { x: bend, y, anchor: "middle" })
        }
        Route::Down { row } => {
            let (x1, y1, x2, y2) = (from.middle_x(), from.bottom(), to.middle_x(), to.y);
            let bend = (y1 + y2) / 2;
            let path = format!("M{x1} {y1} C{x1} {bend} {x2} {bend} {x2} {y2}");
            let label = match row {
                Some(row) => Label { x: x1 + 8, y: y1 + (row + 1) * LINE_HEIGHT, anchor: "start" },
                None => Label { x: x2 + 8, y: y2 - LINE_HEIGHT, anchor: "start" },
            };
            (path, label)
        }
        Route::Lane(x) => {
            let (x1, y1, x2, y2) = (from.x, from.middle_y(), to.x, to.middle_y());
            let path = format!(
                "M{x1} {y1} C{x} {y1} {x} {y1} {x} {} L{x} {} C{x} {y2} {x} {y2} {x2} {y2}",
                from.bottom() + PADDING,
                to.y.saturating_sub(PADDING)
            );
            (path, Label { x: x - 6, y: (y1 + y2) / 2, anchor: "end" })
        }
    }
}

/// Returns `text` as XML character data. What XML 1.0 cannot carry becomes the replacement
/// character.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push('\n'),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_in_the_document() {
        let shape = Shape {
            title: "<a & \"b\">\u{1}".into(),
            details: Vec::new(),
            tooltip: "</title>".into(),
            fill: "white",
        };
        let svg = Drawing { shapes: vec![shape], links: Vec::new() }.svg();
        assert!(svg.contains("&lt;a &amp; &quot;b&quot;&gt;\u{fffd}"), "{svg}");
        assert!(svg.contains("<title>&lt;/title&gt;</title>"), "{svg}");
    }
}

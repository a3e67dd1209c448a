//! A graph as a picture: boxes in layers from top to bottom, lines between them, as SVG.
//!
//! Layers are longest distances from a root, so every line points down. Within a layer boxes stand below the middle of
//! those that point at them, which keeps chains straight and crossings few. No library: a dozen boxes need none.

use std::fmt::Write;

const LINE_HEIGHT: usize = 18;
const CHAR_WIDTH: usize = 8;
const PADDING: usize = 12;
const GAP_ACROSS: usize = 36;
const GAP_DOWN: usize = 56;
const MARGIN: usize = 20;

/// One box: its lines, the first of them bold.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) lines: Vec<String>,
    /// Colour of the box.
    pub(crate) fill: &'static str,
}

/// One line between boxes, from user to used.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) label: String,
}

/// What is to be drawn. No cycles.
#[derive(Clone, Debug, Default)]
pub(crate) struct Picture {
    pub(crate) shapes: Vec<Shape>,
    pub(crate) links: Vec<Link>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    x: usize,
    y: usize,
    width: usize,
    height: usize,
}

impl Place {
    fn middle(self) -> usize {
        self.x + self.width / 2
    }
}

impl Picture {
    /// The picture as an SVG document.
    pub(crate) fn svg(&self) -> String {
        let places = self.places();
        let width = places.iter().map(|p| p.x + p.width).max().unwrap_or(0) + MARGIN;
        let height = places.iter().map(|p| p.y + p.height).max().unwrap_or(0) + MARGIN;
        let mut out = String::new();
        let _ = writeln!(
            out,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="monospace" font-size="13">"#
        );
        out.push_str(
            "<defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"8\" refY=\"4\" markerWidth=\"8\" markerHeight=\"8\" orient=\"auto\"><path d=\"M0 0 L8 4 L0 8 z\" fill=\"#555\"/></marker></defs>\n",
        );
        let _ = writeln!(out, r#"<rect width="{width}" height="{height}" fill="white"/>"#);
        for link in &self.links {
            draw_link(&mut out, places[link.from], places[link.to], &link.label);
        }
        for (shape, place) in self.shapes.iter().zip(&places) {
            draw_shape(&mut out, shape, *place);
        }
        out.push_str("</svg>\n");
        out
    }

    /// How deep each box stands: one below the deepest of those that point at it.
    fn layers(&self) -> Vec<usize> {
        let mut layers = vec![0; self.shapes.len()];
        // A path has fewer links than there are boxes, so this many rounds settle every layer.
        for _ in 0..self.shapes.len() {
            let mut is_settled = true;
            for link in &self.links {
                if layers[link.to] <= layers[link.from] {
                    layers[link.to] = layers[link.from] + 1;
                    is_settled = false;
                }
            }
            if is_settled {
                break;
            }
        }
        layers
    }

    fn places(&self) -> Vec<Place> {
        let layers = self.layers();
        let mut places: Vec<Place> = self.shapes.iter().map(size).collect();
        let depth = layers.iter().max().map_or(0, |deepest| deepest + 1);
        let mut y = MARGIN;
        for layer in 0..depth {
            let mut members: Vec<usize> =
                (0..layers.len()).filter(|shape| layers[*shape] == layer).collect();
            let wish = |shape: usize, places: &[Place]| self.wish(shape, places);
            members.sort_by_key(|shape| wish(*shape, &places));
            let mut free_x = MARGIN;
            for shape in &members {
                let wanted = wish(*shape, &places).saturating_sub(places[*shape].width / 2);
                places[*shape].x = wanted.max(free_x);
                places[*shape].y = y;
                free_x = places[*shape].x + places[*shape].width + GAP_ACROSS;
            }
            y += members.iter().map(|s| places[*s].height).max().unwrap_or(0) + GAP_DOWN;
        }
        places
    }

    /// Where a box would like its middle: below those that point at it.
    fn wish(&self, shape: usize, places: &[Place]) -> usize {
        let above: Vec<usize> =
            self.links.iter().filter(|l| l.to == shape).map(|l| places[l.from].middle()).collect();
        if above.is_empty() { 0 } else { above.iter().sum::<usize>() / above.len() }
    }
}

fn size(shape: &Shape) -> Place {
    let longest = shape.lines.iter().map(|line| line.chars().count()).max().unwrap_or(0);
    Place {
        width: longest * CHAR_WIDTH + 2 * PADDING,
        height: shape.lines.len() * LINE_HEIGHT + 2 * PADDING,
        ..Place::default()
    }
}

fn draw_shape(out: &mut String, shape: &Shape, place: Place) {
    let Place { x, y, width, height } = place;
    let fill = shape.fill;
    let _ = writeln!(
        out,
        r##"<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="#555"/>"##
    );
    for (number, line) in shape.lines.iter().enumerate() {
        let text_x = x + PADDING;
        let text_y = y + PADDING + number * LINE_HEIGHT + LINE_HEIGHT * 3 / 4;
        let weight = if number == 0 { r#" font-weight="bold""# } else { "" };
        let text = escape(line);
        let _ = writeln!(out, r#"<text x="{text_x}" y="{text_y}"{weight}>{text}</text>"#);
    }
}

fn draw_link(out: &mut String, from: Place, to: Place, label: &str) {
    let (x1, y1) = (from.middle(), from.y + from.height);
    let (x2, y2) = (to.middle(), to.y);
    let bend = (y1 + y2) / 2;
    let _ = writeln!(
        out,
        r##"<path d="M{x1} {y1} C{x1} {bend} {x2} {bend} {x2} {y2}" fill="none" stroke="#555" marker-end="url(#tip)"/>"##
    );
    let (text_x, text) = ((x1 + x2) / 2 + 6, escape(label));
    let _ = writeln!(out, r##"<text x="{text_x}" y="{bend}" fill="#555">{text}</text>"##);
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML 1.0 cannot carry these at all.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(count: usize, links: &[(usize, usize)]) -> Picture {
        let shape = |n| Shape { lines: vec![format!("node{n}")], fill: "white" };
        Picture {
            shapes: (0..count).map(shape).collect(),
            links: links
                .iter()
                .map(|(from, to)| Link { from: *from, to: *to, label: String::new() })
                .collect(),
        }
    }

    #[test]
    fn every_line_points_down() {
        // A diamond with a shortcut: 0 → 1 → 2 → 3 and 0 → 3.
        let layers = picture(4, &[(0, 3), (2, 3), (1, 2), (0, 1)]).layers();
        assert_eq!(layers, [0, 1, 2, 3]);
    }

    #[test]
    fn boxes_do_not_overlap() {
        let places = picture(5, &[(0, 1), (0, 2), (0, 3), (3, 4)]).places();
        for (i, a) in places.iter().enumerate() {
            for b in &places[i + 1..] {
                let apart_x = a.x + a.width <= b.x || b.x + b.width <= a.x;
                let apart_y = a.y + a.height <= b.y || b.y + b.height <= a.y;
                assert!(apart_x || apart_y, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn names_cannot_break_the_document() {
        let mut drawn = picture(1, &[]);
        drawn.shapes[0].lines = vec!["<a & \"b\">\u{1}".to_owned()];
        let svg = drawn.svg();
        assert!(svg.contains("&lt;a &amp; &quot;b&quot;&gt;\u{fffd}"), "{svg}");
    }
}

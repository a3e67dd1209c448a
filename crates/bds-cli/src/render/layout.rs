//! Computes where the boxes and lines of a drawing go, in pixels; arithmetic only.
//!
//! ```text
//!   ┌─ throttle ─┐
//!         │ file
//!   ┌─ top.qcow2 ┐ ─file─ ┌ top.qcow2 ┐    a cell: a box, and beside it its childless children
//!         │ backing
//!   ┌─ base.raw ─┐ ─file─ ┌ base.raw ─┐
//! ```
//!
//! Cells stand in layers by their longest distance from a root, so every line of a chain points
//! down. All boxes are equally wide, which keeps chains vertical. A line that skips a layer runs in
//! a lane left of all cells.

use super::drawing::{Drawing, LINE_MAX, Shape, shortened};

pub(super) const CHAR_WIDTH: usize = 8;
pub(super) const LINE_HEIGHT: usize = 18;
pub(super) const PADDING: usize = 12;
const MARGIN: usize = 20;
const GAP_ACROSS: usize = 40;
const GAP_DOWN: usize = 52;
const GAP_STACKED: usize = 14;
const LANE_WIDTH: usize = 16;
/// Space for the ends of a line beside its label.
const LINE_ENDS: usize = 32;

/// One box's place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rect {
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) width: usize,
    pub(super) height: usize,
}

impl Rect {
    pub(super) fn middle_x(self) -> usize {
        self.x + self.width / 2
    }

    pub(super) fn middle_y(self) -> usize {
        self.y + self.height / 2
    }

    pub(super) fn right(self) -> usize {
        self.x + self.width
    }

    pub(super) fn bottom(self) -> usize {
        self.y + self.height
    }
}

/// How a line runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// From the parent's right side to the child beside it.
    Beside,
    /// From the parent's bottom to the top of a child one layer below. `row`: which of the labels
    /// at the parent's bottom this one is; `None`: the label stands at the child, which no other
    /// line reaches from above.
    Down { row: Option<usize> },
    /// Past a layer, at this x coordinate.
    Lane(usize),
}

/// Where everything goes.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// One a box.
    pub(super) boxes: Vec<Rect>,
    /// One a line.
    pub(super) routes: Vec<Route>,
    pub(super) width: usize,
    pub(super) height: usize,
}

/// Places a drawing.
pub(super) fn place(drawing: &Drawing) -> Layout {
    let cells = Cells::new(drawing);
    let layers = layers(drawing, &cells);
    let mut routes = routes(drawing, &cells, &layers);
    let left = leave_lanes(drawing, &mut routes);
    let boxes = cells.boxes(drawing, &layers, &routes, left);
    let width = boxes.iter().map(|b| b.right()).max().unwrap_or(0) + MARGIN;
    let height = boxes.iter().map(|b| b.bottom()).max().unwrap_or(0) + MARGIN;
    Layout { boxes, routes, width, height }
}

/// Which boxes stand beside which.
struct Cells {
    /// The parent a box stands beside; `None`: it has a cell of its own.
    beside: Vec<Option<usize>>,
    box_width: usize,
    /// Between a box and those beside it: space for the longest label.
    gap: usize,
}

impl Cells {
    fn new(drawing: &Drawing) -> Self {
        let beside = (0..drawing.shapes.len()).map(|shape| parent_beside(drawing, shape)).collect();
        let texts = |shape: &Shape| {
            std::iter::once(&shape.title).chain(&shape.details).map(|t| chars(t)).max()
        };
        let longest = drawing.shapes.iter().filter_map(texts).max().unwrap_or(0);
        let labels = drawing.links.iter().map(|link| chars(&link.label)).max().unwrap_or(0);
        Self {
            beside,
            box_width: longest * CHAR_WIDTH + 2 * PADDING,
            gap: labels * CHAR_WIDTH + LINE_ENDS,
        }
    }

    /// Boxes beside `shape`, in the order of the links.
    fn stacked(&self, drawing: &Drawing, shape: usize) -> Vec<usize> {
        let is_here = |to: &usize| self.beside[*to] == Some(shape);
        drawing.links.iter().filter(|l| l.from == shape).map(|l| l.to).filter(is_here).collect()
    }

    fn cell_width(&self, drawing: &Drawing, shape: usize) -> usize {
        if self.stacked(drawing, shape).is_empty() {
            self.box_width
        } else {
            self.box_width * 2 + self.gap
        }
    }

    fn cell_height(&self, drawing: &Drawing, shape: usize) -> usize {
        let stacked = self.stacked(drawing, shape);
        let heights: usize = stacked.iter().map(|s| box_height(&drawing.shapes[*s])).sum();
        let gaps = stacked.len().saturating_sub(1) * GAP_STACKED;
        (heights + gaps).max(box_height(&drawing.shapes[shape]))
    }

    fn boxes(
        &self,
        drawing: &Drawing,
        layers: &[usize],
        routes: &[Route],
        left: usize,
    ) -> Vec<Rect> {
        let size =
            |shape: &Shape| Rect { width: self.box_width, height: box_height(shape), x: 0, y: 0 };
        let mut boxes: Vec<Rect> = drawing.shapes.iter().map(size).collect();
        let rows =
            routes.iter().filter_map(|r| if let Route::Down { row } = r { *row } else { None });
        let gap_down = GAP_DOWN + rows.max().map_or(0, |row| row * LINE_HEIGHT);
        let depth = layers.iter().max().map_or(0, |deepest| deepest + 1);
        let mut y = MARGIN;
        for layer in 0..depth {
            let in_layer = |shape: &usize| layers[*shape] == layer && self.beside[*shape].is_none();
            let members: Vec<usize> = (0..layers.len()).filter(in_layer).collect();
            self.place_layer(drawing, &members, left, &mut boxes);
            for shape in &members {
                self.place_cell(drawing, *shape, y, &mut boxes);
            }
            let heights = members.iter().map(|s| self.cell_height(drawing, *s));
            y += heights.max().unwrap_or(0) + gap_down;
        }
        boxes
    }

    /// Sets the x coordinates of a layer: below the middle of the parents, without overlap.
    /// Children of the same parents are centred together.
    fn place_layer(&self, drawing: &Drawing, members: &[usize], left: usize, boxes: &mut [Rect]) {
        let mut wanted: Vec<(usize, usize)> =
            members.iter().map(|shape| (wanted_middle(drawing, *shape, boxes), *shape)).collect();
        wanted.sort_unstable();
        let mut free_x = left;
        for group in wanted.chunk_by(|a, b| a.0 == b.0) {
            let widths =
                group.iter().map(|(_, shape)| self.cell_width(drawing, *shape) + GAP_ACROSS);
            let before_last: usize = widths.take(group.len() - 1).sum();
            let half = (before_last + self.box_width) / 2;
            let mut x = group[0].0.saturating_sub(half).max(free_x);
            for (_, shape) in group {
                boxes[*shape].x = x;
                x += self.cell_width(drawing, *shape) + GAP_ACROSS;
            }
            free_x = x;
        }
    }

    /// Sets the y coordinate of a box and the places of those beside it; the shorter side is
    /// centred.
    fn place_cell(&self, drawing: &Drawing, shape: usize, y: usize, boxes: &mut [Rect]) {
        let height = self.cell_height(drawing, shape);
        boxes[shape].y = y + (height - boxes[shape].height) / 2;
        let stacked = self.stacked(drawing, shape);
        let sum: usize = stacked.iter().map(|s| boxes[*s].height).sum();
        let gaps = stacked.len().saturating_sub(1) * GAP_STACKED;
        let mut at = y + (height - sum - gaps) / 2;
        for other in stacked {
            boxes[other].x = boxes[shape].right() + self.gap;
            boxes[other].y = at;
            at += boxes[other].height + GAP_STACKED;
        }
    }
}

/// Returns the parent that `shape` may stand beside: its only one, if it is an end and does not
/// continue the chain.
fn parent_beside(drawing: &Drawing, shape: usize) -> Option<usize> {
    if drawing.links.iter().any(|link| link.from == shape) {
        return None;
    }
    let mut above = drawing.links.iter().filter(|link| link.to == shape);
    match (above.next(), above.next()) {
        (Some(link), None) if !link.is_chain => Some(link.from),
        _ => None,
    }
}

/// Returns the layer of each box: one below the deepest parent; boxes beside another are in its
/// layer.
fn layers(drawing: &Drawing, cells: &Cells) -> Vec<usize> {
    let mut layers = vec![0; drawing.shapes.len()];
    // A path has fewer links than there are boxes, so this many rounds reach every end.
    for _ in 0..drawing.shapes.len() {
        let mut is_final = true;
        for link in &drawing.links {
            let below = if cells.beside[link.to].is_some() { 0 } else { 1 };
            if layers[link.to] < layers[link.from] + below {
                layers[link.to] = layers[link.from] + below;
                is_final = false;
            }
        }
        if is_final {
            break;
        }
    }
    layers
}

/// Chooses how each line runs; lanes get numbers first, coordinates in [`leave_lanes`].
fn routes(drawing: &Drawing, cells: &Cells, layers: &[usize]) -> Vec<Route> {
    let mut lanes = 0;
    let mut rows = vec![0; drawing.shapes.len()];
    let count_above = |shape| drawing.links.iter().filter(|link| link.to == shape).count();
    let mut routes = Vec::new();
    for link in &drawing.links {
        routes.push(if cells.beside[link.to].is_some() {
            Route::Beside
        } else if layers[link.to] - layers[link.from] > 1 {
            lanes += 1;
            Route::Lane(lanes - 1)
        } else if count_above(link.to) > 1 {
            rows[link.from] += 1;
            Route::Down { row: Some(rows[link.from] - 1) }
        } else {
            Route::Down { row: None }
        });
    }
    routes
}

/// Turns lane numbers into x coordinates, the labels left of them, and returns where the first cell
/// may begin.
fn leave_lanes(drawing: &Drawing, routes: &mut [Route]) -> usize {
    let mut labels = 0;
    let mut count = 0;
    for (link, route) in drawing.links.iter().zip(&*routes) {
        if matches!(route, Route::Lane(_)) {
            labels = labels.max(chars(&link.label) * CHAR_WIDTH);
            count += 1;
        }
    }
    if count == 0 {
        return MARGIN;
    }
    let step = labels + LANE_WIDTH;
    for route in routes.iter_mut() {
        if let Route::Lane(x) = route {
            *x = MARGIN + labels + *x * step;
        }
    }
    MARGIN + count * step + LANE_WIDTH
}

/// Returns where a box should have its middle: below that of its parents; 0 if it has none.
fn wanted_middle(drawing: &Drawing, shape: usize, boxes: &[Rect]) -> usize {
    let above = drawing.links.iter().filter(|link| link.to == shape);
    let middles: Vec<usize> = above.map(|link| boxes[link.from].middle_x()).collect();
    if middles.is_empty() { 0 } else { middles.iter().sum::<usize>() / middles.len() }
}

fn box_height(shape: &Shape) -> usize {
    (1 + shape.details.len()) * LINE_HEIGHT + 2 * PADDING
}

/// Length of a text as it is drawn, in characters.
fn chars(text: &str) -> usize {
    shortened(text, LINE_MAX).chars().count()
}

#[cfg(test)]
mod tests {
    use super::super::Link;
    use super::*;

    /// `links`: from, to, continues the chain.
    fn drawing(count: usize, links: &[(usize, usize, bool)]) -> Drawing {
        let shape = |n| Shape {
            title: format!("image-{n}.qcow2"),
            details: vec!["qcow2".into(), "1 GiB, read-write".into()],
            tooltip: String::new(),
            fill: "white",
        };
        let link = |&(from, to, is_chain): &(usize, usize, bool)| Link {
            from,
            to,
            label: "backing".into(),
            tooltip: String::new(),
            is_chain,
        };
        Drawing { shapes: (0..count).map(shape).collect(), links: links.iter().map(link).collect() }
    }

    fn assert_apart(layout: &Layout) {
        for (i, a) in layout.boxes.iter().enumerate() {
            assert!(a.right() < layout.width && a.bottom() < layout.height, "{a:?} is cut off");
            for b in &layout.boxes[i + 1..] {
                let apart_x = a.right() < b.x || b.right() < a.x;
                let apart_y = a.bottom() < b.y || b.bottom() < a.y;
                assert!(apart_x || apart_y, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn a_chain_is_vertical_with_its_files_beside_it() {
        // Twelve images, each with its file: image n is box 2n, its file 2n + 1.
        let mut links = Vec::new();
        for n in 0..12 {
            links.push((2 * n, 2 * n + 1, false));
            if n < 11 {
                links.push((2 * n, 2 * n + 2, true));
            }
        }
        let layout = place(&drawing(24, &links));
        assert_apart(&layout);
        for n in 0..12 {
            let (image, file) = (layout.boxes[2 * n], layout.boxes[2 * n + 1]);
            assert_eq!(image.x, layout.boxes[0].x, "image {n}");
            assert_eq!(image.y, file.y, "file {n}");
            assert!(file.x > image.right());
        }
    }

    #[test]
    fn every_line_of_a_diamond_points_down_and_none_overlap() {
        // 0 → 1 → 2 → 3 and 0 → 3, which skips two layers and runs in a lane.
        let layout = place(&drawing(4, &[(0, 3, true), (2, 3, true), (1, 2, true), (0, 1, true)]));
        assert_apart(&layout);
        assert!(layout.boxes.windows(2).all(|pair| pair[0].bottom() < pair[1].y));
        let Route::Lane(x) = layout.routes[0] else { panic!("{:?}", layout.routes) };
        assert!(layout.boxes.iter().all(|b| x < b.x), "the lane is left of the boxes");
    }

    #[test]
    fn wide_graphs_do_not_overlap() {
        let children: Vec<_> = (1..6).map(|n| (0, n, n % 2 == 0)).collect();
        assert_apart(&place(&drawing(6, &children)));
        let shared = [(0, 2, true), (1, 2, true), (2, 3, false), (2, 4, false), (1, 5, true)];
        assert_apart(&place(&drawing(6, &shared)));
    }

    #[test]
    fn labels_at_one_parent_are_in_separate_rows() {
        let both = [(0, 2, true), (0, 3, true), (1, 2, true), (1, 3, true)];
        let layout = place(&drawing(4, &both));
        let of_first: Vec<Route> = layout.routes[..2].to_vec();
        assert_eq!(of_first, [Route::Down { row: Some(0) }, Route::Down { row: Some(1) }]);
        assert_apart(&layout);
    }

    #[test]
    fn an_empty_graph_is_drawn() {
        assert!(place(&Drawing::default()).boxes.is_empty());
    }
}

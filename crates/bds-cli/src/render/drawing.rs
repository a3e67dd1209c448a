//! Defines what a drawing shows: boxes with texts, and lines between them.

/// Longest text of a line in a box, in characters.
pub(super) const LINE_MAX: usize = 34;

/// One box: a title in bold, lines of details, and a tooltip.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) title: String,
    pub(crate) details: Vec<String>,
    pub(crate) tooltip: String,
    /// Colour of the box, as SVG spells it.
    pub(crate) fill: &'static str,
}

/// One line between boxes, from parent to child; indices into [`Drawing::shapes`].
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) label: String,
    pub(crate) tooltip: String,
    /// The child continues the chain (a backing or filtered child), so it is placed below its
    /// parent.
    pub(crate) is_chain: bool,
}

/// Boxes and lines to be drawn. The lines make no cycle.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drawing {
    pub(crate) shapes: Vec<Shape>,
    pub(crate) links: Vec<Link>,
}

/// Returns at most `max` characters of `text`, with an ellipsis for what is left out of its middle:
/// names differ at their ends.
pub(super) fn shortened(text: &str, max: usize) -> String {
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= max {
        return text.to_owned();
    }
    let kept = max - 1;
    let head = kept / 2;
    let tail = kept - head;
    let (front, back) = (&chars[..head], &chars[chars.len() - tail..]);
    front.iter().chain(&['…']).chain(back).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_both_ends() {
        assert_eq!(shortened("disk.qcow2", 10), "disk.qcow2");
        assert_eq!(shortened("a-very-long-name.qcow2", 11), "a-ver…qcow2");
        assert_eq!(shortened("ääääääääää", 5), "ää…ää");
    }
}

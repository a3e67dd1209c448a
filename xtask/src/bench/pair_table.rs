//! Formats results of bds and of qemu-storage-daemon side by side: a row for each measured figure,
//! medians with minimum and maximum, and the ratio of the medians.

/// One row: what is measured, in which unit, and both results of each round.
struct Row {
    name: String,
    unit: &'static str,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

/// Rows in the order in which they came.
#[derive(Default)]
pub(super) struct PairTable(Vec<Row>);

impl PairTable {
    /// Adds one round's figure to the row of this name.
    pub(super) fn note(&mut self, name: &str, unit: &'static str, is_ours: bool, value: f64) {
        let place = self.0.iter().position(|row| row.name == name).unwrap_or_else(|| {
            self.0.push(Row { name: name.into(), unit, ours: Vec::new(), theirs: Vec::new() });
            self.0.len() - 1
        });
        let row = &mut self.0[place];
        if is_ours { row.ours.push(value) } else { row.theirs.push(value) }
    }

    /// The table; its first column is called `what`. The ratio is theirs over ours, with so many
    /// digits.
    pub(super) fn text(&self, what: &str, digits: usize) -> String {
        let mut text =
            format!("\n| {what} | bds | qemu-storage-daemon | ratio |\n|---|---|---|---|\n");
        text.push_str(&self.rows("", digits));
        text
    }

    /// The rows whose names begin like this.
    pub(super) fn rows(&self, start: &str, digits: usize) -> String {
        let wanted = self.0.iter().filter(|row| row.name.starts_with(start));
        wanted.map(|row| row.text(digits)).collect()
    }
}

impl Row {
    fn text(&self, digits: usize) -> String {
        let Self { name, unit, ours, theirs } = self;
        let ratio = match theirs.is_empty() {
            true => "-".into(),
            false => format!("{:.digits$}", spread(theirs).0 / spread(ours).0),
        };
        let (ours, theirs) = (summary(ours, unit), summary(theirs, unit));
        format!("| {name} | {ours} | {theirs} | {ratio} |\n")
    }
}

/// Median, minimum, maximum.
pub(super) fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    (at(values.len() / 2), at(0), at(values.len().saturating_sub(1)))
}

fn summary(values: &[f64], unit: &str) -> String {
    if values.is_empty() {
        return "-".into();
    }
    let (middle, least, most) = spread(values);
    format!("{middle:.1} {unit} ({least:.1}..{most:.1})")
}

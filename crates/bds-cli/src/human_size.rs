//! Formats sizes with three digits and a binary unit, as qemu-img does.

const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// Formats a size with three significant digits and a binary unit: "10 MiB", "1.31 MiB", "324 KiB".
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn human_size(bytes: u64) -> String {
    let mut unit = 0;
    let mut value = bytes as f64;
    // The next unit begins at 1000 of the last, so that no size takes four digits.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// As printf's `%.3g` for 0 to 1000: three significant digits, no trailing zeros.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_qemu_img_prints_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (4096, "4 KiB"),
            (331_776, "324 KiB"),
            (1_376_256, "1.31 MiB"),
            (10_485_760, "10 MiB"),
            (1 << 30, "1 GiB"),
            (1500 << 20, "1.46 GiB"),
            (1 << 62, "4 EiB"),
        ] {
            assert_eq!(human_size(bytes), text, "{bytes}");
        }
    }
}

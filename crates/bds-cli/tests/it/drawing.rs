//! Tests `bds graph`: text, Graphviz and SVG output.

use crate::workdir::Workdir;

/// An overlay over an image.
fn overlay() -> Workdir {
    let workdir = Workdir::new();
    workdir.must("create -q -f qcow2 a.qcow2 1M");
    workdir.must("create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2");
    workdir
}

#[test]
fn text_shows_nodes_files_holders_and_edges() {
    insta::assert_snapshot!(overlay().must("graph b.qcow2").stdout);
}

#[test]
fn dot_shows_file_names() {
    let dot = overlay().must("graph --output dot b.qcow2").stdout;
    assert!(dot.starts_with("digraph") && dot.contains("backing"), "{dot}");
    for name in ["a.qcow2", "b.qcow2"] {
        assert_eq!(dot.matches(&format!("label=\"{name}\\n")).count(), 2, "{name}: {dot}");
    }
}

#[test]
fn svg_has_files_as_titles_short_labels_and_long_tooltips() {
    let workdir = overlay();
    workdir.must("graph --output svg --write-to b.svg b.qcow2");
    let svg = String::from_utf8(workdir.read("b.svg")).expect("text");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    // Two images, each with its file, and three edges.
    assert_eq!(svg.matches("rx=\"6\"").count(), 4, "{svg}");
    assert_eq!(svg.matches("marker-end").count(), 3, "{svg}");
    for name in ["a.qcow2", "b.qcow2"] {
        let title = format!(r#"font-weight="bold">{name}</text>"#);
        assert_eq!(svg.matches(&title).count(), 2, "{name}: {svg}");
    }
    for label in [">file</text>", ">backing</text>"] {
        assert!(svg.contains(label), "{label}: {svg}");
    }
    assert!(svg.contains("<title>#block000.file: permissions consistent-read; shared"), "{svg}");
}

#[test]
fn a_filter_is_drawn_above_its_image_under_its_own_name() {
    let workdir = overlay();
    let options = "driver=throttle,limits.bps-total=1M,file.driver=qcow2,file.file.driver=file,file.file.filename=a.qcow2";
    let svg = workdir.must(&format!("graph --output svg --image-opts {options}")).stdout;
    assert!(svg.contains(r#"font-weight="bold">throttle</text>"#), "{svg}");
    assert_eq!(svg.matches(r#"font-weight="bold">a.qcow2</text>"#).count(), 2, "{svg}");
}

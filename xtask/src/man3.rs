//! Makes the manual page bds(3) out of the comments of `bds.h`.
//!
//! The header's opening comment becomes the description; every documented function a section with
//! its prototype and its text.

/// A documented function.
struct Function<'a> {
    name: &'a str,
    prototype: String,
    text: String,
}

/// The page, in man's markup.
pub(crate) fn page(header: &str, version: &str) -> String {
    let mut page = format!(
        ".TH BDS 3 \"\" \"bds {version}\" \"Library Functions\"\n.SH NAME\nbds \\- the block layer of QEMU as a C \
         library\n.SH SYNOPSIS\n.nf\n#include <bds.h>\n\ncc program.c $(pkg\\-config \\-\\-cflags \\-\\-libs bds)\n.fi\n\
         .SH DESCRIPTION\n"
    );
    page += &paragraphs(&opening(header));
    page += ".SH FUNCTIONS\n";
    for function in functions(header) {
        page += &format!(
            ".SS {}\n.nf\n{}\n.fi\n.PP\n{}",
            function.name,
            escaped(&function.prototype),
            paragraphs(&function.text)
        );
    }
    page + ".SH SEE ALSO\n.BR bds (1)\n"
}

/// The opening comment, without its first line, which speaks of the file.
fn opening(header: &str) -> String {
    let comment = header.split("*/").next().unwrap_or_default();
    let lines = comment.lines().skip_while(|line| !line.trim().is_empty() && line.trim() != "*");
    lines.map(without_star).collect::<Vec<_>>().join("\n")
}

/// Each comment that stands in front of a function.
fn functions(header: &str) -> Vec<Function<'_>> {
    header.split("\n/**\n").skip(1).filter_map(function).collect()
}

fn function(block: &str) -> Option<Function<'_>> {
    let (comment, code) = block.split_once("*/\n")?;
    let (declared, _) = code.split_once(';')?;
    let declared = declared.trim_start_matches("BDS_MUST_CHECK").trim();
    let (head, _) = declared.split_once('(')?;
    let name = head.rsplit([' ', '*']).next().filter(|name| name.starts_with("bds_"))?;
    if head.contains('{') || head.contains('#') || head.contains("typedef") {
        return None;
    }
    Some(Function {
        name,
        prototype: format!("{declared};"),
        text: comment.lines().map(without_star).collect::<Vec<_>>().join("\n"),
    })
}

fn without_star(line: &str) -> &str {
    let line = line.trim_start();
    line.strip_prefix("* ").unwrap_or_else(|| line.trim_start_matches('*')).trim_end()
}

/// Text with its paragraphs; indented lines and tables stay as they are.
fn paragraphs(text: &str) -> String {
    let mut out = String::new();
    for paragraph in text.trim().split("\n\n") {
        let is_verbatim = paragraph.lines().any(|line| line.starts_with(['|', ' ']));
        let lines = escaped(paragraph);
        out += &match is_verbatim {
            true => format!(".nf\n{lines}\n.fi\n.PP\n"),
            false => format!("{lines}\n.PP\n"),
        };
    }
    out
}

/// No character of the text is markup.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let line = |line: &str| match line.starts_with(['.', '\'']) {
        true => format!("\\&{line}"),
        false => line.to_owned(),
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "/* bds.h: the library.\n *\n * Handles. One.\n */\n#define A 1\n\n/**\n * A number.\n */\n#define B 2\n\n\
        /**\n * Reads `a-b`. [io]\n *\n * .Errors: none.\n */\nBDS_MUST_CHECK\nint bds_read(int a,\n             int b);\n\
        \n/**\n * A name.\n */\nconst char *bds_name(void);\n";

    #[test]
    fn documented_functions_become_sections() {
        let page = page(HEADER, "0.1.0");
        assert!(page.contains("Handles. One.\n"), "{page}");
        assert!(page.contains(".SS bds_read\n.nf\nint bds_read(int a,\n"), "{page}");
        assert!(page.contains("Reads `a\\-b`. [io]\n.PP\n\\&.Errors: none.\n"), "{page}");
        assert!(page.contains(".SS bds_name\n"), "{page}");
        assert_eq!(page.matches(".SS ").count(), 2, "constants are not functions: {page}");
    }
}

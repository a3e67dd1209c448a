//! Parses JSON as QEMU does: strings may be in single quotes, which need no escaping in a shell.

use std::borrow::Cow;

use serde_json::Value;

/// Parses a JSON text in which strings may be quoted either way.
pub(super) fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(&with_double_quotes(text))
}

/// Translates to plain JSON. Errors in the text are kept.
fn with_double_quotes(text: &str) -> Cow<'_, str> {
    if !text.contains('\'') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('"' | '\'', None) => {
                quote = Some(c);
                out.push('"');
            }
            (c, Some(open)) if c == open => {
                quote = None;
                out.push('"');
            }
            ('\\', Some(_)) => match chars.next() {
                // The one escape that plain JSON does not know.
                Some('\'') => out.push('\''),
                next => {
                    out.push('\\');
                    out.extend(next);
                }
            },
            ('"', Some(_)) => out.push_str("\\\""),
            (c, _) => out.push(c),
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn strings_may_be_quoted_either_way() {
        for (text, value) in [
            (r#"{'a': "b", "c": 'd'}"#, json!({"a": "b", "c": "d"})),
            (r#"{'it''s': 1}"#, Value::Null),
            (r#"{'it\'s': 'say "x"'}"#, json!({"it's": "say \"x\""})),
            (r#"{"it's": "it\'s \\"}"#, json!({"it's": "it's \\"})),
            (r#"{'a\n\u0041\"': null}"#, json!({"a\nA\"": null})),
            (r#"{'a"#, Value::Null),
            (r#"{'a\"#, Value::Null),
        ] {
            assert_eq!(parse(text).unwrap_or_default(), value, "{text}");
        }
    }
}

//! Option trees: text in, tree out, and back.

use proptest::prelude::{Strategy, any, prop, prop_assert_eq, prop_oneof, proptest};
use serde_json::json;

use super::*;

fn parsed(text: &str) -> String {
    match Options::parse(text) {
        Ok(options) => options.into_json().to_string(),
        Err(error) => format!("error: {error}"),
    }
}

#[test]
fn text_becomes_a_tree() {
    for (text, tree) in [
        ("", "{}"),
        ("a=1", r#"{"a":"1"}"#),
        (
            "driver=qcow2,file.filename=x,,y,cache.direct=on",
            r#"{"driver":"qcow2","file":{"filename":"x,y"},"cache":{"direct":"on"}}"#,
        ),
        ("a=,b=,,,c=d", r#"{"a":"","b":",","c":"d"}"#),
        ("a=x,,,,y", r#"{"a":"x,,y"}"#),
        ("lazy,b=2", r#"{"lazy":"on","b":"2"}"#),
        ("a=b=c", r#"{"a":"b=c"}"#),
        ("a=1,a=2", r#"{"a":"2"}"#),
        ("l.1=b,l.0=a", r#"{"l":["a","b"]}"#),
        ("l.0.x=a,l.1.x=b", r#"{"l":[{"x":"a"},{"x":"b"}]}"#),
        ("a=1,", r#"{"a":"1"}"#),
        (r#"json:{"a":1,"b.c":true}"#, r#"{"a":1,"b":{"c":true}}"#),
        (r#"json:{"b":{"d":2},"b.c":true}"#, r#"{"b":{"d":2,"c":true}}"#),
        (r#"json:{"b":{"c":null,"d.e":[]}}"#, r#"{"b":{"c":null,"d":{"e":[]}}}"#),
    ] {
        assert_eq!(parsed(text), tree, "{text}");
    }
}

#[test]
fn text_that_is_wrong_is_refused_with_the_place() {
    for (text, wanted) in [
        ("=1", "no name"),
        ("a..b=1", "empty or overlong part"),
        ("a=1,a.b=2", "'a' is given twice"),
        ("a.b=2,a=1", "'a' is given twice"),
        ("l.0=a,l.2=b", "lacks an index"),
        ("json:[]", "must be a JSON object"),
        ("json:{", "cannot parse json"),
        (r#"json:{"a":1,"a.b":2}"#, "'a' is given twice"),
    ] {
        let found = parsed(text);
        assert!(found.starts_with("error") && found.contains(wanted), "{text}: {found}");
    }
}

#[test]
fn depth_and_length_are_bounded() {
    let deep = vec!["a"; MAX_DEPTH + 1].join(".") + "=1";
    assert!(parsed(&deep).contains("levels deep"));
    let mut value = json!(1);
    for _ in 0..MAX_DEPTH + 1 {
        value = json!({ "a": value });
    }
    assert!(parsed(&format!("json:{value}")).contains("levels deep"));
    assert!(parsed(&"a".repeat(MAX_TEXT_LEN + 1)).contains("longer than"));
    assert!(parsed(&format!("json:{}", "[".repeat(100_000))).contains("cannot parse"));
}

#[test]
fn a_key_is_found_flat_and_nested_and_leaves_nothing_behind() {
    let mut options =
        Options::from_json(json!({"cache": {"direct": true, "no-flush": false}})).unwrap();
    assert!(options.contains("cache.direct"));
    assert_eq!(options.take_bool("cache.direct").unwrap(), Some(true));
    assert_eq!(options.take_bool("cache.direct").unwrap(), None);
    assert_eq!(options.take_bool("cache.no-flush").unwrap(), Some(false));
    options.finish("test").unwrap();

    let mut flat = Options::new().with("cache.direct", "on");
    assert_eq!(flat.take_bool("cache.direct").unwrap(), Some(true));
    flat.finish("test").unwrap();
}

#[test]
fn wrong_values_are_refused_by_name() {
    let text = "s=x,b=maybe,n=-1,z=12q,w=red";
    let take = |f: fn(&mut Options) -> Result<()>| {
        f(&mut Options::parse(text).unwrap()).unwrap_err().to_string()
    };
    assert!(take(|o| o.take_bool("b").map(drop)).contains("'b' wants on or off"));
    assert!(take(|o| o.take_u64("n").map(drop)).contains("'n' wants a number"));
    assert!(take(|o| o.take_size("z").map(drop)).contains("'z' wants a size"));
    let choice = take(|o| o.take_choice("w", &[("green", 1), ("blue", 2)]).map(drop));
    assert!(choice.contains("'w' wants one of green, blue (w = \"red\")"), "{choice}");
    let child = Options::new().with("c", 5).take_child("c").unwrap_err();
    assert!(child.to_string().contains("'c' wants a node name"));
}

#[test]
fn a_child_is_a_name_a_tree_or_nothing() {
    let mut options =
        Options::from_json(json!({"a": "disk", "b": {"driver": "raw"}, "c": null})).unwrap();
    assert_eq!(options.take_child("a").unwrap(), Some(ChildOption::Node("disk".into())));
    let tree = Options::new().with("driver", "raw");
    assert_eq!(options.take_child("b").unwrap(), Some(ChildOption::Tree(tree)));
    assert_eq!(options.take_child("c").unwrap(), Some(ChildOption::None));
    assert_eq!(options.take_child("d").unwrap(), None);
}

#[test]
fn keys_that_were_not_taken_are_refused_by_name() {
    let error = Options::new().with("frob", 1).finish("qcow2").unwrap_err();
    assert_eq!(error.to_string(), "qcow2 does not know the option 'frob'");
}

#[test]
fn sizes() {
    for (text, bytes) in [
        ("0", Some(0)),
        ("512", Some(512)),
        ("64k", Some(65536)),
        ("1.5M", Some(1_572_864)),
        ("2b", Some(2)),
        ("16E", None),
        ("", None),
        ("k", None),
        ("-1", None),
        ("1kk", None),
        ("1.k", Some(1024)),
        ("0.5k", Some(512)),
        ("0.1k", None),
        ("93.1", None),
        ("1.0", None),
        ("1.5b", None),
        ("1.+5k", None),
        ("18446744073709551615", Some(u64::MAX)),
        ("18446744073709551616", None),
    ] {
        assert_eq!(parse_size(text), bytes, "{text}");
    }
}

/// Trees that the text form can say: groups and lists are not empty, leaves are text.
fn tree() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        "[ -~]{0,6}".prop_map(Value::String),
        prop::collection::vec(prop_oneof![Just(','), Just('='), Just('.')], 0..4)
            .prop_map(|chars| Value::String(chars.into_iter().collect())),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(Value::Array),
            prop::collection::btree_map("[a-z][a-z0-9-]{0,4}", inner, 1..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

use proptest::prelude::Just;

proptest! {
    #[test]
    fn text_round_trips(map in prop::collection::btree_map("[a-z][a-z-]{0,5}", tree(), 0..5)) {
        let options = Options::from_json(Value::Object(map.into_iter().collect())).unwrap();
        let again = Options::parse(&options.to_text()).unwrap();
        prop_assert_eq!(again, options);
    }

    #[test]
    fn json_round_trips(map in prop::collection::btree_map("[a-z][a-z-]{0,5}", tree(), 0..5)) {
        let options = Options::from_json(Value::Object(map.into_iter().collect())).unwrap();
        let again = Options::parse(&format!("json:{}", options.clone().into_json())).unwrap();
        prop_assert_eq!(again, options);
    }

    #[test]
    fn no_text_panics(text in any::<String>()) {
        let _ = Options::parse(&text);
    }

    #[test]
    fn no_near_text_panics(text in "[a0,=.{}\":\\[\\]]{0,40}") {
        let _ = Options::parse(&text);
        let _ = Options::parse(&format!("json:{text}"));
        let _ = parse_size(&text);
    }
}

#[test]
fn file_names_of_any_bytes_go_through() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let name = OsStr::from_bytes(b"a\xff,b");
    let text = OsStr::from_bytes(b"file.filename=a\xff,,b,driver=raw");
    let mut options = Options::parse_os(text).unwrap();
    assert_eq!(options.peek_path("file.filename").unwrap().as_os_str(), name);
    // Also once more through text, where numbers become words.
    let again = Options::parse(&options.to_text()).unwrap();
    assert_eq!(again.peek_path("file.filename").unwrap().as_os_str(), name);
    assert_eq!(options.take_path("file.filename").unwrap().unwrap().as_os_str(), name);
    options.set_path("plain", "x.raw");
    assert_eq!(options.peek("plain"), Some(&json!("x.raw")));
    for value in [json!(1), json!([]), json!([256]), json!([-1]), json!(["x"]), json!({})] {
        assert!(Options::new().with("a", value.clone()).take_path("a").is_err(), "{value}");
    }
    assert!(Options::parse_os(OsStr::from_bytes(b"\xff=1")).is_err());
    assert!(Options::parse_os(OsStr::from_bytes(b"json:{\"\xff\":1}")).is_err());
}

#[test]
fn json_may_be_bare_and_single_quoted() {
    for text in [r#"{"a":{"b":"c"}}"#, "{'a.b':'c'}", "json:{'a':{'b':\"c\"}}"] {
        assert_eq!(parsed(text), r#"{"a":{"b":"c"}}"#, "{text}");
    }
}

#[test]
fn numbers_may_be_hexadecimal() {
    for (text, number) in [
        ("0x1000", Some(4096)),
        ("0XfF", Some(255)),
        ("010", Some(10)),
        ("0x", None),
        ("0x1k", None),
        ("0x+1", None),
        ("+1", None),
        ("", None),
        ("0x10000000000000000", None),
    ] {
        assert_eq!(parse_number(text), number, "{text}");
        if text.starts_with("0x") {
            assert_eq!(parse_size(text), number, "{text}");
        }
    }
    assert_eq!(
        (parse_size(".5k"), parse_size("1.k"), parse_size(".")),
        (Some(512), Some(1024), None)
    );
}

#[test]
fn an_empty_backing_is_none() {
    assert_eq!(ChildOption::from_json("backing", json!("")).unwrap(), ChildOption::None);
    assert_eq!(
        ChildOption::from_json("file", json!("")).unwrap(),
        ChildOption::Node(String::new())
    );
}

//! Option builders: the JSON that every `options` parameter takes, made step by step.

use std::ffi::c_char;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bds_core::Options;

use crate::abi::{bds_node, bds_options};
use crate::entry::entry;
use crate::failure::Failure;
use crate::node::NODES;
use crate::option_text::parse;
use crate::ptr::{self, Out, Text};
use crate::table::{Object, Removed, Table};

static OPTIONS: Table<OptionsObject> = Table::new(3);

struct OptionsObject(Mutex<Options>);

impl Object for OptionsObject {}

impl OptionsObject {
    fn lock(&self) -> MutexGuard<'_, Options> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(options: bds_options) -> Result<crate::table::Ref<OptionsObject>, Failure> {
    OPTIONS.get(options.raw).map_err(|failure| failure.of("options"))
}

/// Makes an empty set of options. [any]
///
/// Release the handle with bds_options_unref.
///
/// Errors: BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_options_create(out: Out<bds_options>) -> i32 {
    entry("bds_options_create", || {
        let out = out.check("out")?;
        let options = OptionsObject(Mutex::new(Options::new()));
        out.set(bds_options { raw: OPTIONS.insert(options)? });
        Ok(0)
    })
}

/// Sets one option. `key` may have dots for nested options: "file.filename". [any]
///
/// Values are text; what takes them converts ("1G", "on"). A value may be any bytes (a file name).
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8 (of the key);
/// BDS_ERR_OPTION: the key is empty, or contradicts one that is set.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_options_set(options: bds_options, key: Text, value: Text) -> i32 {
    entry("bds_options_set", || {
        let (key, value) = (key.str("key")?, value.path("value")?);
        set(options, key, value)
    })
}

/// Sets one option to the name of a node: "backing", "file". [any]
///
/// The options do not keep the node.
///
/// Errors: as bds_options_set; BDS_ERR_STATE: the node is closed.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_options_set_node(options: bds_options, key: Text, node: bds_node) -> i32 {
    entry("bds_options_set_node", || {
        let key = key.str("key")?;
        let name = NODES.get(node.raw).map_err(|failure| failure.of("node"))?.name()?;
        set(options, key, Path::new(&name))
    })
}

fn set(options: bds_options, key: &str, value: &Path) -> Result<i32, Failure> {
    let options = find(options)?;
    let mut place = options.lock();
    let mut nested = Options::new();
    nested.set_path("value", value);
    let value = nested.take("value").expect("it was just set");
    *place = merge(&place, Options::from_json(serde_json::json!({ key: value }))?)?;
    Ok(0)
}

/// Adds options from JSON, or from `key=value,…`; those that are set already are replaced. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_JSON, BDS_ERR_OPTION. Nothing
/// has changed then.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_options_merge(options: bds_options, more: Text) -> i32 {
    entry("bds_options_merge", || {
        let more = parse(more, "more")?;
        let options = find(options)?;
        let mut place = options.lock();
        *place = merge(&place, more)?;
        Ok(0)
    })
}

/// One tree over another: groups are merged, everything else is replaced.
fn merge(below: &Options, above: Options) -> Result<Options, Failure> {
    let mut sum = below.clone().into_json();
    merge_value(&mut sum, above.into_json());
    Ok(Options::from_json(sum)?)
}

fn merge_value(into: &mut serde_json::Value, from: serde_json::Value) {
    match (into, from) {
        (serde_json::Value::Object(into), serde_json::Value::Object(from)) => {
            for (key, value) in from {
                merge_value(into.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// The options as JSON, for the `options` parameter of other functions. Free it with bds_free.
/// [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_options_json(options: bds_options, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_options_json", || {
        let out = json_out.check("json_out")?;
        let json = find(options)?.lock().clone().into_json();
        out.set(ptr::give_text(&json.to_string())?);
        Ok(0)
    })
}

/// Releases a handle; the options end. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_options_unref(options: bds_options) -> i32 {
    entry("bds_options_unref", || match OPTIONS.remove(options.raw)? {
        Removed::Taken(_) => Ok(0),
        Removed::InUse => Ok(crate::abi::bds_status::BDS_STILL_REFERENCED as i32),
    })
}

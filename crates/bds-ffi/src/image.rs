//! Images: probe, create, info, check, measure, map, convert, backing records.

use std::ffi::c_char;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bds_core::copy::{CopyOptions, CopySource, copy};
use bds_core::driver::{
    BackingRecord, CheckReport, MeasureSource, OpenFlags, Precision, StatusFlags,
};
use bds_core::graph::{NewImage, NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use serde_json::{Map, Value, json};

use crate::abi::{BDS_OPEN_PROBE, bds_backend, bds_context};
use crate::backend;
use crate::context::{self, Context, check_flags};
use crate::entry::entry;
use crate::extents::extent;
use crate::failure::Failure;
use crate::io::target_of;
use crate::node::driver_of;
use crate::option_text::parse_optional;
use crate::ptr::{self, Out, Text};

/// Guesses the format of a file: "qcow2", "raw". Free it with bds_free. [io]
///
/// Never use a guess to open an image that a guest could write raw: it can pretend any format.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT; BDS_ERR_UNSUPPORTED: it is of a format
/// that is known but not supported; errnos of the system.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_probe(
    context: bds_context,
    path: Text,
    driver_out: Out<*mut c_char>,
) -> i32 {
    entry("bds_image_probe", || {
        let out = driver_out.check("driver_out")?;
        let context = context::find(context)?;
        let path = path.path("path")?;
        let driver = bds_io::block_on(driver_of(&context, path, None, BDS_OPEN_PROBE))?;
        out.set(ptr::give_text(&driver)?);
        Ok(0)
    })
}

/// Creates an image file. [io]
///
/// `options`: the create options of the driver, "size" among them, as JSON or `key=value,…`; NULL:
/// none. A backing file is named by "backing_file" and "backing_fmt", and is opened only if the
/// context allows it. An existing file is overwritten.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_JSON,
/// BDS_ERR_OPTION, BDS_ERR_UNSUPPORTED, BDS_ERR_REFERENCE, BDS_ERR_IN_USE; -ENOSPC, -EACCES and
/// other errnos. No new file remains; whatever can be checked is checked before an existing file is
/// touched.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_create(
    context: bds_context,
    path: Text,
    driver: Text,
    options: Text,
) -> i32 {
    entry("bds_image_create", || {
        let context = context::find(context)?;
        let image = NewImage {
            format: driver.str("driver")?.into(),
            path: path.path("path")?.into(),
            options: parse_optional(options, "options")?,
            skip_backing: false,
        };
        bds_io::block_on(context.graph.create_image(image))?;
        Ok(0)
    })
}

/// Facts about an image file as JSON, as qemu-img info names them. Free it with bds_free. [io]
///
/// Takes no lock and opens no backing file, so an image in use can be looked at. `driver` may be
/// NULL with BDS_OPEN_PROBE in `flags`; other flags are not known.
///
/// Errors: as bds_node_open; BDS_ERR_VERSION.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_info(
    context: bds_context,
    path: Text,
    driver: Text,
    flags: u32,
    json_out: Out<*mut c_char>,
) -> i32 {
    entry("bds_image_info", || {
        let out = json_out.check("json_out")?;
        check_flags(flags, BDS_OPEN_PROBE)?;
        let context = context::find(context)?;
        let (path, driver) = (path.path("path")?, driver.optional("driver")?);
        let info = bds_io::block_on(info_of(&context, path, driver, flags))?;
        out.set(ptr::give_text(&info.to_string())?);
        Ok(0)
    })
}

async fn info_of(
    context: &Context,
    path: &Path,
    driver: Option<&str>,
    flags: u32,
) -> Result<Value, Failure> {
    let driver = driver_of(context, path, driver, flags).await?;
    let mut file = Options::new().with("driver", "file");
    file.set_path("filename", path);
    let options = match driver.as_str() {
        "file" => file,
        _ => Options::new().with("driver", &*driver).with("file", file.into_json()),
    };
    let open = OpenFlags { read_only: true, info_only: true, ..OpenFlags::default() };
    let node = context.graph.open_with(options, open).await?;
    let info = info(&node, path).await;
    node.close().await.map_err(bds_core::Error::from)?.into_result()?;
    Ok(info?)
}

async fn info(node: &NodeRef, path: &Path) -> Result<Value> {
    let backend = Backend::new(node, BackendOptions::default())?;
    let facts = backend.info().await?;
    let mut info = Map::new();
    let mut set = |key: &str, value: Value| {
        info.insert(key.to_owned(), value);
    };
    set("filename", json!(path.to_string_lossy()));
    set("format", json!(node.driver_name()));
    set("virtual-size", json!(node.len()));
    if let Some(bytes) = backend.allocated_len().await? {
        set("actual-size", json!(bytes));
    }
    if let Some(bytes) = facts.cluster_size {
        set("cluster-size", json!(bytes));
    }
    set("dirty-flag", json!(facts.is_dirty));
    if facts.is_corrupt {
        set("corrupt", json!(true));
    }
    if facts.is_encrypted {
        set("encrypted", json!(true));
    }
    if facts.is_compressed {
        set("compressed", json!(true));
    }
    if let Some(stored) = &facts.backing_file {
        set("backing-filename", json!(stored.to_string_lossy()));
    }
    if let Some(format) = &facts.backing_format {
        set("backing-filename-format", json!(format));
    }
    if !facts.snapshots.is_empty() {
        set("snapshots", json!(facts.snapshots));
    }
    if let Some(specific) = facts.format_specific {
        set("format-specific", specific);
    }
    if let Some((file, _)) = walk::child(node, "file") {
        set("file-length", json!(file.len()));
    }
    Ok(Value::Object(info))
}

/// Checks the medium for leaks and corruption; changes nothing. [io]
///
/// The report has qemu-img check's names. Free it with bds_free. A corrupt image is a result, not
/// an error: look at "corruptions", "leaks" and "check-errors".
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_POISONED, -ENOMEDIUM;
/// BDS_ERR_UNSUPPORTED: the format has nothing to check; errnos.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_check(image: bds_backend, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_image_check", || {
        let out = json_out.check("json_out")?;
        let object = backend::find(image, "image")?;
        let report = bds_io::block_on(object.backend().check(&|_, _| ()))?;
        out.set(ptr::give_text(&check_json(&report).to_string())?);
        Ok(0)
    })
}

fn check_json(report: &CheckReport) -> Value {
    json!({
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "check-errors": report.check_errors,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
        "image-end-offset": report.image_end_offset,
        "messages": report.messages,
        "messages-dropped": report.messages_dropped,
    })
}

/// Computes how large a new image would be: "required" and "fully-allocated" bytes. [io]
///
/// `options`: as of bds_image_create; NULL: none. `source`: the image whose contents it would hold;
/// 0: "size" in the options. Free the JSON with bds_free.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_JSON,
/// BDS_ERR_OPTION, BDS_ERR_UNSUPPORTED, BDS_ERR_POISONED, errnos of the source.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_measure(
    context: bds_context,
    driver: Text,
    options: Text,
    source: bds_backend,
    json_out: Out<*mut c_char>,
) -> i32 {
    entry("bds_image_measure", || {
        let out = json_out.check("json_out")?;
        let context = context::find(context)?;
        let driver = driver.str("driver")?;
        let mut options = parse_optional(options, "options")?;
        let source = match source.raw {
            0 => {
                let len = options.take_size("size")?;
                let virtual_len =
                    len.ok_or_else(|| Failure::argument("neither a source nor the option 'size'"))?;
                options.set("size", virtual_len);
                MeasureSource { virtual_len, data: Some(Vec::new()) }
            }
            _ => {
                let object = backend::find(source, "source")?;
                context::check_same(&context, &object.shared.context)?;
                bds_io::block_on(contents(object.backend()))?
            }
        };
        let registry = bds_drivers::registry();
        let report = registry.format(driver)?.measure(&mut options, &source)?;
        options.finish(&format!("the format '{driver}'"))?;
        let mut json =
            json!({"required": report.required, "fully-allocated": report.fully_allocated});
        if let Some(bytes) = report.bitmaps {
            json["bitmaps"] = json!(bytes);
        }
        out.set(ptr::give_text(&json.to_string())?);
        Ok(0)
    })
}

/// The ranges that would have to be stored.
async fn contents(backend: &Backend) -> Result<MeasureSource> {
    let mut data: Vec<Range<u64>> = Vec::new();
    let (mut at, end) = (0, backend.len());
    while at < end {
        let run = backend.block_status(at, end - at, Precision::Exact).await?;
        if run.len == 0 {
            break;
        }
        let next = at + run.len;
        let is_data = run.flags.contains(StatusFlags::DATA | StatusFlags::ALLOCATED)
            && !run.flags.contains(StatusFlags::ZERO);
        if is_data {
            match data.last_mut() {
                Some(last) if last.end == at => last.end = next,
                _ => data.push(at..next),
            }
        }
        at = next;
    }
    Ok(MeasureSource { virtual_len: end, data: Some(data) })
}

/// Describes a range as JSON, one object a run, with qemu-img map's names. [io]
///
/// For a binding that does not want to lay out structs; bds_block_status is the same in binary.
/// `bytes` 0: up to the end. Free it with bds_free.
///
/// Errors: as bds_block_status.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_map(
    image: bds_backend,
    offset: u64,
    bytes: u64,
    json_out: Out<*mut c_char>,
) -> i32 {
    entry("bds_image_map", || {
        let out = json_out.check("json_out")?;
        let object = backend::find(image, "image")?;
        let map = bds_io::block_on(map(object.backend(), offset, bytes))?;
        out.set(ptr::give_text(&Value::Array(map).to_string())?);
        Ok(0)
    })
}

async fn map(backend: &Backend, offset: u64, bytes: u64) -> Result<Vec<Value>> {
    let left = backend.len().saturating_sub(offset);
    let (mut at, mut left) = (offset, if bytes == 0 { left } else { bytes });
    let mut runs = Vec::new();
    while left > 0 {
        let run = backend.block_status(at, left, Precision::Exact).await?;
        if run.len == 0 {
            break;
        }
        let flags = run.flags;
        let mut one = json!({
            "start": at,
            "length": run.len,
            "depth": run.depth,
            "present": flags.contains(StatusFlags::ALLOCATED),
            "zero": flags.contains(StatusFlags::ZERO),
            "data": flags.contains(StatusFlags::DATA),
            "compressed": flags.contains(StatusFlags::COMPRESSED),
        });
        if let Some(host) = &run.host {
            one["offset"] = json!(host.offset);
        }
        runs.push(one);
        at = extent(at, &run).offset + run.len;
        left = left.saturating_sub(run.len);
    }
    Ok(runs)
}

/// Copies an image: `source` to the beginning of `target`, holes and zeros left out. [io]
///
/// Make the target first (bds_image_create), at least as long. `options`, NULL for none: "workers"
/// (1 to 16), "target-is-zero" (a new image: zeros are not written), "compress", "offload" (let
/// the host copy), "out-of-order", "may-unmap". The target is flushed at the end. `report_json_out`
/// may be NULL; otherwise it gets "total", "written", "zeroed", "skipped" bytes, to be freed with
/// bds_free.
///
/// Errors: as bds_pread and bds_pwrite, the first failure; BDS_ERR_ARGUMENT: different contexts;
/// BDS_ERR_JSON, BDS_ERR_OPTION: also a target that is too short, or cannot be compressed.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_convert(
    source: bds_backend,
    target: bds_backend,
    options: Text,
    report_json_out: Out<*mut c_char>,
) -> i32 {
    entry("bds_image_convert", || {
        let out = report_json_out.check_optional("report_json_out")?;
        let to = target_of(source, target)?;
        let from = backend::find(source, "source")?;
        // For the poisoning of the target, should it panic.
        let _target = backend::find(target, "target")?;
        let options = copy_options(parse_optional(options, "options")?, &to.backend)?;
        let sources = [CopySource::from(Arc::new(from.backend().clone()))];
        let report = bds_io::block_on(async {
            let report = copy(&sources, &to.backend, &options).await?;
            to.backend.flush().await?;
            Ok::<_, bds_core::Error>(report)
        })?;
        if let Some(out) = out {
            let json = json!({
                "total": report.total,
                "written": report.written,
                "zeroed": report.zeroed,
                "skipped": report.skipped,
            });
            out.set(ptr::give_text(&json.to_string())?);
        }
        Ok(0)
    })
}

fn copy_options(mut given: Options, target: &Backend) -> Result<CopyOptions, Failure> {
    let mut options = CopyOptions::default();
    if let Some(workers) = given.take_u64("workers")? {
        options.workers = usize::try_from(workers).unwrap_or(usize::MAX);
    }
    options.target_is_zero = given.take_bool("target-is-zero")?.unwrap_or(false);
    options.offload = given.take_bool("offload")?.unwrap_or(false);
    options.out_of_order = given.take_bool("out-of-order")?.unwrap_or(false);
    options.may_unmap = given.take_bool("may-unmap")?.unwrap_or(options.may_unmap);
    if given.take_bool("compress")?.unwrap_or(false) {
        let none = || {
            let words = "the target cannot hold compressed clusters";
            Failure::new(crate::abi::bds_status::BDS_ERR_OPTION, words)
        };
        options.compress = Some(target.compressed_unit().ok_or_else(none)?.into());
    }
    given.finish("a conversion")?;
    Ok(options)
}

/// Copies what an image shows of the images below it into it, in a range. [io]
///
/// Nothing that is read changes; what the image holds already is left alone. What is copied is
/// durable before the image points at it.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_POISONED; as bds_pread and bds_pwrite.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_copy_up(image: bds_backend, offset: u64, bytes: u64) -> i32 {
    entry("bds_image_copy_up", || {
        let object = backend::find(image, "image")?;
        bds_io::block_on(object.backend().copy_up(offset, bytes))?;
        Ok(0)
    })
}

/// Lets an image hold nothing of its own: it shows what its backing file holds. [io]
///
/// The end of a commit by hand: first the job "commit", then this for the overlay that stays.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_POISONED, BDS_ERR_PERMISSION, BDS_ERR_READ_ONLY,
/// BDS_ERR_INACTIVE; BDS_ERR_UNSUPPORTED: the format cannot do that; errnos.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_make_empty(image: bds_backend) -> i32 {
    entry("bds_image_make_empty", || {
        let object = backend::find(image, "image")?;
        bds_io::block_on(object.backend().make_empty())?;
        Ok(0)
    })
}

/// Changes the backing file that an image records, and nothing else: qemu-img rebase -u. [io]
///
/// `file`: the name as it is recorded, absolute or relative to the image; NULL: none. `format`: the
/// driver that opens it; NULL leaves that to a guess. Durable when it returns: a crash leaves the
/// old record or the new one. Neither the open chain nor any data changes; whether the new file
/// shows the same bytes is the caller's affair.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT (a format without a file), BDS_ERR_UTF8,
/// BDS_ERR_POISONED, BDS_ERR_PERMISSION, BDS_ERR_READ_ONLY, BDS_ERR_INACTIVE; BDS_ERR_UNSUPPORTED:
/// the format records no backing file; BDS_ERR_OPTION, -ENOSPC: the record breaks a rule of the
/// format or does not fit; errnos. The old record is still there then.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_image_set_backing_file(image: bds_backend, file: Text, format: Text) -> i32 {
    entry("bds_image_set_backing_file", || {
        let format = format.optional("format")?;
        let record = match (file.is_null(), format) {
            (true, None) => None,
            (true, Some(_)) => return Err(Failure::argument("a format without a file")),
            (false, format) => Some(BackingRecord::new(file.path("file")?.as_os_str(), format)),
        };
        let object = backend::find(image, "image")?;
        bds_io::block_on(object.backend().set_backing_record(record))?;
        Ok(0)
    })
}

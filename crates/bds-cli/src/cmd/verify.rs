//! `verify`: proves that an image has the content that its manifest describes, or writes the
//! manifest.
//!
//! Exit codes: 0 the content is the same, 1 it could not be verified, 2 it differs.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};
use bds_jobs::manifest::{Manifest, ManifestBuilder, VerifyReport};
use serde_json::{Map, Value, json};

use crate::args::{Output, Verify};
use crate::image;
use crate::image_spec::{self, Spec};
use crate::interrupt::{self, Interrupt};
use crate::progress::Progress;
use crate::{printer, report};

const FAILED: u8 = 1;
const DIFFERS: u8 = 2;

/// Largest manifest that is read: that of 8 TiB.
const MAX_MANIFEST_LEN: u64 = 4 << 30;

pub(crate) fn run(args: &Verify) -> ExitCode {
    let done = image::block_on(async {
        match args.write {
            true => write(args).await.map(|manifest| Done { manifest, found: None }),
            false => {
                verify(args).await.map(|(manifest, found)| Done { manifest, found: Some(found) })
            }
        }
    });
    let is_good = |done: &Done| done.found.as_ref().is_none_or(VerifyReport::is_good);
    match done.and_then(|done| print(args, &done).map(|()| is_good(&done))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(DIFFERS),
        Err(error) => {
            report::failure(&error);
            let of_signal = interrupt::exit_code().filter(|_| error.kind() == ErrorKind::Cancelled);
            ExitCode::from(of_signal.unwrap_or(FAILED))
        }
    }
}

/// What was done. `found`: the outcome of a verification.
struct Done {
    manifest: Manifest,
    found: Option<VerifyReport>,
}

async fn verify(args: &Verify) -> Result<(Manifest, VerifyReport)> {
    let manifest = read_manifest(manifest_path(args))?;
    if let Some(parent) = &args.parent {
        manifest.check_parent(&read_manifest(parent)?)?;
    }
    let mut progress = Progress::new(args.progress && !args.quiet);
    let image = Image::open(args).await?;
    let interrupt = Interrupt::watch()?;
    let found = manifest.verify(&image.backend, |done, total| {
        progress.show(done, total);
        !interrupt.has_arrived()
    });
    let found = found.await;
    match &found {
        Ok(_) => progress.finish(manifest.len()),
        Err(_) => progress.abandon(),
    }
    let closed = image.close().await;
    let found = found?;
    closed?;
    Ok((manifest, found))
}

async fn write(args: &Verify) -> Result<Manifest> {
    let path = manifest_path(args);
    check_replaceable(args, &path)?;
    let parent = args.parent.as_deref().map(read_manifest).transpose()?;
    let image = Image::open(args).await?;
    let interrupt = Interrupt::watch()?;
    let note = args.note.as_deref().unwrap_or_default();
    let parent = parent.as_ref().map(Manifest::root);
    let mut progress = Progress::new(args.progress && !args.quiet);
    let builder = ManifestBuilder::new(image.backend.len())?;
    let built = builder.finish(&image.backend, parent, note, |done, total| {
        progress.show(done, total);
        !interrupt.has_arrived()
    });
    let built = built.await;
    match &built {
        Ok(manifest) => progress.finish(manifest.len()),
        Err(_) => progress.abandon(),
    }
    let closed = image.close().await;
    let manifest = built?;
    closed?;
    store(&path, &manifest.to_bytes(), args.overwrite)
        .map_err(|error| Error::io(error, "cannot write the manifest").file(&path))?;
    Ok(manifest)
}

/// The image, open for reading.
struct Image {
    backend: Backend,
    node: bds_core::graph::NodeRef,
}

impl Image {
    async fn open(args: &Verify) -> Result<Self> {
        let cache = image_spec::cache_mode("-T", &args.cache)?;
        let spec = Spec::read(&args.filename, &args.source)?.cache(cache);
        let node = image::open(&image::trusting_graph(), &spec).await?;
        Ok(Self { backend: image::backend(&node, false)?, node })
    }

    async fn close(self) -> Result<()> {
        image::close(self.backend, self.node).await
    }
}

fn manifest_path(args: &Verify) -> PathBuf {
    args.manifest.clone().unwrap_or_else(|| {
        let mut name = OsString::from(&args.filename);
        name.push(".manifest");
        name.into()
    })
}

fn read_manifest(path: impl AsRef<Path>) -> Result<Manifest> {
    let path = path.as_ref();
    let read = || {
        let io = |error| Error::io(error, "cannot read the manifest");
        let facts = fs::metadata(path).map_err(io)?;
        // Reading a FIFO or a terminal would wait for its writer.
        if !facts.is_file() || facts.len() > MAX_MANIFEST_LEN {
            return Err(Error::new(ErrorKind::InvalidImage, "this is not a manifest"));
        }
        Manifest::parse(&fs::read(path).map_err(io)?)
    };
    read().map_err(|error| error.file(path))
}

/// Checks, before the image is read, that nothing but an older manifest is overwritten.
fn check_replaceable(args: &Verify, path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(error, "cannot look at the manifest").file(path)),
        Ok(_) if !args.overwrite => {
            let message = "exists: give another name with --manifest, or --overwrite";
            Err(Error::new(ErrorKind::AlreadyExists, message).file(path))
        }
        // Also refuses the image itself, under whatever name.
        Ok(_) => read_manifest(path).map(drop).map_err(|error| {
            error.context("--overwrite replaces only a manifest, and this is none")
        }),
    }
}

/// Writes a file that is complete and durable, or absent: under another name first.
fn store(path: &Path, bytes: &[u8], may_replace: bool) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let mut file = fs::File::create_new(&temporary)?;
    let placed = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| {
        match may_replace {
            true => fs::rename(&temporary, path),
            // Unlike a rename, a link never replaces a file that has come meanwhile.
            false => fs::hard_link(&temporary, path),
        }
    });
    if placed.is_err() || !may_replace {
        let removed = fs::remove_file(&temporary);
        placed.and(removed)?;
    }
    fs::File::open(directory)?.sync_all()
}

fn print(args: &Verify, done: &Done) -> Result<()> {
    if args.output == Output::Json {
        return printer::json(&as_json(args, done));
    }
    if args.quiet {
        return Ok(());
    }
    printer::text(&human(args, done))
}

fn human(args: &Verify, done: &Done) -> String {
    let name = args.filename.to_string_lossy();
    let root = done.manifest.root();
    match &done.found {
        None => format!("Wrote {}: content {root}\n", manifest_path(args).display()),
        Some(found) if found.is_good() => format!("{name} is verified: content {root}\n"),
        Some(found) => {
            let mut text = String::new();
            for range in &found.bad {
                text += &format!("bytes {} to {} differ\n", range.start, range.end - 1);
            }
            let bytes: u64 = found.bad.iter().map(|range| range.end - range.start).sum();
            text + &format!("{name} differs from its manifest in {bytes} bytes\n")
        }
    }
}

fn as_json(args: &Verify, done: &Done) -> Value {
    let mut out = Map::new();
    let manifest = &done.manifest;
    out.insert("filename".to_owned(), json!(args.filename.to_string_lossy()));
    out.insert("manifest".to_owned(), json!(manifest_path(args).to_string_lossy()));
    out.insert("length".to_owned(), json!(manifest.len()));
    out.insert("root".to_owned(), json!(manifest.root().to_string()));
    if let Some(parent) = manifest.parent() {
        out.insert("parent".to_owned(), json!(parent.to_string()));
    }
    if !manifest.note().is_empty() {
        out.insert("note".to_owned(), json!(manifest.note()));
    }
    if let Some(found) = &done.found {
        let bad = |range: &std::ops::Range<u64>| json!({ "start": range.start, "length": range.end - range.start });
        out.insert("checked".to_owned(), json!(found.checked));
        out.insert("bad".to_owned(), found.bad.iter().map(bad).collect());
    }
    Value::Object(out)
}

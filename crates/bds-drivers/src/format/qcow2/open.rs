//! Opens an image: header, children, tables, and for writers the set of metadata clusters.
//!
//! Nothing is written here, whatever fails. What a writer must do first (clear autoclear bits)
//! waits for the first write.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU8, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::ArcSwap;
use bds_core::driver::{Child, OpenContext, OpenFlags, Reference, ReferenceKind, Role};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::BufPool;

use super::alloc::overlap::MetadataMap;
use super::bitmap::mark::BitmapsInMemory;
use super::config::{Config, RequestedMode, RequestedOptions};
use super::file_read::read_cluster0;
use super::io::backing::Backing;
use super::io::decompressed_cache::DecompressedCache;
use super::layout::cluster0::{Cluster0, Strictness};
use super::layout::header::{CryptMethod, Incompatible};
use super::live_rules::LiveRules;
use super::meta::budget::DirtyLevels;
use super::meta::tables::Tables;
use super::metadata_load::LoadedMetadata;
use super::nodes::MetaNode;
use super::srcu::Srcu;
use super::state::{Image, Meta};
use super::task::TaskCount;
use super::write_state::WriteState;

/// Idle buffers kept for decompression and copying.
const POOL_BYTES: usize = 4 << 20;

/// Opens an image.
pub(crate) async fn open(context: &mut OpenContext<'_>) -> Result<Image> {
    let node_name = context.node_name.to_owned();
    let flags = context.flags;
    let options = RequestedOptions::take(&mut context.options)?;
    let mut file = context.child("file", Role::DATA | Role::METADATA | Role::PRIMARY).await?;
    let opened = open_file(context, &node_name, flags, options, &mut file).await;
    let parts = opened.map_err(|error| {
        let error = error.node(&node_name);
        match file.filename() {
            Some(path) if error.kind() != ErrorKind::ReferenceRefused => error.file(path),
            _ => error,
        }
    })?;
    let image = parts.build(node_name, file);
    if image.serves_io {
        let cluster0 = Cluster0::clone(&image.cluster0.load());
        let writer = image.is_writable().then(|| image.writer(&image.config.load()));
        let loaded = LoadedMetadata::read(image.file.port(), cluster0, writer).await;
        image.install(loaded.map_err(|error| image.name_file(error))?);
    }
    Ok(image)
}

/// What opening finds out before the tables are read.
struct Parts {
    flags: OpenFlags,
    cluster0: Cluster0,
    config: Config,
    options: RequestedOptions,
    data_file: Option<Child>,
    backing: Option<Child>,
    named_backing: Option<String>,
    is_writable: bool,
}

async fn open_file(
    context: &mut OpenContext<'_>,
    node_name: &str,
    flags: OpenFlags,
    options: RequestedOptions,
    file: &mut Child,
) -> Result<Parts> {
    let mode = match flags.for_check || flags.info_only {
        true => Strictness::Inspect,
        false => Strictness::Use,
    };
    let cluster0 = read_cluster0(&**file, mode).await?;
    let is_writable = !flags.read_only && !flags.info_only && !flags.for_check;
    let is_inspected = mode == Strictness::Inspect;
    check_features(&cluster0, node_name, is_inspected, is_writable, file.len())?;
    let config = options.config_at_open(&cluster0, &flags)?;
    let is_named = cluster0.backing_name.is_some() && !context.options.contains("backing");
    let data_file = open_data_file(context, &cluster0, &flags).await?;
    let backing = match flags.info_only {
        // Named, and not opened.
        true => {
            context.options.take("backing");
            None
        }
        false => open_backing(context, &cluster0).await?,
    };
    if let (Some(data), Some(here)) = (&data_file, file.identity()) {
        let is_backing = backing.as_ref().and_then(|b| b.identity());
        if data.identity().is_some_and(|there| there == here || Some(there) == is_backing) {
            return Err(Error::new(
                ErrorKind::InvalidImage,
                "the data file is the image itself or its backing file",
            ));
        }
    }
    let named_backing = backing.as_ref().filter(|_| is_named).map(|b| b.node_name());
    Ok(Parts { flags, cluster0, config, options, data_file, backing, named_backing, is_writable })
}

/// Refuses what we must not or cannot use.
pub(crate) fn check_features(
    cluster0: &Cluster0,
    node_name: &str,
    is_inspected: bool,
    is_writable: bool,
    file_len: u64,
) -> Result<()> {
    let header = &cluster0.header;
    if header.crypt != CryptMethod::None && !is_inspected {
        let what = match header.crypt {
            CryptMethod::Luks => "LUKS",
            _ => "AES",
        };
        return Err(Error::new(
            ErrorKind::NotSupported,
            format!("the image is encrypted ({what}), which is not supported"),
        )
        .field("crypt_method", what)
        .at(32));
    }
    if header.incompatible.contains(Incompatible::CORRUPT) && !is_inspected {
        if is_writable {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                "the image is marked corrupt: open it read-only, or repair it with a check",
            )
            .at(72));
        }
        tracing::warn!(node = node_name, "qcow2: the image is marked corrupt");
    }
    if header.incompatible.contains(Incompatible::DIRTY) && is_writable {
        return Err(Error::new(
            ErrorKind::InvalidImage,
            "the image was not closed properly and its refcounts are not up to date: \
             repair it first (qemu-img check -r all), or open it read-only",
        )
        .field("incompatible_features", format!("{:#x}", header.incompatible.bits()))
        .at(72));
    }
    if is_writable {
        cluster0.check_writable(file_len)?;
    }
    Ok(())
}

async fn open_data_file(
    context: &mut OpenContext<'_>,
    cluster0: &Cluster0,
    flags: &OpenFlags,
) -> Result<Option<Child>> {
    if !cluster0.header.incompatible.contains(Incompatible::DATA_FILE) {
        if context.options.contains("data-file") {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "'data-file' was given, but the image keeps its data itself",
            ));
        }
        return Ok(None);
    }
    if flags.info_only {
        context.options.take("data-file");
        return Ok(None);
    }
    let reference = cluster0.extensions.data_file.as_deref().map(|name| Reference {
        kind: ReferenceKind::DataFile,
        stored_name: OsStr::from_bytes(name).to_owned(),
        stored_format: None,
    });
    let child = context.reference("data-file", Role::DATA, reference).await?;
    child.map(Some).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidImage,
            "the image needs an external data file and names none: give it as 'data-file'",
        )
    })
}

async fn open_backing(context: &mut OpenContext<'_>, cluster0: &Cluster0) -> Result<Option<Child>> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let reference = cluster0.backing_name.as_deref().map(|name| Reference {
        kind: ReferenceKind::Backing,
        stored_name: OsStr::from_bytes(name).to_owned(),
        stored_format: cluster0.extensions.backing_format.as_deref().map(text),
    });
    context.reference("backing", Role::COW, reference).await
}

impl Parts {
    fn build(self, node_name: String, file: Child) -> Image {
        let Self {
            flags,
            cluster0,
            config,
            options,
            data_file,
            backing,
            named_backing,
            is_writable,
        } = self;
        let header = &cluster0.header;
        let geometry = header.geometry;
        let rules = LiveRules::new(header, data_file.is_some());
        let meta = Meta::new(&cluster0, &config, Vec::new(), file.len());
        let decompressed =
            DecompressedCache::new(geometry.cluster_len(), config.decompressed_cache_bytes);
        let serves_io = !flags.info_only && !flags.for_check;
        Image {
            len: AtomicU64::new(header.size),
            tables: Tables::new(&geometry, config.slice_len),
            metadata: MetadataMap::new(&geometry),
            srcu: Arc::new(Srcu::default()),
            decompressed: Arc::new(decompressed),
            pool: BufPool::new(POOL_BYTES),
            zeros: OnceLock::new(),
            meta: Mutex::new(meta),
            levels: DirtyLevels::default(),
            write_back_lock: bds_io::sync::Mutex::new(()),
            release_lock: bds_io::sync::Mutex::new(()),
            tasks: Arc::new(TaskCount::default()),
            write_state: WriteState::new(is_writable),
            prepare_lock: bds_io::sync::Mutex::new(()),
            bitmaps: BitmapsInMemory::default(),
            broken: OnceLock::new(),
            is_sparse: AtomicU8::new(0),
            data_end: AtomicU64::new(0),
            serves_io,
            requested: Mutex::new(RequestedMode { options, flags }),
            node_name,
            file: MetaNode::new(file),
            data_file,
            backing: Backing::new(backing),
            named_backing,
            cluster0: ArcSwap::from_pointee(cluster0),
            rules,
            config: ArcSwap::from_pointee(config),
        }
    }
}

//! Refuses to write to a file that is read at the same time, comparing files by identity and not by
//! name.
//!
//! One file has many names: links, `/dev/fd/N`, two paths to one device, a loop device and its
//! file. Compared are (device, inode) of open files, and the files behind devices
//! ([`bds_io::shares_bytes`]). New images are checked by the library, between opening a file and
//! truncating it; here are the checks for files that exist already.

use std::path::Path;

use bds_core::graph::{Graph, NodeRef, walk};
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Fs, OpenOptions, shares_bytes};

/// Fails if a file of the output image `target`, opened read-only, belongs to a source or to one of
/// its own backing images.
pub(crate) fn refuse_read_files<'a>(
    target: &NodeRef,
    sources: impl IntoIterator<Item = &'a NodeRef>,
) -> Result<()> {
    refuse_own_backing(target)?;
    let written = walk::files_of_image(target);
    for source in sources {
        if shares(&written, &walk::files_of_chain(source)) {
            return Err(both(target, source));
        }
    }
    Ok(())
}

/// Fails if a file of an image opened for writing belongs to one of its backing images.
pub(crate) fn refuse_own_backing(image: &NodeRef) -> Result<()> {
    let below = walk::next_below(&walk::skip_filters(image));
    match below {
        Some(below) if shares(&walk::files_of_image(image), &walk::files_of_chain(&below)) => {
            Err(both(image, &below))
        }
        _ => Ok(()),
    }
}

/// Fails if the plain file at `path`, which is to be overwritten, belongs to an image of the graph.
pub(crate) fn refuse_image_file(graph: &Graph, path: &Path) -> Result<()> {
    let Ok(file) = Fs::Host.open(path, &OpenOptions::default()) else { return Ok(()) };
    let written: Vec<_> = file.identity().into_iter().collect();
    match graph.nodes().iter().find(|node| shares(&written, &walk::files_of_image(node))) {
        Some(_) => {
            let message =
                "is a file of the image itself: writing here would destroy it; name another file";
            Err(Error::new(ErrorKind::InvalidInput, message).file(path))
        }
        None => Ok(()),
    }
}

fn shares(written: &[(u64, u64)], read: &[(u64, u64)]) -> bool {
    written.iter().any(|one| read.iter().any(|other| shares_bytes(*one, *other)))
}

fn both(written: &NodeRef, read: &NodeRef) -> Error {
    let name = |node: &NodeRef| walk::filename(node).unwrap_or_default();
    let message = format!(
        "would be written while it is read as a part of '{}', and so be destroyed; name another output",
        name(read).display()
    );
    Error::new(ErrorKind::InvalidInput, message).file(name(written))
}

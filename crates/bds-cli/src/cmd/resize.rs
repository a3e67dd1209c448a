//! `resize`: changes the length of an image.

use bds_core::driver::{Prealloc, Truncate};
use bds_core::options::parse_size;
use bds_core::{Error, ErrorKind, Result};

use crate::args::Resize;
use crate::image;
use crate::image_spec::Spec;
use crate::printer;

/// A new size, absolute or relative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SizeChange {
    To(u64),
    Grow(u64),
    Shrink(u64),
}

impl SizeChange {
    fn parse(text: &str) -> Result<Self> {
        let (make, digits): (fn(u64) -> Self, &str) = match text.split_at_checked(1) {
            Some(("+", rest)) => (Self::Grow, rest),
            Some(("-", rest)) => (Self::Shrink, rest),
            _ => (Self::To, text),
        };
        parse_size(digits).map(make).ok_or_else(|| super::invalid_size("image size", text))
    }

    /// The new length of an image of `old` bytes.
    fn apply(self, old: u64) -> Result<u64> {
        let new = match self {
            Self::To(len) => Some(len),
            Self::Grow(more) => old.checked_add(more),
            Self::Shrink(less) => old.checked_sub(less),
        };
        new.filter(|len| *len > 0).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, "New image size must be positive")
                .field("old size", old)
        })
    }
}

pub(crate) fn run(args: &Resize) -> Result<()> {
    let size_change = SizeChange::parse(&args.size)?;
    let prealloc = Prealloc::parse(&args.preallocation).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            "Invalid preallocation mode: use off, metadata, falloc or full",
        )
        .field("preallocation", &args.preallocation)
    })?;
    let spec = Spec::read(&args.filename, &args.source)?.writable();
    image::block_on(async {
        let graph = image::trusting_graph();
        let node = image::open(&graph, &spec).await?;
        let backend = image::backend(&node, true)?;
        let old = backend.len();
        let len = size_change.apply(old)?;
        check_shrink(args, old, len, prealloc)?;
        let change = Truncate { len, exact: true, prealloc, zero_new: false };
        backend.truncate(change).await?;
        image::close(backend, node).await
    })?;
    if !args.quiet {
        printer::line("Image resized.")?;
    }
    Ok(())
}

fn check_shrink(args: &Resize, old: u64, new: u64, prealloc: Prealloc) -> Result<()> {
    if new >= old {
        return Ok(());
    }
    if prealloc != Prealloc::Off {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Preallocation can only be used for growing images",
        ));
    }
    if args.shrink {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        "Use the --shrink option to perform a shrink operation.\nShrinking an image will delete all \
         data beyond the shrunken image's end. Before performing such an operation, make sure there is \
         no important data there.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative() {
        for (text, old, new) in [
            ("2G", 1 << 30, Some(2 << 30)),
            ("+1k", 1024, Some(2048)),
            ("-512", 1024, Some(512)),
            ("-1024", 1024, None),
            ("-2k", 1024, None),
            ("+8E", 1 << 63, None),
            ("0", 1024, None),
        ] {
            assert_eq!(SizeChange::parse(text).unwrap().apply(old).ok(), new, "{text}");
        }
        for text in ["", "+", "ten", "--1", "1q", "+-1"] {
            assert!(SizeChange::parse(text).is_err(), "{text}");
        }
    }
}

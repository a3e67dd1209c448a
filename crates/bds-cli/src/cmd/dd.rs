//! `dd`: copies a range of blocks of an image into a new image.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use bds_core::copy::{self, CopyOptions, CopySource};
use bds_core::driver::OpenFlags;
use bds_core::{Error, ErrorKind, Options, Result};
use bds_io::{Context, ContextOptions};
use serde_json::json;

use crate::args::Dd;
use crate::cmd::create;
use crate::image;
use crate::image_spec::Spec;
use crate::interrupt::Interrupt;

/// The parsed operands.
#[derive(Debug, Default, PartialEq, Eq)]
struct Operands {
    input: OsString,
    output: OsString,
    block_len: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(words: &[OsString]) -> Result<Self> {
        let mut found = Self { block_len: 512, ..Self::default() };
        for word in words {
            let bytes = word.as_bytes();
            let Some(key_len) = bytes.iter().position(|byte| *byte == b'=') else {
                return Err(unknown(word));
            };
            let value = OsStr::from_bytes(&bytes[key_len + 1..]);
            let number = value.to_string_lossy();
            match &bytes[..key_len] {
                b"if" => value.clone_into(&mut found.input),
                b"of" => value.clone_into(&mut found.output),
                b"bs" => found.block_len = super::size("block size", &number)?,
                b"count" => found.count = Some(super::size("count", &number)?),
                b"skip" => found.skip = super::size("skip", &number)?,
                _ => return Err(unknown(word)),
            }
        }
        if found.input.is_empty() || found.output.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "Must specify both input and output file names: if=… of=…",
            ));
        }
        if found.block_len == 0 || found.block_len > 1 << 31 {
            return Err(Error::new(ErrorKind::InvalidInput, "bs must be between 1 and 2G"));
        }
        Ok(found)
    }

    /// Returns the offset and length of the bytes to copy from an input of `len` bytes.
    fn range(&self, len: u64) -> (u64, u64) {
        let offset = self.skip.saturating_mul(self.block_len).min(len);
        let wanted = self.count.map_or(u64::MAX, |count| count.saturating_mul(self.block_len));
        // `count` is counted from the start of the input, as in qemu-img.
        (offset, wanted.min(len).saturating_sub(offset))
    }
}

fn unknown(word: &OsStr) -> Error {
    Error::new(ErrorKind::InvalidInput, "unrecognized operand: use if=, of=, bs=, count=, skip=")
        .field("operand", word.display())
}

pub(crate) fn run(args: &Dd) -> Result<()> {
    let operands = Operands::parse(&args.operands)?;
    let mut spec = Spec::read(&operands.input, &args.source)?;
    spec.flags.refuse_writers = !spec.flags.force_share;
    let context =
        Context::new(ContextOptions::default()).map_err(|e| Error::io(e, "cannot start"))?;
    context.block_on(copy_range(&spec, &operands, args))
}

async fn copy_range(spec: &Spec<'_>, operands: &Operands, args: &Dd) -> Result<()> {
    let format = create::stored_format(&args.output_format);
    let interrupt = Interrupt::watch()?;
    let graph = image::trusting_graph();
    let source = interrupt.run_or_drop(image::open(&graph, spec)).await?;
    let (offset, len) = operands.range(source.len());
    // A range of the source is opened as a raw node with an offset.
    let window = json!({"driver": "raw", "file": source.name(), "offset": offset, "size": len});
    let is_whole = offset == 0 && len == source.len();
    let part = if is_whole {
        source.clone()
    } else {
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        graph.open_with(Options::from_json(window)?, flags).await?
    };
    let output = &operands.output;
    let path = create::path(output)?;
    let options = Options::new().with("size", len);
    let mut partial = create::partial(path.clone(), &options, args.keep_partial);
    interrupt.run_or_drop(create::create(&graph, format, path, options, false)).await?;
    partial.set_created();
    let flags = OpenFlags { discard: true, ..OpenFlags::default() };
    let target = Spec { name: output, is_options: false, format: Some(format), flags };
    let target = image::open(&graph, &target).await?;
    let backend = image::backend(&target, true)?;
    let reader = Arc::new(image::backend(&part, false)?);
    let target_is_zero = !image::shows_old_bytes(&target);
    let options =
        CopyOptions { target_is_zero, cancel: Some(interrupt.flag()), ..CopyOptions::default() };
    let copied = copy::copy(&[CopySource::from(reader)], &backend, &options).await;
    let closed = image::close(backend, target).await;
    drop((part, source));
    if let Err(error) = copied.map(drop).and(closed) {
        let cause = crate::report::message(&error);
        let message = format!("{cause}; the output is incomplete; {}", partial.discard());
        return Err(Error::new(error.kind(), message));
    }
    partial.complete();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Operands> {
        Operands::parse(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn operands_select_a_range() {
        for (words, len, range) in [
            (vec![], 1000, (0, 1000)),
            (vec!["count=1"], 1000, (0, 512)),
            (vec!["bs=100", "skip=3"], 1000, (300, 700)),
            (vec!["bs=100", "skip=3", "count=5"], 1000, (300, 200)),
            (vec!["bs=100", "skip=11"], 1000, (1000, 0)),
            (vec!["bs=1G", "count=16E"], 1000, (0, 1000)),
        ] {
            let all = [vec!["if=a", "of=b"], words.clone()].concat();
            let operands = parse(&all);
            match operands {
                Ok(operands) => assert_eq!(operands.range(len), range, "{words:?}"),
                Err(_) => assert!(words.contains(&"count=16E"), "{words:?}"),
            }
        }
    }

    #[test]
    fn wrong_operands_are_named() {
        for words in
            [vec!["if=a"], vec!["if=a", "of=b", "bs=0"], vec!["if=a", "of=b", "zz=1"], vec!["x"]]
        {
            assert!(parse(&words).is_err(), "{words:?}");
        }
    }
}

//! The `raw` format: passes the bytes of its file through, or shows a window of them.
//!
//! Without options raw is a filter: length, limits, status and every flag pass through. With
//! `offset` or `size` (bytes) it is a format that shows a part of its file. A fixed `size` cannot
//! be resized. A reopen may move a window, but a filter stays a filter: its edge has a filter's
//! role. Persistent dirty bitmaps are kept in a file beside the image (`bitmaps`).
//!
//! Invariant: no request leaves the window. Odd lengths stay odd; nothing is rounded up to a
//! sector.

mod bitmaps;

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};

use bds_core::driver::{
    Attempt, BitmapStore, BoxFuture, Category, Child, CreateContext, CreateFacts, Driver,
    DriverType, HostMap, ImageInfo, Limits, MeasureReport, MeasureSource, OpenContext, Prealloc,
    Precision, ReadFlags, Reopen, ReopenContext, Role, StatusFlags, StatusRun, Truncate,
    WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;
use serde_json::Value;

use self::bitmaps::RawBitmaps;
use crate::format::bitmap_sidecar::SidecarOption;

/// The `raw` format. Errors: `InvalidInput` if the window reaches past the file's end,
/// `NotSupported` for a resize with a fixed size.
#[derive(Clone, Copy, Debug)]
pub struct Raw;

const OPEN_OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "file",
        kind: OptionKind::Child,
        help: "the node that holds the bytes",
        default: None,
    },
    OptionSpec {
        name: "offset",
        kind: OptionKind::Size,
        help: "offset in the disk where the image starts",
        default: Some("0"),
    },
    OptionSpec { name: "size", kind: OptionKind::Size, help: "virtual disk size", default: None },
    OptionSpec {
        name: BITMAP_FILE,
        kind: OptionKind::String,
        help: "file of the persistent bitmaps: auto (the image's name and .bds-cbt, for an image that is all of a file), off, or a name",
        default: Some("auto"),
    },
];

const BITMAP_FILE: &str = "bitmap-file";

const CREATE_OPTIONS: &[OptionSpec] = &[
    OptionSpec { name: "size", kind: OptionKind::Size, help: "Virtual disk size", default: None },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::Choice(&["off", "falloc", "full"]),
        help: "Preallocation mode (allowed values: off, falloc, full)",
        default: Some("off"),
    },
];

/// Which part of the file is shown.
#[derive(Clone, Copy)]
struct Window {
    offset: u64,
    /// Fixed length, if the user gave one.
    size: Option<u64>,
}

impl Window {
    const ALL: Self = Self { offset: 0, size: None };

    /// Takes options; an option that is missing keeps its value, `size` null removes the fixed
    /// length.
    fn take(self, options: &mut Options) -> Result<Self> {
        let offset = options.take_size("offset")?.unwrap_or(self.offset);
        if options.peek("size").is_some_and(Value::is_null) {
            options.take("size");
            return Ok(Self { offset, size: None });
        }
        let size = options.take_size("size")?.or(self.size);
        Ok(Self { offset, size })
    }

    fn is_part(self) -> bool {
        self.offset != 0 || self.size.is_some()
    }

    fn check(self, file_len: u64) -> Result<()> {
        check_window(self.offset, self.size, file_len)
    }
}

/// Stored instead of a fixed size if there is none. No file is this long.
const NO_SIZE: u64 = u64::MAX;

struct RawNode {
    node_name: String,
    file: Child,
    is_window: bool,
    bitmap_option: SidecarOption,
    bitmaps: Option<RawBitmaps>,
    // Changed by a reopen, while no request is in flight.
    offset: AtomicU64,
    size: AtomicU64,
}

struct PreparedWindow<'a>(&'a RawNode, Window);

impl Reopen for PreparedWindow<'_> {
    fn commit(self: Box<Self>) {
        let Self(node, window) = *self;
        node.offset.store(window.offset, Ordering::Release);
        node.size.store(window.size.unwrap_or(NO_SIZE), Ordering::Release);
    }
}

impl RawNode {
    #[inline]
    fn window(&self) -> Window {
        let size = self.size.load(Ordering::Acquire);
        let offset = self.offset.load(Ordering::Acquire);
        Window { offset, size: (size != NO_SIZE).then_some(size) }
    }

    fn prepare(&self, context: &mut ReopenContext<'_>) -> Result<PreparedWindow<'_>> {
        if context.options.contains(BITMAP_FILE) {
            let text = context.options.take_str(BITMAP_FILE)?;
            if SidecarOption::parse(BITMAP_FILE, text)? != self.bitmap_option {
                let words = "option 'bitmap-file' cannot change while the image is open";
                return Err(Error::new(ErrorKind::NotSupported, words));
            }
        }
        let window = self.window().take(&mut context.options)?;
        if window.is_part() != self.is_window {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "a raw node that shows all of its file is a filter, one with 'offset' or 'size' is \
                 not, and neither becomes the other while it is open",
            ));
        }
        window.check(self.file.len())?;
        Ok(PreparedWindow(self, window))
    }

    /// Offset in the file of `offset..offset + len`. A range past a fixed size is an error of kind
    /// `beyond`.
    fn place(&self, offset: u64, len: u64, beyond: ErrorKind) -> Result<u64> {
        let end = offset.checked_add(len);
        let window = self.window();
        if let Some(size) = window.size
            && end.is_none_or(|end| end > size)
        {
            return Err(Error::new(beyond, "the request reaches past the option 'size'")
                .field("size", size)
                .at(offset));
        }
        end.and_then(|end| end.checked_add(window.offset))
            .map(|_| offset + window.offset)
            .ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, "the request is out of reach").at(offset)
            })
    }
}

/// Wraps an error into a ready future.
fn refuse<'a, T: Send + 'a>(error: Error) -> BoxFuture<'a, Result<T>> {
    Box::pin(async move { Err(error) })
}

impl Driver for RawNode {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn len(&self) -> u64 {
        let Window { offset, size } = self.window();
        size.unwrap_or_else(|| self.file.len().saturating_sub(offset))
    }

    fn limits(&self) -> Limits {
        let below = self.file.limits();
        if self.window().offset == 0 {
            return Limits { request_alignment: 1, ..below };
        }
        // A shifted window does not keep the file's units; the request path of the file node widens
        // what needs it.
        Limits {
            request_alignment: 1,
            zero_alignment: 1,
            discard_alignment: 1,
            opt_transfer: 0,
            ..below
        }
    }

    fn is_filter(&self) -> bool {
        !self.is_window
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::all()
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::all())
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let at = self.place(offset, iov.len() as u64, ErrorKind::InvalidInput).ok()?;
        self.file.try_read(at, iov)
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let at = self.place(offset, iov.len() as u64, ErrorKind::NoSpace).ok()?;
        self.file.try_write(at, iov)
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        match self.place(offset, iov.len() as u64, ErrorKind::InvalidInput) {
            Ok(at) => self.file.read(at, iov, flags),
            Err(e) => refuse(e),
        }
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        match self.place(offset, iov.len() as u64, ErrorKind::NoSpace) {
            Ok(at) => self.file.write(at, iov, flags),
            Err(e) => refuse(e),
        }
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        match self.place(offset, len, ErrorKind::NoSpace) {
            Ok(at) => self.file.write_zeroes(at, len, flags),
            Err(e) => refuse(e),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        match self.place(offset, len, ErrorKind::InvalidInput) {
            Ok(at) => Box::pin(async move {
                self.file.discard(at, len).await?;
                Ok(Attempt::Done)
            }),
            Err(e) => refuse(e),
        }
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let end = self.len();
        let run = if offset >= end {
            StatusRun { len: 0, flags: StatusFlags::EOF, map: None }
        } else {
            let len = len.min(end - offset);
            let at_end = if offset + len == end { StatusFlags::EOF } else { StatusFlags::empty() };
            // The window was checked at open, so the sum cannot overflow.
            let map = HostMap { child: "file", offset: offset + self.window().offset };
            StatusRun { len, flags: StatusFlags::RAW | at_end, map: Some(map) }
        };
        Box::pin(async move { Ok(run) })
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        let window = self.window();
        if window.size.is_some() {
            return refuse(Error::new(
                ErrorKind::NotSupported,
                "cannot resize a raw image that has a fixed size; remove the option 'size'",
            ));
        }
        match change.len.checked_add(window.offset) {
            Some(len) => self.file.truncate(Truncate { len, ..change }),
            None => refuse(
                Error::new(ErrorKind::InvalidInput, "disk size too large for the given offset")
                    .field("size", change.len),
            ),
        }
    }

    fn info(&self) -> BoxFuture<'_, Result<ImageInfo>> {
        Box::pin(async {
            let logged_bitmaps = self.logged_bitmaps().await?;
            Ok(ImageInfo { logged_bitmaps, ..ImageInfo::default() })
        })
    }

    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        self.bitmaps.is_some().then_some(self as &dyn BitmapStore)
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        self.file.allocated_len()
    }

    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        let prepared = self.prepare(context).map_err(|e| e.node(&self.node_name));
        Box::pin(async { prepared.map(|moved| Box::new(moved) as Box<dyn Reopen>) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DriverType for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn category(&self) -> Category {
        Category::Format
    }

    fn help(&self) -> &'static str {
        "the bytes of a file as they are, or a window of them"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let window = Window::ALL.take(&mut context.options)?;
            let bitmap_option =
                SidecarOption::parse(BITMAP_FILE, context.options.take_str(BITMAP_FILE)?)?;
            let is_window = window.is_part();
            let content = if is_window { Role::DATA } else { Role::FILTERED };
            let file = context.child("file", content | Role::PRIMARY).await?;
            window.check(file.len()).map_err(|e| e.node(context.node_name))?;
            let is_host = matches!(file.driver_name(), "file" | "host_device");
            let image = file.filename().filter(|_| is_host);
            let len = window.size.unwrap_or_else(|| file.len().saturating_sub(window.offset));
            let bitmaps = RawBitmaps::new(context, &bitmap_option, image, is_window, len);
            Ok(Box::new(RawNode {
                node_name: context.node_name.to_owned(),
                file,
                is_window,
                bitmap_option,
                bitmaps,
                offset: AtomicU64::new(window.offset),
                size: AtomicU64::new(window.size.unwrap_or(NO_SIZE)),
            }) as Box<dyn Driver>)
        })
    }

    /// Any content may be raw, so this is the lowest score: it wins only if no other driver
    /// recognises the image.
    fn probe(&self, _head: &[u8], _file_len: u64) -> u8 {
        1
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        CREATE_OPTIONS
    }

    fn create<'a>(&'a self, context: CreateContext<'a>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let (size, prealloc) = take_create_options(context.options)?;
            context
                .file
                .truncate(Truncate { len: size, exact: false, prealloc, zero_new: false })
                .await
        })
    }

    fn check_create(
        &self,
        options: &mut Options,
        _backing_len: Option<u64>,
    ) -> Result<CreateFacts> {
        let (size, _) = take_create_options(options)?;
        Ok(CreateFacts { len: size, min_file_len: size, compressed_unit: None })
    }

    fn measure(&self, options: &mut Options, source: &MeasureSource) -> Result<MeasureReport> {
        parse_prealloc(options)?;
        let size = options.take_size("size")?.unwrap_or(source.virtual_len);
        let size = size.checked_next_multiple_of(512).ok_or_else(|| {
            Error::new(ErrorKind::LimitExceeded, "the image is too large").field("size", size)
        })?;
        Ok(MeasureReport { required: size, fully_allocated: size, bitmaps: None })
    }
}

fn check_window(offset: u64, size: Option<u64>, file_len: u64) -> Result<()> {
    if offset > file_len {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("option 'offset' lies past the end of the file, which has {file_len} bytes"),
        )
        .field("offset", offset));
    }
    match size {
        Some(size) if size > file_len - offset => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("options 'offset' and 'size' reach past the end of the file, which has {file_len} bytes"),
        )
        .field("size", size)),
        _ => Ok(()),
    }
}

/// Length and preallocation of a new image. A file is no longer than the kernel's offsets reach.
fn take_create_options(options: &mut Options) -> Result<(u64, Prealloc)> {
    let size = options.take_size("size")?.ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, "option 'size' is missing: say how large")
    })?;
    if i64::try_from(size).is_err() {
        let words = "the image is too large: a file has at most 2^63 - 1 bytes";
        return Err(Error::new(ErrorKind::LimitExceeded, words).field("size", size));
    }
    Ok((size, parse_prealloc(options)?))
}

fn parse_prealloc(options: &mut Options) -> Result<Prealloc> {
    match options.take_str("preallocation")? {
        None => Ok(Prealloc::Off),
        Some(word) => match Prealloc::parse(&word) {
            Some(mode) if mode != Prealloc::Metadata => Ok(mode),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                "option 'preallocation' must be off, falloc or full for raw images",
            )
            .field("preallocation", word)),
        },
    }
}

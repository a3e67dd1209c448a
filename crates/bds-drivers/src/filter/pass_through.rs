//! Macros for the parts that all filters share: passing calls on to the child, and `DriverType`.
//!
//! Each filter writes out only what it changes, so that its `impl Driver` shows its purpose.

use bds_core::driver::{Child, HostMap, StatusFlags, StatusRun};

/// Used inside `impl Driver`: each method named does what the child does, as in `pass_on!(self.file
/// => len, read);`.
macro_rules! pass_on {
    ($this:ident.$($child:tt).+ => $($method:ident),+ $(,)?) => {
        pass_on!(@each $this ($this.$($child).+) $($method)+);
    };
    (@each $this:ident $child:tt $($method:ident)+) => { $(pass_on!(@$method $this $child);)+ };

    // Arguments and result of each method: returned at once (`@same`), or as a future of a result
    // (`@late`).
    (@len $($at:tt)+) => { pass_on!(@same $($at)+ len() -> u64); };
    (@compressed_unit $($at:tt)+) => { pass_on!(@same $($at)+ compressed_unit() -> Option<u32>); };
    (@try_read $($at:tt)+) => {
        pass_on!(@same $($at)+ try_read(offset: u64, iov: &bds_io::IoVec)
            -> Option<bds_core::Result<()>>);
    };
    (@try_write $($at:tt)+) => {
        pass_on!(@same $($at)+ try_write(offset: u64, iov: &bds_io::IoVec)
            -> Option<bds_core::Result<()>>);
    };
    (@read $($at:tt)+) => {
        pass_on!(@late $($at)+
            read(offset: u64, iov: bds_io::IoVec, flags: bds_core::driver::ReadFlags) -> ());
    };
    (@write $($at:tt)+) => {
        pass_on!(@late $($at)+
            write(offset: u64, iov: bds_io::IoVec, flags: bds_core::driver::WriteFlags) -> ());
    };
    (@write_compressed $($at:tt)+) => {
        pass_on!(@late $($at)+ write_compressed(offset: u64, iov: bds_io::IoVec) -> ());
    };
    (@write_zeroes $($at:tt)+) => {
        pass_on!(@late $($at)+
            write_zeroes(offset: u64, len: u64, flags: bds_core::driver::ZeroFlags)
            -> bds_core::driver::Attempt);
    };
    (@truncate $($at:tt)+) => {
        pass_on!(@late $($at)+ truncate(change: bds_core::driver::Truncate) -> ());
    };
    (@allocated_len $($at:tt)+) => { pass_on!(@late $($at)+ allocated_len() -> Option<u64>); };

    // Where the filter's answer is not the child's: any flag is honoured by passing it on, and any
    // request is accepted, because the request path of the child adapts what does not fit.
    (@is_filter $($at:tt)+) => {
        fn is_filter(&self) -> bool {
            true
        }
    };
    (@write_flags $($at:tt)+) => {
        fn write_flags(&self) -> bds_core::driver::WriteFlags {
            bds_core::driver::WriteFlags::all()
        }
    };
    (@zero_flags $($at:tt)+) => {
        fn zero_flags(&self) -> Option<bds_core::driver::ZeroFlags> {
            Some(bds_core::driver::ZeroFlags::all())
        }
    };
    (@limits $this:ident $child:tt) => {
        fn limits(&$this) -> bds_core::driver::Limits {
            bds_core::driver::Limits { request_alignment: 1, ..$child.limits() }
        }
    };
    (@discard $this:ident $child:tt) => {
        fn discard(
            &$this,
            offset: u64,
            len: u64,
        ) -> bds_core::driver::BoxFuture<'_, bds_core::Result<bds_core::driver::Attempt>> {
            Box::pin(async move {
                $child.discard(offset, len).await?;
                Ok(bds_core::driver::Attempt::Done)
            })
        }
    };
    (@block_status $this:ident $child:tt) => {
        fn block_status(
            &$this,
            offset: u64,
            len: u64,
            _precision: bds_core::driver::Precision,
        ) -> bds_core::driver::BoxFuture<'_, bds_core::Result<bds_core::driver::StatusRun>> {
            let run = $crate::filter::pass_through::status(&$child, $this.len(), offset, len);
            Box::pin(async move { Ok(run) })
        }
    };

    (@late $this:ident $child:tt $method:ident($($name:ident: $kind:ty),*) -> $answer:ty) => {
        pass_on!(@same $this $child $method($($name: $kind),*)
            -> bds_core::driver::BoxFuture<'_, bds_core::Result<$answer>>);
    };
    (@same $this:ident $child:tt $method:ident($($name:ident: $kind:ty),*) -> $answer:ty) => {
        fn $method(&$this, $($name: $kind),*) -> $answer {
            $child.$method($($name),*)
        }
    };
}

/// Implements `DriverType` for a filter with the options `OPEN_OPTIONS`; `open_node` of the type
/// makes the node, which is boxed here.
macro_rules! filter_type {
    ($type:ty, $name:literal, $help:literal) => {
        impl bds_core::driver::DriverType for $type {
            fn name(&self) -> &'static str {
                $name
            }

            fn category(&self) -> bds_core::driver::Category {
                bds_core::driver::Category::Filter
            }

            fn help(&self) -> &'static str {
                $help
            }

            fn open_options(&self) -> &'static [bds_core::options::OptionSpec] {
                OPEN_OPTIONS
            }

            fn open<'a>(
                &'a self,
                context: &'a mut bds_core::driver::OpenContext<'_>,
            ) -> bds_core::driver::BoxFuture<'a, bds_core::Result<Box<dyn bds_core::driver::Driver>>> {
                Box::pin(async move {
                    let node = self.open_node(context).await?;
                    Ok(Box::new(node) as Box<dyn bds_core::driver::Driver>)
                })
            }
        }
    };
}

pub(super) use {filter_type, pass_on};

/// The status that a filter of length `end` returns: the child's.
pub(super) fn status(child: &Child, end: u64, offset: u64, len: u64) -> StatusRun {
    if offset >= end {
        return StatusRun { len: 0, flags: StatusFlags::EOF, map: None };
    }
    let map = Some(HostMap { child: child.name(), offset });
    StatusRun { len: len.min(end - offset), flags: StatusFlags::RAW, map }
}

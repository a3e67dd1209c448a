//! Kinds of image: options of create and open, filters, content before a workload, and the model of
//! it.

use bds_testkit::{DiskModel, Op, Shape, Step, Workload, pattern};
use serde_json::{Value, json};

/// The seed of the bytes in backing files.
pub(super) const BASE_STAMP: u64 = 0xba5e;

/// A kind of image.
#[derive(Clone, Debug)]
pub(crate) struct ImageKind {
    pub(crate) name: &'static str,
    pub(crate) format: &'static str,
    /// Options of create beside size and names.
    pub(crate) create: Value,
    /// Options of open beside the file.
    pub(crate) open: Value,
    /// A filter above the image when it is open for writing: its options beside `file`.
    pub(crate) above: Option<Value>,
    /// A filter between the image and its file, likewise.
    pub(crate) beneath: Option<Value>,
    pub(crate) cluster: u64,
    /// Zero writes of whole units are metadata.
    pub(crate) zero_unit: Option<u64>,
    pub(crate) len: u64,
    pub(crate) max_len: u64,
    pub(crate) backing_len: Option<u64>,
    pub(crate) has_data_file: bool,
    pub(crate) has_compression: bool,
    /// Bytes of unflushed writes to new places may be stale after a cut: links into a data file do
    /// not wait for their bytes.
    pub(crate) may_be_stale: bool,
    /// After a cut the dirty bit may say that refcounts are wrong.
    pub(crate) is_lazy: bool,
    /// Bytes at the end of the disk that are written before the workload, so that the image's
    /// tables are nearly full.
    pub(crate) fill: u64,
    /// They are written cluster by cluster, so that neighbours on the disk are not neighbours in
    /// the file.
    pub(crate) is_in_pieces: bool,
    /// The workload grows the disk by so many bytes at its end, and writes there.
    pub(crate) grows_by: Option<u64>,
}

impl ImageKind {
    /// A qcow2 image with clusters of `cluster` bytes.
    pub(crate) fn qcow2(name: &'static str, cluster: u64) -> ImageKind {
        ImageKind {
            name,
            format: "qcow2",
            create: json!({"cluster_size": cluster}),
            open: json!({}),
            above: None,
            beneath: None,
            cluster,
            zero_unit: Some(cluster),
            len: cluster * 96,
            max_len: cluster * 128,
            backing_len: None,
            has_data_file: false,
            has_compression: true,
            may_be_stale: false,
            is_lazy: false,
            fill: 0,
            is_in_pieces: false,
            grows_by: None,
        }
    }

    pub(crate) fn raw(name: &'static str) -> ImageKind {
        ImageKind {
            format: "raw",
            create: json!({}),
            has_compression: false,
            zero_unit: None,
            ..ImageKind::qcow2(name, 4096)
        }
    }

    /// Adds an option of create.
    pub(crate) fn create(mut self, key: &str, value: impl Into<Value>) -> ImageKind {
        self.create[key] = value.into();
        self
    }

    /// Adds an option of open.
    pub(crate) fn open(mut self, key: &str, value: impl Into<Value>) -> ImageKind {
        self.open[key] = value.into();
        self
    }

    /// Writes and reads through a filter; the workload reads too.
    pub(crate) fn through(self, filter: Value) -> ImageKind {
        ImageKind { above: Some(filter), ..self }
    }

    /// Writes the image's file through a filter.
    pub(crate) fn upon(self, filter: Value) -> ImageKind {
        ImageKind { beneath: Some(filter), ..self }
    }

    /// New clusters become visible only with their data: no stale bytes are ever seen.
    pub(crate) fn strict(self) -> ImageKind {
        ImageKind { may_be_stale: false, ..self.open("data-before-metadata", true) }
    }

    pub(crate) fn version_2(self) -> ImageKind {
        ImageKind { zero_unit: None, ..self.create("compat", "0.10") }
    }

    pub(crate) fn extended(self) -> ImageKind {
        let zero_unit = Some(self.cluster / 32);
        ImageKind { zero_unit, ..self.create("extended_l2", true) }
    }

    pub(crate) fn lazy(self) -> ImageKind {
        ImageKind { is_lazy: true, ..self.create("lazy_refcounts", true) }
    }

    /// Adds a backing file of this length.
    pub(crate) fn backed(self, len: u64) -> ImageKind {
        ImageKind { backing_len: Some(len), ..self }
    }

    pub(crate) fn with_data_file(self) -> ImageKind {
        ImageKind { has_data_file: true, has_compression: false, may_be_stale: true, ..self }
    }

    pub(crate) fn sized(self, len: u64, max_len: u64) -> ImageKind {
        ImageKind { len, max_len, ..self }
    }

    /// Writes so many bytes at the end of the disk before the workload.
    pub(crate) fn filled(self, fill: u64) -> ImageKind {
        ImageKind { fill, ..self }
    }

    /// The same in an order that leaves every cluster in a run of its own.
    pub(crate) fn filled_in_pieces(self, fill: u64) -> ImageKind {
        ImageKind { fill, is_in_pieces: true, ..self }
    }

    /// Workloads end with growth by so many bytes, a write there and a flush.
    pub(crate) fn growing(self, by: u64) -> ImageKind {
        ImageKind { grows_by: Some(by), ..self }
    }

    /// The workload of this seed: `steps` random ones, and those that this kind requires.
    pub(crate) fn workload(&self, seed: u64, steps: usize) -> Workload {
        let mut workload = Workload::new(seed, &self.shape(steps));
        let Some(by) = self.grows_by else { return workload };
        let grown = workload.steps.iter().fold(self.len, |len, step| match step {
            Step::Requests(ops) => ops.iter().fold(len, |len, op| match op {
                Op::Grow { len } => *len,
                _ => len,
            }),
            Step::Reopen => len,
        });
        let len = grown + by;
        assert!(len <= self.max_len, "{}: it grows too far", self.name);
        let count = usize::try_from(self.cluster * 5).expect("small");
        let end = Op::Write { at: grown, bytes: pattern(!seed, grown, count).into(), fua: false };
        workload
            .steps
            .extend([vec![Op::Grow { len }], vec![end], vec![Op::Flush]].map(Step::Requests));
        workload
    }

    /// Parameters of workloads.
    pub(crate) fn shape(&self, steps: usize) -> Shape {
        Shape {
            len: self.len,
            max_len: self.max_len,
            cluster: self.cluster,
            steps,
            hot_len: self.cluster * 6,
            max_write: (self.cluster * 12).min(256 << 10),
            has_compression: self.has_compression,
            reopens: false,
            batches: true,
            reads: self.above.is_some(),
        }
    }

    /// The model of the image before a workload.
    pub(crate) fn model(&self) -> DiskModel {
        let mut base = match self.backing_len {
            Some(len) => pattern(BASE_STAMP, 0, usize::try_from(len).expect("small")),
            None => Vec::new(),
        };
        if self.fill > 0 {
            base.resize(usize::try_from(self.len).expect("small"), 0);
            let start = self.len - self.fill;
            let fill = usize::try_from(self.fill).expect("small");
            let at = base.len() - fill;
            base[at..].copy_from_slice(&pattern(BASE_STAMP + 1, start, fill));
        }
        let mut model = DiskModel::new(self.len, self.max_len, &base);
        if let Some(unit) = self.zero_unit {
            model.zeroes_by(unit);
        }
        if self.may_be_stale {
            model.expect_stale();
        }
        model
    }
}

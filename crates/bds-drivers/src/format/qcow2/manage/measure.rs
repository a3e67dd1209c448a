//! Measures how large an image would be: the same plan as [`create`](super::create), without a
//! file.
//!
//! Numbers agree with `qemu-img measure`: whole clusters, refcounts planned for the fully written
//! image in both answers.

use bds_core::driver::{BitmapSpec, MeasureReport, MeasureSource, Prealloc};
use bds_core::error::{Error, ErrorKind, Result};
use bds_core::options::Options;

use super::create_layout::Layout;
use super::create_options::CreateOptions;
use crate::format::qcow2::layout::bitmap_directory::{
    check_count, check_directory_len, entry_len, table_size,
};

/// Answers for an image made with `options` that has to hold `source`.
pub(crate) fn measure(options: &mut Options, source: &MeasureSource) -> Result<MeasureReport> {
    let plan = CreateOptions::take(options)?;
    let geometry = plan.geometry;
    let too_large = || {
        Error::new(
            ErrorKind::LimitExceeded,
            "the image size is too large (try using a larger cluster size)",
        )
        .field("size", source.virtual_len)
    };
    let virtual_len = geometry.cluster_ceil(source.virtual_len).ok_or_else(too_large)?;
    let layout = Layout::plan(&geometry, virtual_len, true, true).map_err(|_| too_large())?;
    let cluster = geometry.cluster_size();
    let fully_allocated = layout.clusters * cluster;
    let written = match (&source.data, plan.prealloc) {
        (_, Prealloc::Falloc | Prealloc::Full) => virtual_len,
        (None, _) => virtual_len,
        (Some(ranges), _) => {
            // Ranges may share a cluster: count each once.
            let (mut clusters, mut counted_to) = (0, 0);
            for range in ranges.iter().filter(|r| r.start < r.end) {
                let first = geometry.cluster_index(range.start).max(counted_to);
                let end = geometry.clusters(range.end.min(virtual_len));
                clusters += end.saturating_sub(first);
                counted_to = counted_to.max(end);
            }
            clusters * cluster
        }
    };
    let required = fully_allocated - virtual_len + written.min(virtual_len);
    Ok(MeasureReport { required, fully_allocated, bitmaps: None })
}

/// Bytes for bitmaps that are not clean: clusters of bits and a table each, and the directory.
/// `None`: version 2 has none.
pub(crate) fn measure_bitmaps(options: &Options, bitmaps: &[BitmapSpec]) -> Result<Option<u64>> {
    let plan = CreateOptions::take(&mut options.clone())?;
    if plan.version < 3 {
        return Ok(None);
    }
    let geometry = plan.geometry;
    let mut clusters = 0;
    let mut directory_len = 0;
    for bitmap in bitmaps {
        let table_size = u64::from(table_size(&geometry, bitmap.len, bitmap.granularity)?);
        clusters += table_size + geometry.clusters(table_size * 8);
        directory_len += entry_len(bitmap.name.len());
    }
    check_count(bitmaps.len())?;
    check_directory_len(directory_len)?;
    Ok(Some((clusters + geometry.clusters(directory_len)) << geometry.cluster_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(
        options: &[(&str, &str)],
        len: u64,
        data: Option<Vec<std::ops::Range<u64>>>,
    ) -> (u64, u64) {
        let mut tree = Options::new();
        for (key, value) in options {
            tree.set(key, *value);
        }
        let source = MeasureSource { virtual_len: len, data };
        let report = measure(&mut tree, &source).unwrap();
        (report.required, report.fully_allocated)
    }

    /// Figures of `qemu-img measure` 10.0.2 with `--size`, which assumes no data.
    #[test]
    fn measure_agrees_with_qemu_img() {
        const G: u64 = 1 << 30;
        const T: u64 = 1 << 40;
        let small = &[("cluster_size", "512")][..];
        let wide = &[("cluster_size", "512"), ("refcount_bits", "64")][..];
        let ext = &[("extended_l2", "on")][..];
        for (options, len, required, full) in [
            (&[][..], 0, 196_608, 196_608),
            (&[][..], 1, 327_680, 393_216),
            (&[][..], 1 << 20, 327_680, 1_376_256),
            (&[][..], 10 * G, 1_900_544, 10_739_318_784),
            (&[("preallocation", "metadata")][..], T, 168_034_304, 1_099_679_662_080),
            (&[("preallocation", "full")][..], G, 1_074_135_040, 1_074_135_040),
            (small, 0, 1536, 1536),
            (small, 1, 2560, 3072),
            (small, 1 << 20, 22_528, 1_071_104),
            (small, 1_000_000, 21_504, 1_021_952),
            (small, G, 21_385_216, 1_095_127_040),
            (wide, 1 << 20, 35_328, 1_083_904),
            (wide, G, 34_629_120, 1_108_370_944),
            (&[("cluster_size", "4k")][..], T, 2_690_920_448, 1_102_202_548_224),
            (&[("cluster_size", "2M")][..], T, 12_582_912, 1_099_524_210_688),
            (ext, T, 302_252_032, 1_099_813_879_808),
            (&[("refcount_bits", "1")][..], T, 136_577_024, 1_099_648_204_800),
            (&[("refcount_bits", "64")][..], T, 268_697_600, 1_099_780_325_376),
        ] {
            let none = Some(Vec::new());
            assert_eq!(ask(options, len, none), (required, full), "{options:?} {len}");
        }
    }

    #[test]
    fn data_counts_by_the_cluster_and_once() {
        let data = Some(vec![0..1, 10..70_000, 131_072..131_073, 1 << 20..1 << 30]);
        assert_eq!(ask(&[], 1 << 20, data), (1_376_256 - 13 * 65536, 1_376_256));
        assert_eq!(ask(&[], 1 << 20, None), (1_376_256, 1_376_256));
    }

    #[test]
    fn too_large_a_disk_is_refused() {
        let mut options = Options::new().with("cluster_size", 512);
        let source = MeasureSource { virtual_len: 300 << 30, data: None };
        let error = measure(&mut options, &source).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
        let source = MeasureSource { virtual_len: u64::MAX, data: None };
        assert!(measure(&mut Options::new(), &source).is_err());
    }
}

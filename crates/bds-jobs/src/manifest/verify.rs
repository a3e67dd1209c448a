//! Verifies an image against its manifest.

use std::ops::Range;

use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};

use super::format::{Manifest, other_length};
use super::read::{Chunks, hash_chunks};

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Bytes that were compared.
    pub checked: u64,
    /// Ranges in bytes whose content differs, merged, in order.
    pub bad: Vec<Range<u64>>,
}

impl VerifyReport {
    /// True if the image has the content that the manifest describes.
    pub fn is_good(&self) -> bool {
        self.bad.is_empty()
    }
}

impl Manifest {
    /// Reads the image and compares it with the manifest. `progress` is called with (done, total)
    /// bytes and may stop it by returning false.
    ///
    /// ```
    /// use bds_core::driver::WriteFlags;
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::Options;
    /// use bds_jobs::manifest::ManifestBuilder;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let node = graph.open(Options::parse("driver=mem,size=1M")?).await?;
    /// let disk = Backend::new(&node, BackendOptions { writable: true, ..Default::default() })?;
    /// disk.write_at(0, b"as it was")?;
    /// let builder = ManifestBuilder::new(disk.len())?;
    /// let manifest = builder.finish(&disk, None, "disk0", |_, _| true).await?;
    /// assert!(manifest.verify(&disk, |_, _| true).await?.is_good());
    ///
    /// disk.write_at(70_000, b"a flipped bit")?;
    /// let report = manifest.verify(&disk, |_, _| true).await?;
    /// assert_eq!(report.bad, [65_536..131_072]);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidInput`: the image has another length; `Cancelled`: `progress` stopped it; and any
    /// error of a read, which names the offset.
    pub async fn verify(
        &self,
        image: &Backend,
        mut progress: impl FnMut(u64, u64) -> bool,
    ) -> Result<VerifyReport> {
        if image.len() != self.len() {
            return Err(other_length(image.len(), self.len()));
        }
        let mut report = VerifyReport::default();
        let chunks = Chunks { image, len: self.len(), chunk_len: self.chunk_len() };
        let expected = self.hashes();
        hash_chunks(&chunks, 0..expected.len() as u64, |index, hash| {
            let range = index * chunks.chunk_len..chunks.len.min((index + 1) * chunks.chunk_len);
            report.checked = range.end;
            if hash != expected[usize::try_from(index).expect("an index of the vector")] {
                report.add_bad(range);
            }
            match progress(report.checked, chunks.len) {
                true => Ok(()),
                false => Err(Error::new(ErrorKind::Cancelled, "the verification was stopped")),
            }
        })
        .await?;
        Ok(report)
    }
}

impl VerifyReport {
    /// Adds a range behind the others.
    pub fn add_bad(&mut self, range: Range<u64>) {
        match self.bad.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.bad.push(range),
        }
    }
}

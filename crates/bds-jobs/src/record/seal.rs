//! The manifest of a copy: what is known from copying, and the rest read at the end.

use bds_core::Result;
use bds_core::copy::CopyMap;
use bds_core::request::Backend;

use super::chunks::Known;
use super::file::write_file;
use super::format::CHUNK_BITS;
use super::tracker::ContentTracker;
use crate::manifest::{Manifest, hash_chunks_of};

impl ContentTracker {
    /// Writes the manifest, durably. The copy has ended, and the target was flushed. What was not
    /// seen while it was copied is read from `image`, which holds the same content.
    ///
    /// # Errors
    /// A read failed, or the file cannot be written: then it is what it was.
    pub(crate) async fn seal(&self, image: &Backend) -> Result<()> {
        let inner = &self.0;
        let Some(plan) = &inner.manifest else { return Ok(()) };
        self.read_unknown(image, None).await?;
        let hashes = {
            let state = inner.state();
            (0..state.chunks.count()).map(|index| state.chunks.get(index).1).collect()
        };
        let parent = plan.base.as_ref().map(Manifest::root);
        let manifest = Manifest::new(inner.len, CHUNK_BITS, hashes, parent, plan.note.clone())?;
        let bytes = bds_io::spawn_cpu(move || manifest.to_bytes()).await;
        let (fs, path) = (inner.fs.clone(), plan.path.clone());
        let write = async move { write_file(&fs, &path, bytes, "the manifest").await };
        bds_io::spawn(write).detach_on_drop().await
    }

    /// Reads what was not seen while it was copied. With a map: of a copy that goes on, in which
    /// guest writes are not held back; chunks that are marked in it are left out.
    ///
    /// # Errors
    /// A read failed.
    pub(crate) async fn read_unknown(&self, image: &Backend, map: Option<&CopyMap>) -> Result<()> {
        let inner = &self.0;
        let Some(plan) = &inner.manifest else { return Ok(()) };
        let mut unknown = inner.state().chunks.unknown();
        if let Some(map) = map {
            for index in unknown {
                // No copy and no synced write changes the chunk meanwhile. What a plain write
                // changes is marked after it, and copied again.
                let _exclusion = map.exclude(inner.chunk(index)).await;
                if map.is_clean_in(&inner.chunk(index)) {
                    self.read_chunks(image, vec![index]).await?;
                }
            }
            return Ok(());
        }
        unknown.retain(|index| {
            let mut state = inner.state();
            let is_untouched = state.chunks.get(*index).0 == Known::Untouched;
            match plan.of_base(*index, inner.len).filter(|_| is_untouched) {
                Some(hash) => state.chunks.read(*index, hash),
                None => return true,
            }
            false
        });
        self.read_chunks(image, unknown).await
    }

    async fn read_chunks(&self, image: &Backend, indices: Vec<u64>) -> Result<()> {
        let read = |index, hash| {
            self.0.state().chunks.read(index, hash);
            Ok(())
        };
        hash_chunks_of(image, self.0.len, 1 << CHUNK_BITS, indices.into_iter(), read).await
    }
}

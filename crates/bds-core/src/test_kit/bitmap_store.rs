//! A fake image that stores bitmaps, for the fake disk of [`super::disk`].
//!
//! It asserts what the graph promises (no two calls at once), and keeps the driver's part: before
//! the disk changes, every stored bitmap is marked in use.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::{lock, yield_times};
use crate::bitmap::HBitmap;
use crate::driver::{BitmapSpec, BitmapStore, BitmapToStore, BoxFuture, StoredBitmap};
use crate::error::{Error, ErrorKind, Result};

/// A bitmap in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InImage {
    pub(crate) name: String,
    pub(crate) granularity: u32,
    pub(crate) is_enabled: bool,
    pub(crate) len: u64,
    pub(crate) stream: Vec<u8>,
    pub(crate) is_in_use: bool,
}

impl InImage {
    /// A bitmap that is marked in use.
    pub(crate) fn in_use(name: &str) -> Self {
        let (name, granularity) = (name.to_owned(), 65536);
        Self { name, granularity, is_enabled: true, len: 0, stream: Vec::new(), is_in_use: true }
    }

    fn bits(&self) -> HBitmap {
        let bits = HBitmap::new(self.len, self.granularity).unwrap();
        bits.merge_stream(0, &self.stream);
        bits
    }
}

/// The image's bitmaps.
#[derive(Default)]
pub(crate) struct FakeStore {
    pub(crate) image: Mutex<Vec<InImage>>,
    /// Names of the calls since [`FakeStore::take_log`].
    log: Mutex<Vec<&'static str>>,
    /// Calls of this name fail.
    fails: Mutex<Option<&'static str>>,
    is_called: AtomicBool,
    /// Most bitmaps it stores; 0 for any number.
    most: usize,
}

impl FakeStore {
    pub(crate) fn with(image: Vec<InImage>) -> Arc<Self> {
        Arc::new(Self { image: Mutex::new(image), ..Self::default() })
    }

    /// An empty one that stores at most this many.
    pub(crate) fn limited(most: usize) -> Arc<Self> {
        Arc::new(Self { most, ..Self::default() })
    }

    pub(crate) fn take_log(&self) -> Vec<&'static str> {
        std::mem::take(&mut *lock(&self.log))
    }

    /// Makes calls of this name fail.
    pub(crate) fn fail(&self, call: Option<&'static str>) {
        *lock(&self.fails) = call;
    }

    /// Names of the bitmaps in the image, and whether they are marked in use.
    pub(crate) fn list(&self) -> Vec<(String, bool)> {
        lock(&self.image).iter().map(|it| (it.name.clone(), it.is_in_use)).collect()
    }

    /// The disk is about to change.
    pub(crate) fn touch(&self) {
        lock(&self.image).iter_mut().for_each(|it| it.is_in_use = true);
    }

    /// Logs a call, which takes a while and may fail.
    async fn call(&self, name: &'static str) -> Result<()> {
        assert!(!self.is_called.swap(true, Ordering::SeqCst), "'{name}' during another call");
        let _end = End(&self.is_called);
        lock(&self.log).push(name);
        yield_times(2).await;
        match *lock(&self.fails) == Some(name) {
            true => Err(Error::new(ErrorKind::Io, format!("'{name}' fails"))),
            false => Ok(()),
        }
    }
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl BitmapStore for FakeStore {
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredBitmap>>> {
        Box::pin(async {
            self.call("load").await?;
            let load = |it: &InImage| StoredBitmap {
                name: it.name.clone(),
                granularity: it.granularity,
                is_enabled: it.is_enabled,
                bits: (!it.is_in_use).then(|| it.bits()),
                recovered_bytes: None,
            };
            Ok(lock(&self.image).iter().map(load).collect())
        })
    }

    fn can_store(&self, new: &BitmapSpec, others: &[BitmapSpec]) -> Result<()> {
        if self.most != 0 && others.len() >= self.most {
            let text = "Maximum number of persistent bitmaps is already reached";
            return Err(Error::new(ErrorKind::LimitExceeded, text));
        }
        assert!(others.iter().all(|other| other.name != new.name));
        Ok(())
    }

    fn store<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            self.call("store").await?;
            let mut image = lock(&self.image);
            let store = |new: &BitmapToStore| match &new.bits {
                None => image.iter().find(|old| *old.name == *new.name).unwrap().clone(),
                Some(bits) => {
                    let mut stream = vec![0; usize::try_from(bits.stream_len()).unwrap()];
                    bits.read_stream(0, &mut stream);
                    InImage {
                        name: new.name.to_string(),
                        granularity: new.granularity,
                        is_enabled: new.is_enabled,
                        len: bits.len(),
                        stream,
                        is_in_use: false,
                    }
                }
            };
            *image = all.iter().map(store).collect();
            Ok(())
        })
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.call("remove").await?;
            lock(&self.image).retain(|it| it.name != name);
            Ok(())
        })
    }

    fn mark_in_use(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.call("mark_in_use").await?;
            self.touch();
            Ok(())
        })
    }
}

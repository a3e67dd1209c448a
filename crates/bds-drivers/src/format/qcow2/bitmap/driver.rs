//! Persistent bitmaps for the contract of drivers: every change runs in a task of its own, as a
//! dropped caller must not leave half of it.

use bds_core::driver::{
    BitmapSpec, BitmapStore, BitmapToStore, BoxFuture, IntentStore, StoredBitmap,
};
use bds_core::error::Result;

use crate::format::qcow2::driver::Qcow2;

impl BitmapStore for Qcow2 {
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredBitmap>>> {
        Box::pin(self.image.load_bitmaps())
    }

    fn can_store(&self, new: &BitmapSpec, others: &[BitmapSpec]) -> Result<()> {
        self.image.can_store_bitmap(new, others)
    }

    fn store<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        let all = all.to_vec();
        self.run(|image| async move {
            image.store_bitmaps(&all).await?;
            image.end_log().await
        })
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>> {
        let name = name.to_owned();
        self.run(|image| async move {
            image.remove_stored_bitmap(&name).await?;
            image.forget_in_log(&name).await
        })
    }

    fn mark_in_use(&self) -> BoxFuture<'_, Result<()>> {
        self.run(|image| async move { image.mark_all_bitmaps().await })
    }

    fn intent(&self) -> Option<&dyn IntentStore> {
        self.image.journal.is_some().then_some(self as &dyn IntentStore)
    }
}

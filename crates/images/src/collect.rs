//! Taking away what nothing refers to.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use gantry_ports::Snapshotter;
use gantry_types::Digest;

use crate::Result;
use crate::image::Image;
use crate::service::{Inner, LayersInUse};

impl Inner {
    /// Blobs and chain ids of all listed images. A compressed layer that is unpacked is none of
    /// them where the node lets go of these.
    pub(crate) fn referenced(&self) -> (HashSet<Digest>, HashSet<Digest>) {
        let catalog = self.catalog();
        let discarded = |image: &Image, blob: &Digest| {
            self.options.discard_unpacked_layers && self.is_unpacked_everywhere(image, blob)
        };
        let blobs = catalog
            .images()
            .flat_map(|image| image.blobs.iter().map(move |blob| (image, blob)))
            .filter(|(image, blob)| !discarded(image, blob))
            .map(|(_, blob)| blob.clone())
            .collect();
        let chains = catalog
            .images()
            .flat_map(|image| image.layers.iter().cloned())
            .collect();
        (blobs, chains)
    }

    /// Removes those of an image's compressed layers that nothing refers to, where the node lets go
    /// of them once they are unpacked. The image is here whether that succeeds or not: what stays
    /// is for the next collection.
    pub(crate) async fn discard(self: &Arc<Self>, image: &Image) {
        if !self.options.discard_unpacked_layers {
            return;
        }
        if let Err(error) = self.drop_blobs(image.layer_blobs().to_vec()).await {
            tracing::warn!(%error, image = %image.id, "compressed layers stay until collection");
        }
    }

    /// What belonged to `image` alone. It is no longer listed, and no image is admitted
    /// meanwhile.
    pub(crate) fn collect_of(&self, image: &Image, in_use: &dyn LayersInUse) -> Result<()> {
        if !self.all_read() {
            return Ok(());
        }
        let (blobs, _) = self.referenced();
        for blob in image.blobs.iter().filter(|blob| !blobs.contains(blob)) {
            self.leases
                .unless_held(blob, || self.content.remove(blob))
                .transpose()?;
        }
        for snapshotter in self.snapshotters.iter() {
            self.collect_layers(snapshotter, &image.layers, in_use)?;
        }
        Ok(())
    }

    pub(crate) fn collect_all(&self, in_use: &dyn LayersInUse) -> Result<()> {
        if !self.all_read() {
            return Ok(());
        }
        let (blobs, _) = self.referenced();
        for (blob, _) in self.content.list()? {
            let metadata = std::fs::metadata(self.content.path(&blob));
            if blobs.contains(&blob) || metadata.is_ok_and(|metadata| self.is_young(&metadata)) {
                continue;
            }
            self.leases
                .unless_held(&blob, || self.content.remove(&blob))
                .transpose()?;
        }
        for (part, metadata) in self.content.parts()? {
            if !blobs.contains(&part) && !self.is_young(&metadata) {
                self.leases
                    .unless_held(&part, || self.content.discard(&part))
                    .transpose()?;
            }
        }
        for snapshotter in self.snapshotters.iter() {
            let layers = snapshotter.layers()?.into_iter();
            let layers: Vec<Digest> = layers.map(|(chain, _)| chain).collect();
            self.collect_layers(snapshotter, &layers, in_use)?;
        }
        Ok(())
    }

    pub(crate) fn is_young(&self, file: &std::fs::Metadata) -> bool {
        // A clock that was set back makes it young for ever, until it is set right.
        file.modified().is_ok_and(|time| {
            SystemTime::now().duration_since(time).unwrap_or_default()
                < self.options.keep_unreferenced
        })
    }

    /// Removes those of `layers` (base to top, so the last first) that nothing of this snapshotter
    /// stands on.
    fn collect_layers(
        &self,
        snapshotter: &Arc<dyn Snapshotter>,
        layers: &[Digest],
        in_use: &dyn LayersInUse,
    ) -> Result<()> {
        let (_, referenced) = self.referenced();
        // The order closes a gap: a container creation writes its record before it gives up its
        // lease, so that what was leased here, or is recorded after, is seen one way or the other.
        let leased = self.leases.held();
        let Some(used) = in_use.chains(snapshotter.name()) else {
            return Ok(());
        };
        for chain in layers.iter().rev() {
            if referenced.contains(chain) || leased.contains(chain) || used.contains(chain) {
                continue;
            }
            let removed = self
                .leases
                .unless_held(chain, || snapshotter.remove_layer(chain))
                .transpose()?;
            if removed.is_some() {
                self.usage().remove(&(snapshotter.name(), chain.clone()));
            }
        }
        Ok(())
    }

    /// Gives back the space of what was removed. Slow, and under no lock of the leases.
    pub(crate) fn purge(&self) -> Result<()> {
        self.content.purge()?;
        for snapshotter in self.snapshotters.iter() {
            snapshotter.purge()?;
        }
        Ok(())
    }

    /// Removes these blobs unless an image or other work needs them: a full disk is not the time
    /// to keep them for the next try.
    pub(crate) async fn drop_blobs(self: &Arc<Self>, fresh: Vec<Digest>) -> Result<()> {
        // No image is admitted meanwhile, whose blobs these might be.
        let dropped = self.change("blob removal", move |work| {
            if !work.all_read() {
                return Ok(());
            }
            let (blobs, _) = work.referenced();
            for blob in fresh.iter().filter(|blob| !blobs.contains(blob)) {
                work.leases
                    .unless_held(blob, || work.content.remove(blob))
                    .transpose()?;
            }
            work.content.purge()
        });
        dropped.await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::service::{Images, Options};

    #[tokio::test]
    async fn blobs_are_dropped_while_no_image_is_admitted() {
        let dir = tempfile::tempdir().unwrap();
        let store = gantry_store::Store::open(&dir.path().join("store")).unwrap();
        let layers = gantry_snapshotter_native::Native::open(dir.path()).unwrap();
        let layers: Arc<dyn Snapshotter> = Arc::new(layers);
        let options = Options::default();
        let images = Images::open(dir.path(), store.store, layers, options).unwrap();
        let inner = &images.inner;
        let digest = inner.content.put(b"hello").unwrap();
        let here = || inner.content.size(&digest).unwrap().is_some();
        let admitting = inner.changing.lock().await;
        let dropping = inner.drop_blobs(vec![digest.clone()]);
        tokio::pin!(dropping);
        let early = tokio::time::timeout(Duration::from_millis(100), &mut dropping).await;
        assert!(early.is_err() && here());
        drop(admitting);
        dropping.await.unwrap();
        assert!(!here());
        // What work under way holds stays.
        let digest = inner.content.put(b"held").unwrap();
        let mut lease = inner.leases.lease();
        lease.hold([&digest]);
        inner.drop_blobs(vec![digest.clone()]).await.unwrap();
        assert!(inner.content.size(&digest).unwrap().is_some());
    }
}

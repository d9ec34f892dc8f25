//! All that is known of one image, for people and their tools.

use serde_json::{Value, json};

use crate::document::DOCUMENT_MAX;
use crate::image::Image;
use crate::service::{Images, Inner, blocking};
use crate::{Error, Result, install};

impl Images {
    /// Names, manifest, configuration and layers of an image, as JSON.
    pub async fn inspect(&self, name_or_id: &str) -> Result<Value> {
        let name = name_or_id.to_owned();
        let image = self.status(&name)?.ok_or(Error::NoSuchImage { name })?;
        let work = self.inner.clone();
        blocking("image inspection", move || inspect(&work, &image)).await
    }
}

fn inspect(inner: &Inner, image: &Image) -> Result<Value> {
    let document = |digest: &gantry_types::Digest| -> Result<Value> {
        let bytes = inner.content.read(digest, DOCUMENT_MAX)?;
        let bytes = bytes.ok_or_else(|| Error::invalid(digest, "the blob is missing"))?;
        serde_json::from_slice(&bytes).map_err(|e| Error::invalid(digest, e))
    };
    let manifest = document(&image.manifest.digest)?;
    let config = match image.id.parse() {
        Ok(digest) => document(&digest)?,
        Err(error) => return Err(Error::invalid(&image.id, error)),
    };
    let mut layers = Vec::new();
    for layer in install::layers_of(inner, &image.manifest.digest)? {
        let first = inner.snapshotters.first();
        let unpacked = first.has_layer(&layer.chain);
        let usage = inner.usage_of(first, &layer.chain);
        let snapshotters = inner.snapshotters.iter();
        let unpacked_for: Vec<_> = snapshotters
            .filter(|snapshotter| snapshotter.has_layer(&layer.chain))
            .map(|snapshotter| snapshotter.name())
            .collect();
        layers.push(json!({
            "digest": layer.blob.digest.as_str(),
            "mediaType": layer.blob.media_type,
            "size": layer.blob.size,
            "kept": inner.content.size(&layer.blob.digest)?.is_some(),
            "chainID": layer.chain.as_str(),
            "unpacked": unpacked,
            "unpackedFor": unpacked_for,
            "unpackedSize": usage.filter(|_| unpacked).map(|usage| usage.bytes),
        }));
    }
    Ok(json!({
        "id": image.id,
        "repoTags": image.tags,
        "repoDigests": image.digests,
        "size": image.size,
        "pinned": image.pinned,
        "createdAt": image.created_at,
        "manifestDigest": image.manifest.digest.as_str(),
        "manifest": manifest,
        "config": config,
        "layers": layers,
    }))
}

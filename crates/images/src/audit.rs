//! What is kept for whom, and what a collection would take: to be read before it happens.

use std::collections::{HashMap, HashSet};

use gantry_types::Digest;

use crate::Result;
use crate::service::{Images, Inner, blocking};

/// Who stands on a layer, by the name of its snapshotter and its chain id.
pub type LayerHolders = HashMap<(String, Digest), Vec<String>>;

/// Something on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub kind: ItemKind,
    /// Whose layer it is: one chain may be unpacked for several snapshotters.
    pub snapshotter: Option<&'static str>,
    pub digest: Digest,
    pub bytes: u64,
    pub fate: Fate,
    /// Images (by their first name, or id) and containers (by id) that need it; `work` stands for
    /// pulls and creations under way.
    pub referrers: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ItemKind {
    /// A manifest, configuration or compressed layer.
    Blob,
    /// What a pull that did not end has fetched of a blob.
    Part,
    /// An unpacked layer, by chain id.
    Layer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Kept,
    /// Nothing refers to it, but it came lately, and a failed pull may go on with it.
    Young,
    Goes,
}

impl Images {
    /// Everything on disk with what refers to it, and whether [`Images::collect`] would take it now.
    /// `containers`: by snapshotter and chain id, those that stand on it.
    pub async fn audit(&self, containers: LayerHolders) -> Result<Vec<Item>> {
        let work = self.inner.clone();
        blocking("image audit", move || audit(&work, &containers)).await
    }
}

fn audit(inner: &Inner, containers: &LayerHolders) -> Result<Vec<Item>> {
    let mut blob_referrers: HashMap<Digest, Vec<String>> = HashMap::new();
    let mut layer_referrers: HashMap<Digest, Vec<String>> = HashMap::new();
    let (blobs, _) = inner.referenced();
    for image in inner.catalog().images() {
        let names = image.tags.iter().chain(&image.digests);
        let name = names.chain([&image.id]).next().cloned().unwrap_or_default();
        let own: HashSet<&Digest> = image
            .blobs
            .iter()
            .filter(|blob| blobs.contains(blob))
            .collect();
        for blob in own {
            let referrers = blob_referrers.entry(blob.clone()).or_default();
            referrers.push(format!("image {name}"));
        }
        for chain in &image.layers {
            let referrers = layer_referrers.entry(chain.clone()).or_default();
            referrers.push(format!("image {name}"));
        }
    }
    let held = inner.leases.held();
    let all_read = inner.all_read();
    let item = |kind, digest: Digest, bytes, referrers: Option<&Vec<String>>, young| {
        let mut referrers = referrers.cloned().unwrap_or_default();
        if held.contains(&digest) {
            referrers.push("work".to_owned());
        }
        if !all_read && referrers.is_empty() {
            referrers.push("images that cannot be read".to_owned());
        }
        referrers.sort();
        let fate = match (referrers.is_empty(), young) {
            (false, _) => Fate::Kept,
            (true, true) => Fate::Young,
            (true, false) => Fate::Goes,
        };
        Item {
            kind,
            snapshotter: None,
            digest,
            bytes,
            fate,
            referrers,
        }
    };
    let mut items = Vec::new();
    for (blob, size) in inner.content.list()? {
        let metadata = std::fs::metadata(inner.content.path(&blob));
        let young = metadata.is_ok_and(|metadata| inner.is_young(&metadata));
        let referrers = blob_referrers.get(&blob);
        items.push(item(ItemKind::Blob, blob.clone(), size, referrers, young));
    }
    for (part, metadata) in inner.content.parts()? {
        let young = inner.is_young(&metadata);
        let size = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        // It is on its way to be the blob that they need.
        let referrers = blob_referrers.get(&part);
        items.push(item(ItemKind::Part, part.clone(), size, referrers, young));
    }
    for snapshotter in inner.snapshotters.iter() {
        let name = snapshotter.name();
        for (chain, usage) in snapshotter.layers()? {
            let key = (name.to_owned(), chain);
            let images = layer_referrers.get(&key.1).into_iter().flatten();
            let containers = containers.get(&key).into_iter().flatten();
            let referrers = images.chain(containers).cloned().collect();
            let layer = item(ItemKind::Layer, key.1, usage.bytes, Some(&referrers), false);
            items.push(Item {
                snapshotter: Some(name),
                ..layer
            });
        }
    }
    items.sort_by(|a, b| {
        let key = |item: &Item| (item.kind, item.digest.clone(), item.snapshotter);
        key(a).cmp(&key(b))
    });
    Ok(items)
}

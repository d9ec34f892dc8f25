//! `index.json` of the content store: what names which image, in a form that needs no database.

use std::collections::BTreeMap;
use std::path::Path;

use gantry_types::Digest;
use serde::{Deserialize, Serialize};

use crate::catalog::Catalog;
use crate::document::OCI_INDEX;
use crate::{Error, Result};

/// Standard key (OCI image-spec, annotations.md); the value is the whole name, by tag or digest.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const CREATED: &str = "io.gantry.image.created";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    manifests: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// An image as the index knows it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Named {
    pub tags: Vec<String>,
    pub digests: Vec<String>,
    pub created_at: i64,
}

/// Replaces the file; durable on return.
pub fn write(path: &Path, catalog: &Catalog) -> Result<()> {
    let mut manifests = Vec::new();
    for image in catalog.images() {
        let names: Vec<&String> = image.tags.iter().chain(&image.digests).collect();
        let entry = |name: Option<&String>| Entry {
            media_type: image.manifest.media_type.clone(),
            digest: image.manifest.digest.to_string(),
            size: image.manifest.size,
            annotations: name
                .map(|name| (REF_NAME.to_owned(), name.clone()))
                .into_iter()
                .chain([(CREATED.to_owned(), image.created_at.to_string())])
                .collect(),
        };
        if names.is_empty() {
            manifests.push(entry(None));
        }
        manifests.extend(names.into_iter().map(|name| entry(Some(name))));
    }
    let index = Index {
        schema_version: 2,
        media_type: OCI_INDEX.to_owned(),
        manifests,
    };
    let bytes = serde_json::to_vec_pretty(&index).map_err(|e| Error::invalid(path.display(), e))?;
    gantry_sys::fs::write_atomic(path, &bytes, 0o600, true)
        .map_err(|e| Error::io(format_args!("write {}", path.display()), e))
}

/// Manifest digests with their names. An absent file is an empty index.
pub fn read(path: &Path) -> Result<BTreeMap<Digest, Named>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(Error::io(format_args!("read {}", path.display()), e)),
    };
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|e| Error::invalid(path.display(), e))?;
    let mut images: BTreeMap<Digest, Named> = BTreeMap::new();
    for entry in index.manifests {
        let Ok(digest) = entry.digest.parse::<Digest>() else {
            tracing::warn!(digest = %entry.digest, "index.json: an entry without a usable digest");
            continue;
        };
        let named = images.entry(digest).or_default();
        named.created_at = entry
            .annotations
            .get(CREATED)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        if let Some(name) = entry.annotations.get(REF_NAME) {
            if name.contains('@') {
                &mut named.digests
            } else {
                &mut named.tags
            }
            .push(name.clone());
        }
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tests::image;

    #[test]
    fn the_index_gives_back_every_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.json");
        assert!(read(&path).unwrap().is_empty());
        let mut catalog = Catalog::default();
        catalog.insert(image(1, &["r.io/a:1", "r.io/a:2"], &["r.io/a@sha256:x"]));
        let mut nameless = image(2, &[], &[]);
        nameless.created_at = 7;
        catalog.insert(nameless);
        write(&path, &catalog).unwrap();
        let images = read(&path).unwrap();
        let first = &images[&Digest::sha256([1; 32])];
        assert_eq!(first.tags, ["r.io/a:1", "r.io/a:2"]);
        assert_eq!(first.digests, ["r.io/a@sha256:x"]);
        assert_eq!(
            images[&Digest::sha256([2; 32])],
            Named {
                created_at: 7,
                ..Default::default()
            }
        );
    }

    #[test]
    fn a_damaged_index_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.json");
        std::fs::write(&path, "{").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("index.json"));
    }
}

//! Images from an archive.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use gantry_types::Digest;
use serde::Deserialize;
use serde_json::json;

use super::collect::Files;
use super::{DockerImage, NAME, REF_NAME};
use crate::document::{
    self, DOCUMENT_MAX, Document, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Platform,
};
use crate::install;
use crate::reference::Reference;
use crate::service::{Images, Inner, blocking, to_its_end};
use crate::{Error, Result};

/// Deepest nesting of indexes.
const DEPTH_MAX: usize = 4;
/// Most documents that are read to find the images.
const DOCUMENTS_MAX: usize = 4000;
/// Most images of one archive.
const IMAGES_MAX: usize = 1000;

/// An image of the archive: its manifest is a blob by now.
struct Found {
    manifest: Digest,
    config: Digest,
    /// What the archive's index points to, if it has one.
    top: Option<Digest>,
    names: Vec<Reference>,
}

#[derive(Deserialize)]
struct LayoutIndex {
    manifests: Vec<LayoutEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutEntry {
    digest: String,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

impl Images {
    /// Imports the images of a stream: an OCI image layout as tar, or a docker archive; compressed
    /// or not. `name` is for an archive of one image, instead of the names that it gives. Images
    /// for other platforms may be named without being there. Returns the names, or the ids of
    /// images without one.
    pub async fn import(
        &self,
        stream: impl Read + Send + 'static,
        name: Option<String>,
    ) -> Result<Vec<String>> {
        self.import_files(name, true, move |files| files.read_tar(stream))
            .await
    }

    /// As [`Images::import`], without unpacking: a layer is unpacked when a container needs it.
    pub async fn import_fetched(
        &self,
        stream: impl Read + Send + 'static,
        name: Option<String>,
    ) -> Result<Vec<String>> {
        self.import_files(name, false, move |files| files.read_tar(stream))
            .await
    }

    /// As [`Images::import`], from a file or from the directory of an image layout.
    pub async fn import_path(&self, path: &Path, name: Option<String>) -> Result<Vec<String>> {
        let path = path.to_owned();
        self.import_files(name, true, move |files| {
            if path.is_dir() {
                return files.read_dir(&path);
            }
            let file = std::fs::File::open(&path)
                .map_err(|e| Error::io(format_args!("open {}", path.display()), e))?;
            files.read_tar(file)
        })
        .await
    }

    async fn import_files(
        &self,
        name: Option<String>,
        unpack: bool,
        read: impl FnOnce(&mut Files) -> Result<()> + Send + 'static,
    ) -> Result<Vec<String>> {
        let name = name.map(|name| name.parse::<Reference>()).transpose()?;
        let inner = self.inner.clone();
        let mut files = Files::new(inner.content.clone(), inner.leases.lease());
        let (files, found) = blocking("image import", move || {
            let found = read(&mut files).and_then(|()| find(&inner, &mut files, name));
            Ok((files, found))
        })
        .await?;
        let inner = self.inner.clone();
        to_its_end("image import", take_over(inner, files, found, unpack)).await
    }
}

/// Records what was found, and drops what no image needed: the archive's own files, other platforms,
/// all of a bad archive.
async fn take_over(
    inner: Arc<Inner>,
    files: Files,
    found: Result<Vec<Found>>,
    unpack: bool,
) -> Result<Vec<String>> {
    let brought = files.digests();
    let lease = files.into_lease();
    let result = match found {
        Ok(found) => adopt(&inner, found, unpack).await.map_err(of_archive),
        Err(error) => Err(error),
    };
    drop(lease);
    let dropped = inner.drop_blobs(brought).await;
    match (result, dropped) {
        (Ok(names), dropped) => dropped.map(|()| names),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(second)) => {
            tracing::warn!(error = %second, "blobs of a failed import stay until collection");
            Err(error)
        }
    }
}

/// All of the image came with the archive: what does not fit in it is the archive's fault.
pub(super) fn of_archive(error: Error) -> Error {
    match error {
        Error::Mismatch { what, reason } => {
            Error::invalid(format_args!("image archive: {what}"), reason)
        }
        other => other,
    }
}

/// Records what was found, unpacked or not.
async fn adopt(inner: &Arc<Inner>, found: Vec<Found>, unpack: bool) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for image in found {
        let mut lease = inner.leases.lease();
        lease.hold([&image.manifest]);
        if unpack {
            let (first, none) = (inner.snapshotters.first(), &mut Vec::new());
            lease = install::install(inner, first, None, &image.manifest, lease, none).await?;
        }
        let tags: Vec<String> = image.names.iter().filter_map(Reference::tagged).collect();
        let by_digest = |name: &Reference| match (name.digest(), &image.top) {
            // That it is the image's own was looked at before.
            (Some(_), _) => Some(name.to_string()),
            (None, Some(top)) => Some(name.with_digest(top)),
            (None, None) => None,
        };
        let digests: Vec<String> = image.names.iter().filter_map(by_digest).collect();
        let admitted = inner.admit(image.manifest, tags, digests, lease).await?;
        if image.names.is_empty() {
            names.push(admitted.id.clone());
        }
        names.extend(image.names.iter().map(Reference::to_string));
    }
    Ok(names)
}

fn find(inner: &Inner, files: &mut Files, name: Option<Reference>) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let docker = docker_images(files)?;
    if let Some(index) = files.read("index.json")? {
        from_layout(inner, &index, &mut found)?;
        // docker's tags are whole names, those of a layout may be tags alone.
        for image in &mut found {
            let tags = docker.iter().filter(|(config, _)| *config == image.config);
            for tag in tags.flat_map(|(_, image)| image.repo_tags.iter().flatten()) {
                let tag: Reference = tag.parse()?;
                if !image.names.contains(&tag) {
                    image.names.push(tag);
                }
            }
        }
    } else {
        for (config, image) in docker {
            found.push(from_docker(inner, files, config, image)?);
        }
    }
    name_all(name, &mut found)?;
    for image in &found {
        for name in &image.names {
            let own = [Some(&image.manifest), image.top.as_ref()];
            if name.digest().is_some() && !own.contains(&name.digest()) {
                return Err(Error::Reference {
                    reference: name.to_string(),
                    reason: format!("the archive's image is {}", image.manifest),
                });
            }
        }
    }
    Ok(found)
}

/// Gives the archive's one image the name that was asked for.
fn name_all(name: Option<Reference>, found: &mut [Found]) -> Result<()> {
    match (name, found) {
        (_, []) => Err(Error::invalid(
            "image archive",
            "no image in it: neither index.json nor manifest.json names one that runs here",
        )),
        (None, _) => Ok(()),
        (Some(name), [one]) => {
            one.names = vec![name];
            Ok(())
        }
        (Some(name), more) => Err(Error::Reference {
            reference: name.to_string(),
            reason: format!(
                "the archive has {} images: one name cannot be for all",
                more.len()
            ),
        }),
    }
}

/// The images that `index.json` leads to and that run here.
fn from_layout(inner: &Inner, index: &[u8], found: &mut Vec<Found>) -> Result<()> {
    let index: LayoutIndex = serde_json::from_slice(index)
        .map_err(|e| Error::invalid("image archive: index.json", e))?;
    if index.manifests.len() > IMAGES_MAX {
        let what = "image archive: index.json".to_owned();
        return Err(Error::Limit {
            what,
            limit: IMAGES_MAX as u64,
            unit: "images",
        });
    }
    let mut documents = 0;
    for entry in index.manifests {
        let what = "image archive: index.json";
        let digest: Digest = entry.digest.parse().map_err(|e| Error::invalid(what, e))?;
        let annotations = entry.annotations.as_ref();
        let refers = annotations.is_some_and(|all| all.contains_key(document::REFERENCE_TYPE));
        let platforms = &inner.options.platforms;
        if refers
            || !entry
                .platform
                .is_none_or(|platform| platforms.runs(&platform))
        {
            continue;
        }
        let mut walk = Walk {
            inner,
            visited: Vec::new(),
            documents: &mut documents,
        };
        let Some(manifest) = walk.pick(&digest, &entry.media_type, 0)? else {
            tracing::debug!(%digest, "image archive: nothing for this platform");
            continue;
        };
        let names = layout_name(entry.annotations.as_ref())
            .into_iter()
            .collect::<Vec<_>>();
        let config = config_of(inner, &manifest)?;
        let known = found
            .iter_mut()
            .find(|image: &&mut Found| image.manifest == manifest);
        match known {
            // One entry per name, as our own index has it.
            Some(image) => image.names.extend(names),
            None => found.push(Found {
                manifest,
                config,
                top: Some(digest),
                names,
            }),
        }
    }
    Ok(())
}

fn layout_name(annotations: Option<&BTreeMap<String, String>>) -> Option<Reference> {
    let annotations = annotations?;
    let full = annotations.get(NAME).map(String::as_str);
    // A lone tag names nothing.
    let other = annotations.get(REF_NAME).map(String::as_str);
    let other = other.filter(|name| name.contains(['/', ':', '@']));
    full.or(other)?.parse().ok()
}

/// The search below one entry of the archive's index.
struct Walk<'a> {
    inner: &'a Inner,
    visited: Vec<Digest>,
    /// Read so far, for all entries.
    documents: &'a mut usize,
}

impl Walk<'_> {
    /// The manifest for this node at or below `digest`; `None` if there is none, if its parts are
    /// not in the archive, or if it is no image but something that goes with one.
    fn pick(&mut self, digest: &Digest, media_type: &str, depth: usize) -> Result<Option<Digest>> {
        if self.visited.contains(digest) {
            return Ok(None);
        }
        let limit = |limit: usize, unit| Error::Limit {
            what: format!("image archive: index {digest}"),
            limit: limit as u64,
            unit,
        };
        if depth > DEPTH_MAX {
            return Err(limit(DEPTH_MAX, "levels of indexes"));
        }
        *self.documents += 1;
        if *self.documents > DOCUMENTS_MAX {
            return Err(limit(DOCUMENTS_MAX, "documents"));
        }
        self.visited.push(digest.clone());
        let inner = self.inner;
        let Some(bytes) = inner.content.read(digest, DOCUMENT_MAX)? else {
            return Ok(None);
        };
        match document::parse(digest.as_str(), media_type, &bytes)? {
            Document::Manifest(manifest) => {
                if !document::is_image_config(&manifest.config.media_type) {
                    return Ok(None);
                }
                for blob in manifest.layers.iter().chain([&manifest.config]) {
                    if inner.content.size(&blob.digest)?.is_none() {
                        return Ok(None);
                    }
                }
                let config = inner.content.read(&manifest.config.digest, DOCUMENT_MAX)?;
                let config =
                    document::parse_config(&manifest.config.digest, &config.unwrap_or_default())?;
                let runs = inner.options.platforms.runs(&config.image.platform);
                Ok(runs.then(|| digest.clone()))
            }
            Document::Index(entries) => {
                for entry in inner.options.platforms.candidates(&entries) {
                    let found = self.pick(&entry.digest, &entry.media_type, depth + 1)?;
                    if found.is_some() {
                        return Ok(found);
                    }
                }
                Ok(None)
            }
        }
    }
}

fn config_of(inner: &Inner, manifest: &Digest) -> Result<Digest> {
    let bytes = inner
        .content
        .read(manifest, DOCUMENT_MAX)?
        .unwrap_or_default();
    match document::parse(manifest.as_str(), "", &bytes)? {
        Document::Manifest(parsed) => Ok(parsed.config.digest),
        Document::Index(_) => Err(Error::invalid(
            manifest,
            "an index where a manifest should be",
        )),
    }
}

/// The images of `manifest.json` by their configuration's digest.
fn docker_images(files: &Files) -> Result<Vec<(Digest, DockerImage)>> {
    let what = "image archive: manifest.json";
    let Some(bytes) = files.read("manifest.json")? else {
        return Ok(Vec::new());
    };
    let images: Vec<DockerImage> =
        serde_json::from_slice(&bytes).map_err(|e| Error::invalid(what, e))?;
    if images.len() > IMAGES_MAX {
        let limit = IMAGES_MAX as u64;
        return Err(Error::Limit {
            what: what.to_owned(),
            limit,
            unit: "images",
        });
    }
    let with_digest = |image: DockerImage| match files.find(&image.config) {
        Some((digest, _)) => Ok((digest.clone(), image)),
        None => Err(Error::invalid(
            what,
            format_args!("{:?} is not in the archive", image.config),
        )),
    };
    images.into_iter().map(with_digest).collect()
}

/// Writes the manifest that a docker archive does not have.
fn from_docker(
    inner: &Inner,
    files: &mut Files,
    config: Digest,
    image: DockerImage,
) -> Result<Found> {
    let what = "image archive: manifest.json";
    let mut layers = Vec::new();
    for name in image.layers.unwrap_or_default() {
        let (digest, size) = files
            .find(&name)
            .ok_or_else(|| Error::invalid(what, format_args!("{name:?} is not in the archive")))?;
        layers.push(json!({
            "mediaType": layer_type(inner, digest)?,
            "digest": digest.as_str(),
            "size": size,
        }));
    }
    let size = inner.content.size(&config)?.unwrap_or_default();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": config.as_str(), "size": size},
        "layers": layers,
    });
    let manifest = files.make(manifest.to_string().as_bytes())?;
    let names = image.repo_tags.unwrap_or_default();
    let names = names
        .iter()
        .map(|name| name.parse())
        .collect::<Result<Vec<_>>>()?;
    Ok(Found {
        manifest,
        config,
        top: None,
        names,
    })
}

fn layer_type(inner: &Inner, digest: &Digest) -> Result<String> {
    let mut magic = [0; 4];
    let mut file = inner.content.open_blob(digest)?;
    let n = file
        .read(&mut magic)
        .map_err(|e| Error::io(format_args!("read {digest}"), e))?;
    Ok(match &magic[..n] {
        [0x1f, 0x8b, ..] => format!("{OCI_LAYER}+gzip"),
        [0x28, 0xb5, 0x2f, 0xfd] => format!("{OCI_LAYER}+zstd"),
        _ => OCI_LAYER.to_owned(),
    })
}

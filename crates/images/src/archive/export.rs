//! Images to an archive that both OCI tools and `docker load` read.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;

use gantry_types::Digest;
use serde_json::{Value, json};

use super::{NAME, REF_NAME};
use crate::document::OCI_INDEX;
use crate::image::Image;
use crate::service::Images;
use crate::{Error, Result};

impl Images {
    /// Writes these images as a tar that is an OCI image layout and a docker archive at once. An
    /// image that is named by tag is exported under that tag, by id under all it has. Blocks.
    pub fn export(&self, names: &[String], writer: &mut dyn Write) -> Result<()> {
        let mut lease = self.inner.leases.lease();
        let mut images: Vec<(Arc<Image>, Vec<String>)> = Vec::new();
        for name in names {
            let none = || Error::NoSuchImage { name: name.clone() };
            let image = self.status(name)?.ok_or_else(none)?;
            lease.hold(&image.blobs);
            let full = name
                .parse()
                .map(|reference: crate::reference::Reference| reference.to_string());
            let tags = match full {
                Ok(full) if image.tags.contains(&full) => vec![full],
                _ => image.tags.clone(),
            };
            match images.iter_mut().find(|(known, _)| known.id == image.id) {
                Some((_, known)) => known.extend(tags),
                None => images.push((image, tags)),
            }
        }
        self.write(&images, writer)
    }

    fn write(&self, images: &[(Arc<Image>, Vec<String>)], writer: &mut dyn Write) -> Result<()> {
        let content = &self.inner.content;
        let fail = |e| Error::io("write image archive", e);
        let mut archive = tar::Builder::new(writer);
        let mut written = BTreeSet::new();
        let (mut index, mut docker) = (Vec::new(), Vec::new());
        append(
            &mut archive,
            "oci-layout",
            br#"{"imageLayoutVersion":"1.0.0"}"#,
        )?;
        for (image, tags) in images {
            for digest in parts(image) {
                let missing = || Error::NotKept {
                    image: image.id.clone(),
                    blob: digest.clone(),
                };
                let size = content.size(digest)?.ok_or_else(missing)?;
                if written.insert(digest.clone()) {
                    let mut header = header(size);
                    let blob = content.open_blob(digest)?;
                    archive
                        .append_data(&mut header, path(digest), blob)
                        .map_err(fail)?;
                }
            }
            let descriptor = |name: Option<&String>| {
                let mut entry = json!({
                    "mediaType": image.manifest.media_type,
                    "digest": image.manifest.digest.as_str(),
                    "size": image.manifest.size,
                });
                if let Some(name) = name {
                    let tag = name.rsplit_once(':').map_or("", |(_, tag)| tag);
                    entry["annotations"] = json!({NAME: name, REF_NAME: tag});
                }
                entry
            };
            if tags.is_empty() {
                index.push(descriptor(None));
            }
            index.extend(tags.iter().map(|tag| descriptor(Some(tag))));
            let mut blobs = parts(image).skip(1).map(path);
            docker.push(json!({
                "Config": blobs.next(),
                "RepoTags": tags,
                "Layers": blobs.collect::<Vec<_>>(),
            }));
        }
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": index});
        append(&mut archive, "index.json", index.to_string().as_bytes())?;
        append(
            &mut archive,
            "manifest.json",
            Value::from(docker).to_string().as_bytes(),
        )?;
        archive
            .into_inner()
            .and_then(|writer| writer.flush())
            .map_err(fail)
    }
}

/// Manifest, configuration and layers; not the index that the image was once picked from.
fn parts(image: &Image) -> impl Iterator<Item = &Digest> {
    image.blobs.iter().take(2 + image.layers.len())
}

fn path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex())
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append(archive: &mut tar::Builder<&mut dyn Write>, name: &str, data: &[u8]) -> Result<()> {
    archive
        .append_data(&mut header(data.len() as u64), name, data)
        .map_err(|e| Error::io("write image archive", e))
}

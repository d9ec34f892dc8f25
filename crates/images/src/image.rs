//! An image that is complete on this node.

use std::sync::Arc;

use gantry_store::record::ImageRecord;
use gantry_types::Digest;

use crate::content::Content;
use crate::document::{self, Document, ImageConfig, OCI_MANIFEST};
use crate::hash;
use crate::{Error, Result};

/// The manifest that an image was made from, in the content store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestRef {
    pub digest: Digest,
    pub size: u64,
    pub media_type: String,
}

/// An image: one configuration with its layers, under any number of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Digest of the configuration, `sha256:...`: the id in every API.
    pub id: String,
    /// Names by tag: `docker.io/library/busybox:1.36`.
    pub tags: Vec<String>,
    /// Names by digest of the index or manifest that was pulled.
    pub digests: Vec<String>,
    /// Compressed bytes of configuration and layers.
    pub size: u64,
    pub config: Arc<ImageConfig>,
    /// Chain ids from base to top, as the snapshotter takes them.
    pub layers: Vec<Digest>,
    /// Not to be removed by the kubelet's garbage collection.
    pub pinned: bool,
    /// When it became complete, ns since the epoch.
    pub created_at: i64,
    pub(crate) manifest: ManifestRef,
    /// Every blob that the image consists of, manifest and configuration included.
    pub(crate) blobs: Vec<Digest>,
}

impl Image {
    /// `config.User` as the image says it.
    pub fn user(&self) -> &str {
        &self.config.user
    }

    /// The user as CRI's `Image` has it: a uid, or a name. A number that is no uid is given as a
    /// name, so that `runAsNonRoot` refuses it instead of taking what it wraps around to
    /// (CVE-2024-40635).
    pub fn uid_or_name(&self) -> (Option<i64>, &str) {
        let user = self.config.user.split(':').next().unwrap_or_default();
        let digits = !user.is_empty() && user.bytes().all(|b| b.is_ascii_digit());
        match user.parse::<i32>() {
            Ok(uid) if digits => (Some(i64::from(uid)), ""),
            _ => (None, user),
        }
    }

    /// Its compressed layers, base first.
    pub(crate) fn layer_blobs(&self) -> &[Digest] {
        self.blobs.get(2..2 + self.layers.len()).unwrap_or_default()
    }

    pub(crate) fn record(&self) -> ImageRecord {
        ImageRecord {
            id: self.id.clone(),
            tags: self.tags.clone(),
            digests: self.digests.clone(),
            manifest: self.manifest.digest.to_string(),
            size: self.size,
            layers: self.layers.iter().map(Digest::to_string).collect(),
            pinned: self.pinned,
            user: self.config.user.clone(),
            created_at: self.created_at,
        }
    }

    /// Reads manifest and configuration; names, pin and time are the caller's to fill in.
    pub(crate) fn load(content: &Content, manifest: &Digest) -> Result<Self> {
        let missing = |digest: &Digest| Error::Gone {
            blob: digest.clone(),
        };
        let bytes = content
            .read(manifest, document::DOCUMENT_MAX)?
            .ok_or_else(|| missing(manifest))?;
        let Document::Manifest(parsed) = document::parse(manifest.as_str(), "", &bytes)? else {
            return Err(Error::invalid(
                manifest,
                "an index where a manifest should be",
            ));
        };
        let config_bytes = content
            .read(&parsed.config.digest, document::DOCUMENT_MAX)?
            .ok_or_else(|| missing(&parsed.config.digest))?;
        let config = document::parse_config(&parsed.config.digest, &config_bytes)?;
        let layers = &parsed.layers;
        if config.diff_ids.len() != layers.len() {
            return Err(Error::invalid(
                format_args!("image config {}", parsed.config.digest),
                format_args!(
                    "{} diff ids for {} layers",
                    config.diff_ids.len(),
                    layers.len()
                ),
            ));
        }
        let mut blobs = vec![manifest.clone(), parsed.config.digest.clone()];
        blobs.extend(layers.iter().map(|layer| layer.digest.clone()));
        let sizes = layers.iter().map(|layer| layer.size);
        Ok(Self {
            id: parsed.config.digest.to_string(),
            tags: Vec::new(),
            digests: Vec::new(),
            size: sizes.fold(config_bytes.len() as u64, u64::saturating_add),
            config: Arc::new(config.image),
            layers: hash::chain_ids(&config.diff_ids),
            pinned: false,
            created_at: 0,
            manifest: ManifestRef {
                digest: manifest.clone(),
                size: bytes.len() as u64,
                media_type: media_type(&bytes),
            },
            blobs,
        })
    }

    /// Puts names on it. An index that a name points to is one of its blobs.
    pub(crate) fn with_names(mut self, tags: Vec<String>, digests: Vec<String>) -> Self {
        for name in &digests {
            let digest = name
                .rsplit_once('@')
                .and_then(|(_, digest)| digest.parse().ok());
            if let Some(digest) = digest
                && !self.blobs.contains(&digest)
            {
                self.blobs.push(digest);
            }
        }
        (self.tags, self.digests) = (tags, digests);
        self
    }
}

fn media_type(manifest: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Typed {
        #[serde(rename = "mediaType")]
        media_type: Option<String>,
    }
    let typed = serde_json::from_slice::<Typed>(manifest)
        .ok()
        .and_then(|typed| typed.media_type);
    typed
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| OCI_MANIFEST.to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An image that is nowhere on disk.
    pub fn image(n: u8, tags: &[&str], digests: &[&str]) -> Image {
        let digest = Digest::sha256([n; 32]);
        Image {
            id: digest.to_string(),
            tags: Vec::new(),
            digests: Vec::new(),
            size: 1,
            config: Arc::default(),
            layers: Vec::new(),
            pinned: false,
            created_at: 0,
            manifest: ManifestRef {
                digest: digest.clone(),
                size: 1,
                media_type: OCI_MANIFEST.to_owned(),
            },
            blobs: vec![digest],
        }
        .with_names(
            tags.iter().map(|&tag| tag.to_owned()).collect(),
            digests.iter().map(|&name| name.to_owned()).collect(),
        )
    }

    #[test]
    fn a_user_is_a_uid_or_a_name() {
        let of = |user: &str| {
            let mut image = image(1, &[], &[]);
            image.config = Arc::new(ImageConfig {
                user: user.to_owned(),
                ..Default::default()
            });
            let (uid, name) = image.uid_or_name();
            (uid, name.to_owned())
        };
        assert_eq!(of("1000:50"), (Some(1000), String::new()));
        assert_eq!(of("www:www"), (None, "www".to_owned()));
        assert_eq!(of(""), (None, String::new()));
        for overflow in [
            "4294967296",
            "2147483648",
            "99999999999999999999",
            "-1",
            "+5",
        ] {
            assert_eq!(of(overflow), (None, overflow.to_owned()));
        }
    }
}

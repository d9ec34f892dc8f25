//! Manifests, indexes and image configurations, as strangers wrote them.

use std::collections::BTreeMap;

use gantry_types::Digest;
use serde::{Deserialize, Deserializer};

use crate::{Error, Result};

/// Most bytes of a manifest, index or configuration.
pub const DOCUMENT_MAX: u64 = 8 << 20;
/// Most layers: overlayfs takes no more (fs/overlayfs/params.h, OVL_MAX_STACK).
const LAYERS_MAX: usize = 500;
/// Most descriptors of an index.
const MANIFESTS_MAX: usize = 1000;
/// Most entries of a list or map in a configuration, and most bytes of all of them.
const CONFIG_ENTRIES_MAX: usize = 10_000;
const CONFIG_BYTES_MAX: usize = 1 << 20;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Annotation of what goes with an image: an attestation, a signature (BuildKit).
pub const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_SCHEMA1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];

/// `Accept` of a request for a manifest.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// What a descriptor points to. Annotations and `urls` are not looked at: the first carry
/// nothing that a pull needs, the second would have us talk to hosts of the image's choice.
#[derive(Clone, Debug)]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    pub platform: Option<Platform>,
    /// It describes another manifest of the index (an attestation, a signature).
    pub is_reference: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Platform {
    #[serde(default, deserialize_with = "or_default")]
    pub os: String,
    #[serde(default, deserialize_with = "or_default")]
    pub architecture: String,
    #[serde(default, deserialize_with = "or_default")]
    pub variant: String,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() {
            Ok(())
        } else {
            write!(f, "/{}", self.variant)
        }
    }
}

#[derive(Clone, Debug)]
pub struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// What a registry serves under a tag.
#[derive(Clone, Debug)]
pub enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

/// Whether the configuration of a manifest is that of an image, and not of an artifact that is kept
/// beside images. Old builders say nothing.
pub fn is_image_config(media_type: &str) -> bool {
    ["", OCI_CONFIG, DOCKER_CONFIG].contains(&media_type)
}

/// `null` reads as absent: several builders write it for empty lists and maps.
pub fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default, deserialize_with = "or_default")]
    media_type: String,
    digest: String,
    size: i64,
    #[serde(default, deserialize_with = "or_default")]
    platform: Option<Platform>,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default, deserialize_with = "or_default")]
    schema_version: i64,
    #[serde(default, deserialize_with = "or_default")]
    media_type: String,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// Parses what was served as `media_type` (empty if nobody said) under the name `what`.
pub fn parse(what: &str, media_type: &str, bytes: &[u8]) -> Result<Document> {
    let invalid = |reason: String| Error::invalid(format_args!("manifest {what}"), reason);
    let raw: RawDocument = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
    let served = media_type.split(';').next().unwrap_or_default().trim();
    if DOCKER_SCHEMA1.contains(&served) || raw.schema_version == 1 || raw.fs_layers.is_some() {
        return Err(Error::Unsupported {
            what: format!("manifest {what}"),
            reason: "Docker image schema 1 is not supported: push the image anew with a current \
                     builder"
                .to_owned(),
        });
    }
    // One document read in two ways was CVE-2021-41190.
    if raw.manifests.is_some() && (raw.layers.is_some() || raw.config.is_some()) {
        return Err(invalid("it is a manifest and an index at once".to_owned()));
    }
    let known = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX];
    let said = raw.media_type.as_str();
    if !said.is_empty() && known.contains(&served) && said != served {
        return Err(invalid(format!(
            "it says it is {said:?} but was served as {served:?}"
        )));
    }
    let is_index = raw.manifests.is_some();
    for name in [served, said]
        .into_iter()
        .filter(|name| known.contains(name))
    {
        if [OCI_INDEX, DOCKER_INDEX].contains(&name) != is_index {
            return Err(invalid(format!("its content is not that of {name:?}")));
        }
    }
    if let Some(manifests) = raw.manifests {
        if manifests.len() > MANIFESTS_MAX {
            return Err(invalid(format!(
                "it lists more than {MANIFESTS_MAX} manifests"
            )));
        }
        let list = manifests.into_iter().map(|raw| descriptor(what, raw));
        return Ok(Document::Index(list.collect::<Result<_>>()?));
    }
    let config = raw
        .config
        .ok_or_else(|| invalid("it has neither config nor manifests".into()))?;
    let layers = raw.layers.unwrap_or_default();
    if layers.len() > LAYERS_MAX {
        return Err(invalid(format!("it has more than {LAYERS_MAX} layers")));
    }
    let manifest = Manifest {
        config: descriptor(what, config)?,
        layers: layers
            .into_iter()
            .map(|raw| descriptor(what, raw))
            .collect::<Result<_>>()?,
    };
    if manifest.config.size > DOCUMENT_MAX {
        return Err(invalid(format!(
            "its config is larger than {DOCUMENT_MAX} bytes"
        )));
    }
    if let Some(layer) = manifest
        .layers
        .iter()
        .find(|l| l.media_type.ends_with("+encrypted"))
    {
        return Err(Error::Unsupported {
            what: format!("manifest {what}"),
            reason: format!("layer {} is encrypted", layer.digest),
        });
    }
    Ok(Document::Manifest(manifest))
}

/// Largest blob that a manifest may name: no image has one of a tebibyte, and sums of sizes stay sums.
const BLOB_MAX: u64 = 1 << 40;

fn descriptor(what: &str, raw: RawDescriptor) -> Result<Descriptor> {
    let invalid = |reason: String| Error::invalid(format_args!("manifest {what}"), reason);
    let size = u64::try_from(raw.size).map_err(|_| invalid("a size is negative".to_owned()))?;
    if size > BLOB_MAX {
        return Err(invalid(format!(
            "a size of {size} bytes is more than {BLOB_MAX}"
        )));
    }
    Ok(Descriptor {
        digest: raw.digest.parse().map_err(|e| invalid(format!("{e}")))?,
        size,
        media_type: raw.media_type,
        platform: raw.platform,
        is_reference: raw.annotations.contains_key(REFERENCE_TYPE),
    })
}

/// The parts of an image's configuration that running a container of it needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group`, `uid:gid`; not checked.
    pub user: String,
    pub working_dir: String,
    pub labels: BTreeMap<String, String>,
    /// Paths inside the image; not checked.
    pub volumes: Vec<String>,
    pub stop_signal: String,
    /// `port/protocol`.
    pub exposed_ports: Vec<String>,
    pub platform: Platform,
}

/// A configuration with the layers that it is for.
#[derive(Clone, Debug)]
pub struct Config {
    pub image: ImageConfig,
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize, Default)]
struct RawConfig {
    #[serde(default, deserialize_with = "or_default")]
    os: String,
    #[serde(default, deserialize_with = "or_default")]
    architecture: String,
    #[serde(default, deserialize_with = "or_default")]
    variant: String,
    #[serde(default, deserialize_with = "or_default")]
    config: RawExecution,
    rootfs: RawRootfs,
}

#[derive(Deserialize, Default)]
struct RawRootfs {
    #[serde(default, deserialize_with = "or_default")]
    diff_ids: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct RawExecution {
    #[serde(default, deserialize_with = "or_default")]
    entrypoint: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    cmd: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    env: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    user: String,
    #[serde(default, deserialize_with = "or_default")]
    working_dir: String,
    #[serde(default, deserialize_with = "or_default")]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_default")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(default, deserialize_with = "or_default")]
    stop_signal: String,
    #[serde(default, deserialize_with = "or_default")]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
}

/// Parses the configuration blob `digest`.
pub fn parse_config(digest: &Digest, bytes: &[u8]) -> Result<Config> {
    let what = || format!("image config {digest}");
    let raw: RawConfig = serde_json::from_slice(bytes).map_err(|e| Error::invalid(what(), e))?;
    let execution = raw.config;
    let image = ImageConfig {
        entrypoint: execution.entrypoint,
        cmd: execution.cmd,
        env: execution.env,
        user: execution.user,
        working_dir: execution.working_dir,
        labels: execution.labels,
        volumes: execution.volumes.into_keys().collect(),
        stop_signal: execution.stop_signal,
        exposed_ports: execution.exposed_ports.into_keys().collect(),
        platform: Platform {
            os: raw.os,
            architecture: raw.architecture,
            variant: raw.variant,
        },
    };
    check_size(&image, &what)?;
    let diff_ids = raw.rootfs.diff_ids.iter().map(|text| text.parse());
    let diff_ids: Vec<Digest> = diff_ids
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Error::invalid(what(), e))?;
    if diff_ids.len() > LAYERS_MAX {
        return Err(Error::Limit {
            what: what(),
            limit: LAYERS_MAX as u64,
            unit: "layers",
        });
    }
    Ok(Config { image, diff_ids })
}

/// The configuration stays in memory and its parts go into every container's spec.
fn check_size(image: &ImageConfig, what: &dyn Fn() -> String) -> Result<()> {
    let lists = [
        &image.entrypoint,
        &image.cmd,
        &image.env,
        &image.volumes,
        &image.exposed_ports,
    ];
    let most = lists
        .iter()
        .map(|list| list.len())
        .max()
        .unwrap_or(0)
        .max(image.labels.len());
    if most > CONFIG_ENTRIES_MAX {
        let limit = CONFIG_ENTRIES_MAX as u64;
        return Err(Error::Limit {
            what: what(),
            limit,
            unit: "entries in a list",
        });
    }
    let bytes = lists
        .iter()
        .flat_map(|list| list.iter())
        .map(String::len)
        .sum::<usize>()
        + image
            .labels
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum::<usize>()
        + image.user.len()
        + image.working_dir.len()
        + image.stop_signal.len();
    if bytes > CONFIG_BYTES_MAX {
        let limit = CONFIG_BYTES_MAX as u64;
        return Err(Error::Limit {
            what: what(),
            limit,
            unit: "bytes",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn desc() -> serde_json::Value {
        json!({"mediaType": OCI_CONFIG, "digest": format!("sha256:{HEX}"), "size": 1})
    }

    fn text(media_type: &str, value: serde_json::Value) -> Result<Document> {
        parse("test", media_type, value.to_string().as_bytes())
    }

    #[test]
    fn manifest_and_index_are_told_apart() {
        let manifest = json!({"schemaVersion": 2, "config": desc(), "layers": [desc(), desc()]});
        for media_type in [
            OCI_MANIFEST,
            DOCKER_MANIFEST,
            "",
            "text/plain; charset=utf-8",
        ] {
            let document = text(media_type, manifest.clone()).unwrap();
            assert!(matches!(document, Document::Manifest(m) if m.layers.len() == 2));
        }
        assert!(text(OCI_INDEX, manifest).is_err());
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [desc()]});
        assert!(matches!(text(OCI_INDEX, index.clone()), Ok(Document::Index(m)) if m.len() == 1));
        assert!(
            text(DOCKER_INDEX, index.clone()).is_err(),
            "says one, was served as another"
        );
        assert!(text(OCI_MANIFEST, index).is_err());
    }

    #[test]
    fn a_document_that_is_both_is_refused() {
        for extra in ["config", "layers"] {
            let mut both = json!({"schemaVersion": 2, "manifests": [desc()]});
            both[extra] = if extra == "config" {
                desc()
            } else {
                json!([desc()])
            };
            let error = text("", both).unwrap_err();
            assert!(error.to_string().contains("at once"), "{error}");
        }
    }

    #[test]
    fn schema_1_is_refused_in_clear_words() {
        let old = json!({"schemaVersion": 1, "name": "x", "fsLayers": [{"blobSum": "x"}]});
        for media_type in ["", DOCKER_SCHEMA1[1]] {
            let error = text(media_type, old.clone()).unwrap_err();
            assert!(error.to_string().contains("schema 1"), "{error}");
        }
    }

    #[test]
    fn bad_digests_and_sizes_are_errors_everywhere() {
        for (key, value) in [
            ("digest", json!("sha256:../x")),
            ("size", json!(-1)),
            // Room for a list of its parts would be asked for before its first byte.
            ("size", json!(i64::MAX)),
            ("digest", json!(7)),
        ] {
            let mut bad = desc();
            bad[key] = value;
            for document in [
                json!({"config": bad, "layers": []}),
                json!({"config": desc(), "layers": [bad]}),
                json!({"manifests": [bad]}),
            ] {
                assert!(text("", document.clone()).is_err(), "{document}");
            }
        }
        // Annotations are not read, so what they say cannot hurt.
        let mut odd = desc();
        odd["annotations"] =
            json!({"containerd.io/distribution.source": "x", "digest": "sha256:!"});
        assert!(text("", json!({"config": odd, "layers": [odd]})).is_ok());
    }

    #[test]
    fn encrypted_layers_and_too_many_layers_are_refused() {
        let mut encrypted = desc();
        encrypted["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
        let error = text("", json!({"config": desc(), "layers": [encrypted]})).unwrap_err();
        assert!(error.to_string().contains("encrypted"));
        let many = vec![desc(); LAYERS_MAX + 1];
        assert!(text("", json!({"config": desc(), "layers": many})).is_err());
        let many = vec![desc(); MANIFESTS_MAX + 1];
        assert!(text("", json!({"manifests": many})).is_err());
    }

    fn config(value: serde_json::Value) -> Result<Config> {
        parse_config(
            &format!("sha256:{HEX}").parse().unwrap(),
            value.to_string().as_bytes(),
        )
    }

    #[test]
    fn a_config_with_nulls_reads_as_empty() {
        let parsed = config(json!({
            "os": "linux", "architecture": "amd64",
            "config": {"Env": null, "Labels": null, "Cmd": ["sh"], "Volumes": {"/data": {}},
                       "ExposedPorts": {"80/tcp": {}}, "User": "1000:1000", "StopSignal": "SIGINT"},
            "rootfs": {"type": "layers", "diff_ids": null}
        }))
        .unwrap();
        assert_eq!(parsed.image.cmd, ["sh"]);
        assert_eq!(parsed.image.volumes, ["/data"]);
        assert_eq!(parsed.image.exposed_ports, ["80/tcp"]);
        assert!(parsed.image.env.is_empty() && parsed.diff_ids.is_empty());
        assert!(config(json!({"config": null, "rootfs": {}})).is_ok());
    }

    #[test]
    fn an_abusive_config_is_refused() {
        let of = |key: &str, value: serde_json::Value| {
            config(json!({"config": {key: value}, "rootfs": {}}))
        };
        assert!(of("Env", json!(vec!["a=b"; CONFIG_ENTRIES_MAX + 1])).is_err());
        assert!(of("Env", json!(["x".repeat(CONFIG_BYTES_MAX + 1)])).is_err());
        assert!(of("Labels", json!({"x": "y".repeat(CONFIG_BYTES_MAX)})).is_err());
        assert!(of("Env", json!("not a list")).is_err());
        assert!(of("User", json!(7)).is_err());
        assert!(config(json!({"rootfs": {"diff_ids": ["sha256:x"]}})).is_err());
        assert!(config(json!([])).is_err());
    }
}

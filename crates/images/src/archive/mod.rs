//! Images in and out as files: OCI image layouts (directory or tar) and docker archives.

mod collect;
mod export;
mod import;

use serde::Deserialize;

/// One entry of a docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// Full name of an image (containerd's key, which docker writes too).
const NAME: &str = "io.containerd.image.name";
/// Name or tag of an image (OCI image-spec, annotations.md): writers differ.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

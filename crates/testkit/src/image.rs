//! Images made in memory: good ones, and bad ones on purpose.
//!
//! ```text
//! let layer = Layer::new().dir("etc", 0o755).file("etc/motd", b"hello");
//! let image = ImageBuilder::new().layer(layer, Compression::Gzip).cmd(["/bin/sh"]).build();
//! ```

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

pub use gantry_types::Digest;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// SHA-256 of some bytes.
pub fn digest(bytes: &[u8]) -> Digest {
    Digest::sha256(Sha256::digest(bytes).into())
}

/// Bytes with their digest and media type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    pub media_type: String,
    pub digest: Digest,
    pub data: Vec<u8>,
}

impl Blob {
    pub fn new(media_type: &str, data: Vec<u8>) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: digest(&data),
            data,
        }
    }

    pub fn json(media_type: &str, value: &Value) -> Self {
        Self::new(media_type, value.to_string().into_bytes())
    }

    /// The descriptor that a manifest has for it.
    pub fn descriptor(&self) -> Value {
        json!({
            "mediaType": self.media_type,
            "digest": self.digest.to_string(),
            "size": self.data.len(),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Plain,
    Gzip,
    Zstd,
}

impl Compression {
    fn pack(self, data: &[u8]) -> Vec<u8> {
        // Writing to memory cannot fail.
        match self {
            Compression::Plain => data.to_vec(),
            Compression::Gzip => gzip(data),
            Compression::Zstd => zstd::encode_all(data, 1).expect("zstd in memory"),
        }
    }

    fn of(media_type: &str) -> Self {
        match media_type.rsplit(['.', '+']).next() {
            Some("gzip") => Compression::Gzip,
            Some("zstd") => Compression::Zstd,
            _ => Compression::Plain,
        }
    }

    fn media_type(self, types: Types) -> &'static str {
        match (types, self) {
            (Types::Docker, Compression::Gzip) => {
                "application/vnd.docker.image.rootfs.diff.tar.gzip"
            }
            (Types::Docker, _) => "application/vnd.docker.image.rootfs.diff.tar",
            (Types::Oci, Compression::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (Types::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Types::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// One gzip member.
pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).expect("gzip in memory");
    encoder.finish().expect("gzip in memory")
}

/// Which family of media types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Types {
    Oci,
    Docker,
}

/// A layer's tar stream, entry by entry. Names are written as given: `..`, absolute names, NULs
/// and the rest of it are the caller's to try.
#[derive(Clone, Debug)]
pub struct Layer {
    tar: Vec<u8>,
}

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}

impl Layer {
    pub fn new() -> Self {
        Self { tar: Vec::new() }
    }

    /// A header of type `kind`, dated 1 700 000 000, that a caller may change before it is written.
    pub fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header
    }

    /// Appends any entry: name and link as they are, long ones in GNU extension headers. The
    /// data is padded to a block; `header` gets its checksum.
    #[must_use]
    pub fn raw(mut self, mut header: tar::Header, path: &[u8], link: &[u8], data: &[u8]) -> Self {
        fn field(tar: &mut Vec<u8>, kind: u8, field: &mut [u8], text: &[u8]) {
            field.fill(0);
            if text.len() <= field.len() {
                field[..text.len()].copy_from_slice(text);
                return;
            }
            let mut long = Layer::header(tar::EntryType::new(kind), 0, text.len() as u64 + 1);
            long.as_mut_bytes()[..13].copy_from_slice(b"././@LongLink");
            long.set_cksum();
            tar.extend_from_slice(long.as_bytes());
            append(tar, &[text, b"\0"].concat());
            field.copy_from_slice(&text[..field.len()]);
        }
        let old = header.as_old_mut();
        field(&mut self.tar, b'K', &mut old.linkname, link);
        field(&mut self.tar, b'L', &mut old.name, path);
        header.set_cksum();
        self.tar.extend_from_slice(header.as_bytes());
        append(&mut self.tar, data);
        self
    }

    /// A pax header for the entry that follows.
    #[must_use]
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            // The length counts its own digits.
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length += 1;
            }
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        let mut header = Self::header(tar::EntryType::XHeader, 0o644, body.len() as u64);
        header.set_cksum();
        self.tar.extend_from_slice(header.as_bytes());
        append(&mut self.tar, &body);
        self
    }

    #[must_use]
    pub fn entry(self, kind: tar::EntryType, path: &str, link: &str, mode: u32) -> Self {
        self.raw(
            Self::header(kind, mode, 0),
            path.as_bytes(),
            link.as_bytes(),
            b"",
        )
    }

    #[must_use]
    pub fn file(self, path: &str, data: &[u8]) -> Self {
        self.file_mode(path, data, 0o644)
    }

    #[must_use]
    pub fn file_mode(self, path: &str, data: &[u8], mode: u32) -> Self {
        let header = Self::header(tar::EntryType::Regular, mode, data.len() as u64);
        self.raw(header, path.as_bytes(), b"", data)
    }

    #[must_use]
    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(tar::EntryType::Directory, path, "", mode)
    }

    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Symlink, path, target, 0o777)
    }

    #[must_use]
    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Link, path, target, 0o644)
    }

    #[must_use]
    pub fn fifo(self, path: &str) -> Self {
        self.entry(tar::EntryType::Fifo, path, "", 0o600)
    }

    #[must_use]
    pub fn device(self, path: &str, kind: tar::EntryType, major: u32, minor: u32) -> Self {
        let mut header = Self::header(kind, 0o600, 0);
        // A GNU header has these fields.
        let _ = header
            .set_device_major(major)
            .and(header.set_device_minor(minor));
        self.raw(header, path.as_bytes(), b"", b"")
    }

    /// Deletes `path` of the layers below.
    #[must_use]
    pub fn whiteout(self, path: &str) -> Self {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = if dir.is_empty() {
            String::new()
        } else {
            format!("{dir}/")
        };
        self.file(&format!("{dir}.wh.{name}"), b"")
    }

    /// Hides what the layers below have in `dir` (empty: everywhere).
    #[must_use]
    pub fn opaque(self, dir: &str) -> Self {
        let dir = if dir.is_empty() {
            String::new()
        } else {
            format!("{dir}/")
        };
        self.file(&format!("{dir}.wh..wh..opq"), b"")
    }

    /// Takes a directory of the host with everything in it, owned by root.
    pub fn directory(mut self, from: &Path) -> io::Result<Self> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.mode(tar::HeaderMode::Complete);
        builder.follow_symlinks(false);
        builder.append_dir_all(".", from)?;
        let tar = builder.into_inner()?;
        // Without the two blocks of zeros that end an archive.
        self.tar.extend_from_slice(&tar[..tar.len() - 1024]);
        Ok(self)
    }

    /// The archive, ended.
    pub fn tar(&self) -> Vec<u8> {
        let mut tar = self.tar.clone();
        tar.extend_from_slice(&[0; 1024]);
        tar
    }
}

fn append(tar: &mut Vec<u8>, data: &[u8]) {
    tar.extend_from_slice(data);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

/// An image as a registry serves it: a manifest with its parts.
#[derive(Clone, Debug)]
pub struct Image {
    pub manifest: Blob,
    pub config: Blob,
    pub layers: Vec<Blob>,
    pub diff_ids: Vec<Digest>,
}

impl Image {
    /// The image id that a node must give it.
    pub fn id(&self) -> String {
        self.config.digest.to_string()
    }

    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.layers.iter().chain([&self.config, &self.manifest])
    }

    /// The same with another manifest, whatever that says.
    #[must_use]
    pub fn with_manifest(mut self, change: impl FnOnce(&mut Value)) -> Self {
        let mut value: Value = serde_json::from_slice(&self.manifest.data).expect("our own JSON");
        change(&mut value);
        self.manifest = Blob::json(&self.manifest.media_type, &value);
        self
    }
}

/// Builds an [`Image`].
#[derive(Clone, Debug)]
pub struct ImageBuilder {
    /// Layers of another image, packed already, with their diff ids.
    base: Vec<(Digest, Compression, Blob)>,
    layers: Vec<(Vec<u8>, Compression)>,
    config: Value,
    platform: (String, String, String),
    types: Types,
}

impl Default for ImageBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl ImageBuilder {
    pub fn new() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            base: Vec::new(),
            layers: Vec::new(),
            config: json!({}),
            platform: ("linux".to_owned(), architecture.to_owned(), String::new()),
            types: Types::Oci,
        }
    }

    /// Begins with the layers of `image`, as they are; the configuration is not taken along.
    pub fn on(image: &Image) -> Self {
        let mut builder = Self::new();
        let layers = image.diff_ids.iter().zip(&image.layers);
        builder.base = layers
            .map(|(id, blob)| (id.clone(), Compression::of(&blob.media_type), blob.clone()))
            .collect();
        builder
    }

    #[must_use]
    pub fn layer(self, layer: Layer, compression: Compression) -> Self {
        self.tar(layer.tar(), compression)
    }

    /// A layer of any bytes.
    #[must_use]
    pub fn tar(mut self, tar: Vec<u8>, compression: Compression) -> Self {
        self.layers.push((tar, compression));
        self
    }

    /// A layer that is packed already; layers given so come below all others.
    #[must_use]
    pub fn packed(mut self, diff_id: Digest, compression: Compression, data: Vec<u8>) -> Self {
        let blob = Blob::new(compression.media_type(self.types), data);
        self.base.push((diff_id, compression, blob));
        self
    }

    #[must_use]
    pub fn types(mut self, types: Types) -> Self {
        self.types = types;
        self
    }

    #[must_use]
    pub fn platform(mut self, os: &str, architecture: &str, variant: &str) -> Self {
        self.platform = (os.to_owned(), architecture.to_owned(), variant.to_owned());
        self
    }

    /// A key of the configuration's `config`: `Env`, `User`, `Labels`.
    #[must_use]
    pub fn config(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    #[must_use]
    pub fn cmd<const N: usize>(self, cmd: [&str; N]) -> Self {
        self.config("Cmd", json!(cmd.to_vec()))
    }

    #[must_use]
    pub fn user(self, user: &str) -> Self {
        self.config("User", json!(user))
    }

    pub fn build(self) -> Image {
        let (mut diff_ids, mut layers) = (Vec::new(), Vec::new());
        for (id, compression, mut blob) in self.base {
            compression
                .media_type(self.types)
                .clone_into(&mut blob.media_type);
            diff_ids.push(id);
            layers.push(blob);
        }
        for (tar, compression) in &self.layers {
            diff_ids.push(digest(tar));
            let media_type = compression.media_type(self.types);
            layers.push(Blob::new(media_type, compression.pack(tar)));
        }
        let (os, architecture, variant) = &self.platform;
        let mut config = json!({
            "created": "2024-01-01T00:00:00Z",
            "os": os,
            "architecture": architecture,
            "config": self.config,
            "rootfs": {
                "type": "layers",
                "diff_ids": diff_ids.iter().map(Digest::to_string).collect::<Vec<_>>(),
            },
        });
        if !variant.is_empty() {
            config["variant"] = json!(variant);
        }
        let (manifest_type, config_type) = match self.types {
            Types::Oci => (OCI_MANIFEST, OCI_CONFIG),
            Types::Docker => (DOCKER_MANIFEST, DOCKER_CONFIG),
        };
        let config = Blob::json(config_type, &config);
        let manifest = Blob::json(
            manifest_type,
            &json!({
                "schemaVersion": 2,
                "mediaType": manifest_type,
                "config": config.descriptor(),
                "layers": layers.iter().map(Blob::descriptor).collect::<Vec<_>>(),
            }),
        );
        Image {
            manifest,
            config,
            layers,
            diff_ids,
        }
    }
}

/// Operating system, architecture and variant (empty: none).
pub type Platform<'a> = (&'a str, &'a str, &'a str);

/// An index over images with their platforms; `None` leaves the platform out.
pub fn index(images: &[(&Image, Option<Platform<'_>>)], types: Types) -> Blob {
    let entries: Vec<Value> = images
        .iter()
        .map(|(image, platform)| {
            let mut entry = image.manifest.descriptor();
            if let Some((os, architecture, variant)) = platform {
                entry["platform"] = json!({"os": os, "architecture": architecture});
                if !variant.is_empty() {
                    entry["platform"]["variant"] = json!(variant);
                }
            }
            entry
        })
        .collect();
    index_of(entries, types)
}

/// An index over any descriptors.
pub fn index_of(entries: Vec<Value>, types: Types) -> Blob {
    let media_type = match types {
        Types::Oci => OCI_INDEX,
        Types::Docker => DOCKER_INDEX,
    };
    let value = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries});
    Blob::json(media_type, &value)
}

/// The files of an OCI image layout with these descriptors in its `index.json`.
pub fn oci_layout(entries: Vec<Value>, blobs: &[&Blob]) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    files.insert(
        "oci-layout".to_owned(),
        br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
    );
    files.insert("index.json".to_owned(), index_of(entries, Types::Oci).data);
    for blob in blobs {
        files.insert(
            format!("blobs/sha256/{}", blob.digest.hex()),
            blob.data.clone(),
        );
    }
    files
}

/// The files of an OCI image layout of one image under a full name.
pub fn oci_layout_of(image: &Image, name: &str) -> BTreeMap<String, Vec<u8>> {
    let mut entry = image.manifest.descriptor();
    entry["annotations"] = json!({"io.containerd.image.name": name});
    oci_layout(vec![entry], &image.blobs().collect::<Vec<_>>())
}

/// The files of a docker archive, as `docker save` wrote it before it knew OCI.
pub fn docker_files(images: &[(&Image, &[&str])], layer_tar: bool) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut manifest = Vec::new();
    for (image, tags) in images {
        let config = format!("{}.json", image.config.digest.hex());
        let mut layers = Vec::new();
        for layer in &image.layers {
            let name = match layer_tar {
                true => format!("{}/layer.tar", layer.digest.hex()),
                false => format!("{}.tar.gz", layer.digest.hex()),
            };
            files.insert(name.clone(), layer.data.clone());
            layers.push(name);
        }
        files.insert(config.clone(), image.config.data.clone());
        manifest.push(json!({"Config": config, "RepoTags": tags, "Layers": layers}));
    }
    files.insert(
        "manifest.json".to_owned(),
        json!(manifest).to_string().into_bytes(),
    );
    files
}

/// Writes files into a directory.
pub fn write_dir(files: &BTreeMap<String, Vec<u8>>, dir: &Path) -> io::Result<()> {
    for (name, data) in files {
        let path = dir.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, data)?;
    }
    Ok(())
}

/// Writes files as a tar archive.
pub fn write_tar(files: &BTreeMap<String, Vec<u8>>, out: impl Write) -> io::Result<()> {
    let mut builder = tar::Builder::new(out);
    for (name, data) in files {
        let mut header = Layer::header(tar::EntryType::Regular, 0o644, data.len() as u64);
        builder.append_data(&mut header, name, data.as_slice())?;
    }
    builder.into_inner()?.flush()
}

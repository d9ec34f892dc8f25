//! Looking whether an image is still what it says, and bringing anew what is not.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::sync::Arc;

use gantry_ports::snapshotter::Whiteouts;
use gantry_ports::{Snapshotter, Snapshotters};
use gantry_types::Digest;

use crate::cancel::Cancel;
use crate::credentials::Credentials;
use crate::hash::Hasher;
use crate::image::Image;
use crate::install::{self, Layer};
use crate::pull::Renew;
use crate::reference::Reference;
use crate::service::{Images, Inner, LayersInUse, blocking};
use crate::{Error, Result, compare};

/// What an image was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub id: String,
    pub manifest: Digest,
    pub names: Vec<String>,
    /// Blobs whose digest was computed, and their bytes.
    pub blobs: u64,
    pub bytes: u64,
    /// Unpacked layers that were compared with their archives.
    pub layers: u64,
    pub faults: Vec<Fault>,
    /// What could not be looked at, and why that is no fault.
    pub notes: Vec<String>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub what: Faulty,
    /// One line for people, with the digest.
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Faulty {
    Blob(Digest),
    /// An unpacked layer, by snapshotter and chain id.
    Layer(&'static str, Digest),
}

/// The layers whose trees containers see.
struct Seen {
    snapshotters: Snapshotters,
    in_use: Arc<dyn LayersInUse>,
}

impl LayersInUse for Seen {
    fn chains(&self, name: &str) -> Option<HashSet<Digest>> {
        let named = self.snapshotters.named(name);
        match named.map(|named| named.whiteouts()) {
            // Copies are independent of them.
            Some(Whiteouts::Apply) => Some(HashSet::new()),
            Some(Whiteouts::Overlay) | None => self.in_use.chains(name),
        }
    }
}

impl Images {
    /// Computes the digests of an image's blobs, unpacks its layers once more and compares each
    /// with what is there. Reads all of it and needs the space of one layer.
    pub async fn verify(&self, name_or_id: &str) -> Result<Verified> {
        let name = name_or_id.to_owned();
        let image = self.status(&name)?.ok_or(Error::NoSuchImage { name })?;
        let mut lease = self.inner.leases.lease();
        lease.hold(&image.blobs);
        lease.hold(&image.layers);
        let work = self.inner.clone();
        let verified = blocking("image verification", move || verify(&work, &image)).await;
        drop(lease);
        verified
    }

    /// Brings anew what [`Images::verify`] found to be bad, by a pull of one of the image's names
    /// with the node's credentials. Returns what remains as it is and why; verify again to see.
    pub async fn repair(
        &self,
        verified: &Verified,
        in_use: Arc<dyn LayersInUse>,
    ) -> Result<Vec<String>> {
        let mut renew = Renew::default();
        let mut remains = Vec::new();
        let seen: Arc<dyn LayersInUse> = Arc::new(Seen {
            snapshotters: self.inner.snapshotters.clone(),
            in_use,
        });
        let used: HashMap<&str, Option<HashSet<Digest>>> = self
            .inner
            .snapshotters
            .iter()
            .map(|snapshotter| (snapshotter.name(), seen.chains(snapshotter.name())))
            .collect();
        let stands = |name: &str, chain: &Digest| match used.get(name) {
            Some(Some(used)) => used.contains(chain),
            Some(None) => true,
            None => false,
        };
        for fault in &verified.faults {
            match &fault.what {
                Faulty::Blob(digest) => renew.blobs.push(digest.clone()),
                Faulty::Layer(name, chain) if stands(name, chain) => remains.push(format!(
                    "layer {chain} stays as it is while containers stand on it"
                )),
                Faulty::Layer(name, chain) => renew.chains.push((name, chain.clone())),
            }
        }
        if renew.blobs.is_empty() && renew.chains.is_empty() {
            return Ok(remains);
        }
        let name = verified.names.iter().find(|name| name.contains('@'));
        let Some(name) = name.or(verified.names.first()) else {
            remains.push("the image has no name to fetch it by: import it again".to_owned());
            return Ok(remains);
        };
        // By digest: the same image or none. What the registry has under the tag is another matter,
        // the more so for an image that was imported.
        let named: Reference = name.parse()?;
        let reference = match named.digest() {
            Some(_) => named,
            None => named.with_digest(&verified.manifest).parse()?,
        };
        renew.in_use = Some(seen);
        let (credentials, cancel) = (Credentials::default(), Cancel::default());
        let renewed =
            crate::pull::renew(&self.inner, &reference, &credentials, &cancel, renew).await;
        // Also after a failure: what was bad is not wanted back.
        let work = self.inner.clone();
        blocking("layer removal", move || work.purge()).await?;
        let id = renewed.map_err(|error| match error {
            Error::Denied {
                reference,
                host,
                status,
                request,
                detail,
            } => Error::Denied {
                reference,
                host,
                status,
                request,
                detail: format!(
                    "{detail} (a repair has the node's own credentials alone, images.credentials and \
                     images.docker_config: those that came with a pull are not kept)"
                ),
            },
            other => other,
        })?;
        if id != verified.id {
            remains.push(format!("{name} is another image by now: {id}"));
        }
        Ok(remains)
    }
}

fn verify(inner: &Inner, image: &Image) -> Result<Verified> {
    let mut verified = Verified {
        id: image.id.clone(),
        manifest: image.manifest.digest.clone(),
        names: image.tags.iter().chain(&image.digests).cloned().collect(),
        blobs: 0,
        bytes: 0,
        layers: 0,
        faults: Vec::new(),
        notes: Vec::new(),
    };
    let mut bad = HashSet::new();
    let layer_blobs: HashSet<&Digest> = image.layer_blobs().iter().collect();
    for digest in &image.blobs {
        let reason = match hashed(inner, digest) {
            // It says nothing of the others.
            Err(error) => format!("blob {digest} cannot be read: {error}"),
            Ok(Some((size, true))) => {
                verified.blobs += 1;
                verified.bytes += size;
                continue;
            }
            Ok(Some((size, false))) => {
                format!("blob {digest}: its {size} bytes have another digest")
            }
            // Its layer came from an image that packs it otherwise, or it was not kept.
            Ok(None) if layer_blobs.contains(digest) && !missing_layer(inner, image, digest) => {
                bad.insert(digest.clone());
                verified.notes.push(format!(
                    "blob {digest} is not kept, so that its unpacked layer is taken as it is"
                ));
                continue;
            }
            Ok(None) => format!("blob {digest} is missing"),
        };
        bad.insert(digest.clone());
        verified.faults.push(Fault {
            what: Faulty::Blob(digest.clone()),
            reason,
        });
    }
    // Which layers there are is what manifest and configuration say.
    if image
        .blobs
        .iter()
        .take(2)
        .any(|digest| bad.contains(digest))
    {
        return Ok(verified);
    }
    let layers = install::layers_of(inner, &image.manifest.digest)?;
    for (n, layer) in layers.iter().enumerate() {
        let mut unpacked = false;
        for snapshotter in inner.snapshotters.iter() {
            if !snapshotter.has_layer(&layer.chain) {
                continue;
            }
            unpacked = true;
            if !bad.contains(&layer.blob.digest) {
                tree(inner, snapshotter, &layers[..n], layer, &mut verified)?;
            }
        }
        if !unpacked {
            verified.notes.push(format!(
                "layer {} is not unpacked: it will be when a container needs it",
                layer.chain
            ));
        }
    }
    Ok(verified)
}

fn missing_layer(inner: &Inner, image: &Image, blob: &Digest) -> bool {
    let mut pairs = image.layer_blobs().iter().zip(&image.layers);
    pairs.any(|(own, chain)| own == blob && !inner.snapshotters.first().has_layer(chain))
}

/// Size of a blob and whether its digest is right; `None` if it is not here.
fn hashed(inner: &Inner, digest: &Digest) -> Result<Option<(u64, bool)>> {
    if inner.content.size(digest)?.is_none() {
        return Ok(None);
    }
    let mut blob = inner.content.open_blob(digest)?;
    let mut hasher = Hasher::new(digest.algorithm());
    let mut buffer = vec![0; 128 << 10];
    let mut size = 0;
    loop {
        let n = blob
            .read(&mut buffer)
            .map_err(|e| Error::io(format_args!("blob {digest}"), e))?;
        if n == 0 {
            return Ok(Some((size, hasher.is(digest))));
        }
        size += n as u64;
        hasher.update(&buffer[..n]);
    }
}

/// Whether a blob that is here has its digest.
pub fn is_sound(inner: &Inner, digest: &Digest) -> Result<bool> {
    Ok(hashed(inner, digest)?.is_some_and(|(_, sound)| sound))
}

/// Unpacks a layer and compares.
fn tree(
    inner: &Inner,
    snapshotter: &Arc<dyn Snapshotter>,
    below: &[Layer],
    layer: &Layer,
    verified: &mut Verified,
) -> Result<()> {
    let differences = match install::stage_again(inner, snapshotter, below, layer) {
        Ok(staged) => {
            let (Some(wanted), Some(found)) = (staged.dir(), snapshotter.layer_dir(&layer.chain))
            else {
                return Ok(());
            };
            match compare::trees(wanted, &found) {
                Ok(differences) => differences,
                Err(error) => vec![format!("cannot be read: {error}")],
            }
        }
        // Nothing is wrong with the layer when the disk is full.
        Err(error) if install::is_local(&error) => return Err(error),
        Err(error) => vec![error.to_string()],
    };
    verified.layers += 1;
    // Most nodes have one, which goes without saying.
    let of = match inner.snapshotters.are_several() {
        true => format!(" of {}", snapshotter.name()),
        false => String::new(),
    };
    for difference in differences {
        verified.faults.push(Fault {
            what: Faulty::Layer(snapshotter.name(), layer.chain.clone()),
            reason: format!("layer {}{of}: {difference}", layer.chain),
        });
    }
    Ok(())
}

//! The face of this crate: the images of the node.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use gantry_ports::snapshotter::Usage;
use gantry_ports::{Snapshotter, Snapshotters};
use gantry_store::Store;
use gantry_store::record::ImageRecord;
use gantry_types::times::Reading;
use gantry_types::{Digest, ErrorKind, Kind};
use globset::{Glob, GlobSet, GlobSetBuilder};

use crate::budget::Budget;
use crate::catalog::Catalog;
use crate::content::Content;
use crate::credentials::Credentials;
use crate::image::Image;
use crate::joined::{Pulling, Pulls};
use crate::lease::{Lease, Leases};
use crate::platform::Accepted;
use crate::progress::Progress;
use crate::pull::BlobLocks;
use crate::reference::Reference;
use crate::unpack::Limits;
use crate::{Error, Result, failpoint, index, install, registry};

/// How this node handles images.
#[derive(Clone, Debug)]
pub struct Options {
    pub registry: registry::Settings,
    /// Names (globs, matched against every tag and digest name) of images that the kubelet must
    /// not collect: `registry.k8s.io/pause*`.
    pub pinned: Vec<String>,
    /// Layers of one image that are fetched and unpacked at once.
    pub layers_at_once: usize,
    /// Transfers of all pulls on which bytes move at once.
    pub parallel_downloads: usize,
    /// Layers of all images that are unpacked at once; decompression is one thread each.
    pub parallel_unpacks: usize,
    /// Bytes a second that all pulls together may take from the network.
    pub bandwidth: Option<NonZeroU64>,
    pub limits: Limits,
    /// How long blobs that no image refers to stay: a failed pull goes on with what it has.
    pub keep_unreferenced: Duration,
    pub platforms: Accepted,
    /// Compressed layers go once they are unpacked. The image cannot be exported then.
    pub discard_unpacked_layers: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            registry: registry::Settings::default(),
            pinned: Vec::new(),
            layers_at_once: 3,
            parallel_downloads: 12,
            parallel_unpacks: std::thread::available_parallelism().map_or(2, usize::from),
            bandwidth: None,
            limits: Limits::default(),
            keep_unreferenced: Duration::from_secs(3600),
            platforms: Accepted::host(),
            discard_unpacked_layers: false,
        }
    }
}

/// A request of [`Images::pull`].
#[derive(Clone, Debug, Default)]
pub struct PullRequest {
    /// As the caller wrote it; normalised here.
    pub reference: String,
    pub credentials: Credentials,
    /// Who unpacks it beside the first snapshotter, by name.
    pub snapshotter: Option<String>,
}

/// Tells which layers the snapshots of containers stand on.
pub trait LayersInUse: Send + Sync {
    /// Chain ids, of the snapshotter with this name; `None` when that is not known, and it may be
    /// any. Asked after the image that is being removed can no longer be found.
    fn chains(&self, snapshotter: &str) -> Option<HashSet<Digest>>;
}

/// Where it is always known.
impl<F: Fn(&str) -> HashSet<Digest> + Send + Sync> LayersInUse for F {
    fn chains(&self, snapshotter: &str) -> Option<HashSet<Digest>> {
        Some(self(snapshotter))
    }
}

/// What a file system has in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsInfo {
    /// A directory on it.
    pub mountpoint: PathBuf,
    pub used_bytes: u64,
    pub inodes_used: u64,
}

/// An image whose layers stay while this lives. Container creation holds one until its record
/// names the layers.
#[derive(Debug)]
pub struct ImageInUse {
    image: Arc<Image>,
    _layers: Lease,
    /// What layers are to be unpacked from, until they are.
    sources: Mutex<Lease>,
}

impl std::ops::Deref for ImageInUse {
    type Target = Arc<Image>;

    fn deref(&self) -> &Arc<Image> {
        &self.image
    }
}

/// The images of the node. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub content: Content,
    pub store: Arc<Store>,
    pub snapshotters: Snapshotters,
    pub options: Options,
    pub pinned: GlobSet,
    pub client: registry::Client,
    pub leases: Leases,
    pub pulls: Pulls,
    pub blob_locks: BlobLocks,
    pub layers_at_once: usize,
    pub budget: Budget,
    /// What readers see.
    catalog: RwLock<Arc<Catalog>>,
    /// Held from the reading of the catalog to the publication of the next one.
    pub(crate) changing: Arc<tokio::sync::Mutex<()>>,
    /// Held while what was removed is deleted.
    deleting: Arc<tokio::sync::Mutex<()>>,
    /// The records lag behind the catalog: a change could not be written down.
    behind: AtomicBool,
    /// Records of images that could not be read at the start, for a fault of the disk or of the node
    /// and not of the image. They are kept, and tried again; until then nothing is known to be without
    /// an image that needs it.
    unread: Mutex<HashMap<String, ImageRecord>>,
    /// Keys of records that a newer gantryd wrote. They are never replaced, and may name any blob
    /// and layer.
    newer: HashSet<String>,
    usage: Mutex<HashMap<(&'static str, Digest), Usage>>,
    /// Where containers write, if that is not the file system of the layers.
    containers: Option<PathBuf>,
}

impl Images {
    /// Opens the content store at `<root>/content` and publishes the images of the store's
    /// records and of `index.json` that are complete. Blocks.
    ///
    /// The caller has called [`Snapshotter::clean`] of each.
    pub fn open(
        root: &Path,
        store: Arc<Store>,
        snapshotters: impl Into<Snapshotters>,
        options: Options,
    ) -> Result<Self> {
        let snapshotters = snapshotters.into();
        let mut usage = HashMap::new();
        for snapshotter in snapshotters.iter() {
            let layers = snapshotter.layers()?.into_iter();
            usage.extend(layers.map(|(chain, usage)| ((snapshotter.name(), chain), usage)));
        }
        let mut inner = Inner {
            content: Content::open(&root.join("content"))?,
            pinned: globs(&options.pinned)?,
            client: registry::Client::new(options.registry.clone()),
            leases: Leases::default(),
            pulls: Pulls::default(),
            blob_locks: BlobLocks::default(),
            layers_at_once: options.layers_at_once.max(1),
            budget: Budget::new(
                options.parallel_downloads,
                options.parallel_unpacks,
                options.bandwidth,
            ),
            catalog: RwLock::default(),
            changing: Arc::default(),
            deleting: Arc::default(),
            behind: AtomicBool::new(false),
            unread: Mutex::default(),
            newer: HashSet::new(),
            usage: Mutex::new(usage),
            containers: own_file_system(snapshotters.first().as_ref())?,
            store,
            snapshotters,
            options,
        };
        let (catalog, changed) = inner.recover()?;
        inner.publish(catalog.clone());
        if changed {
            inner.write_down(&catalog)?;
        }
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Pulls an image and returns its id (the digest of its configuration). Identical requests
    /// that come while one is under way share it. The pull goes on while anybody waits for it;
    /// once all of its callers have left it ends, and the next one goes on with what it fetched.
    pub async fn pull(&self, request: PullRequest) -> Result<String> {
        self.pull_watched(request, drop).await
    }

    /// As [`Images::pull`]; `watch` is given the counters of the pull before it goes on.
    pub async fn pull_watched(
        &self,
        request: PullRequest,
        watch: impl FnOnce(Progress),
    ) -> Result<String> {
        crate::joined::pull(&self.inner, request, watch).await
    }

    /// The pulls under way, the oldest first.
    pub fn pulls(&self) -> Vec<Pulling> {
        self.inner.pulls.under_way()
    }

    /// How long pulls took, one that many waited for counted once.
    pub fn pull_times(&self) -> Reading {
        self.inner.pulls.times()
    }

    /// Transfers that have a place among those of the node, and those that wait for one.
    pub fn transfers(&self) -> (usize, usize) {
        self.inner.budget.transfers()
    }

    /// Every image. From memory.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.inner.catalog().images().cloned().collect()
    }

    /// The image of a name in any form: reference, short name, id with or without `sha256:`,
    /// unique prefix of an id. From memory.
    pub fn status(&self, name_or_id: &str) -> Result<Option<Arc<Image>>> {
        self.inner.catalog().find(name_or_id)
    }

    /// As [`Images::status`], and keeps the image's layers on disk while the result lives, and what
    /// they are to be unpacked from.
    pub fn use_image(&self, name_or_id: &str) -> Result<Option<ImageInUse>> {
        let Some(image) = self.status(name_or_id)? else {
            return Ok(None);
        };
        let [mut layers, mut blobs] = [(); 2].map(|()| self.inner.leases.lease());
        layers.hold(&image.layers);
        let mut snapshotters = self.inner.snapshotters.iter();
        if !snapshotters.all(|snapshotter| is_unpacked(snapshotter, &image)) {
            blobs.hold(&image.blobs);
        }
        // Removed between look-up and lease: its layers may be gone.
        if self.inner.catalog().get(&image.id).is_none() {
            return Ok(None);
        }
        Ok(Some(ImageInUse {
            image,
            _layers: layers,
            sources: Mutex::new(blobs),
        }))
    }

    /// Unpacks those layers of an image that `snapshotter`, one of the node's, has not: of an image
    /// that is only fetched, or was unpacked for another. Nothing to do for most.
    pub async fn unpack(
        &self,
        image: &ImageInUse,
        snapshotter: &Arc<dyn Snapshotter>,
    ) -> Result<()> {
        if is_unpacked(snapshotter, image) {
            return Ok(());
        }
        let mut lease = self.inner.leases.lease();
        lease.hold(&image.blobs);
        let (work, wanted) = (self.inner.clone(), snapshotter.clone());
        let all = Arc::clone(image);
        blocking("blob look-up", move || work.can_unpack(&all, &wanted)).await?;
        let manifest = image.manifest.digest.clone();
        let (inner, wanted) = (self.inner.clone(), snapshotter.clone());
        to_its_end("layer unpack", async move {
            let none = &mut Vec::new();
            let held = install::install(&inner, &wanted, None, &manifest, lease, none).await?;
            drop(held);
            Ok(())
        })
        .await?;
        let unpacked = self.inner.leases.lease();
        *image.sources.lock().unwrap_or_else(PoisonError::into_inner) = unpacked;
        self.inner.discard(image).await;
        Ok(())
    }

    /// Whether all layers of an image are unpacked for the first snapshotter.
    pub fn is_unpacked(&self, image: &Image) -> bool {
        is_unpacked(self.inner.snapshotters.first(), image)
    }

    /// Gives an image another name, which moves to it from the image that had it. Returns the
    /// image's id and the name in full.
    pub async fn tag(&self, name_or_id: &str, target: &str) -> Result<(String, String)> {
        let target: Reference = target.parse()?;
        let Some(tagged) = target.tagged() else {
            return Err(Error::Reference {
                reference: target.to_string(),
                reason: "a name by digest says itself what it is".to_owned(),
            });
        };
        let none = || Error::NoSuchImage {
            name: name_or_id.to_owned(),
        };
        let image = self.use_image(name_or_id)?.ok_or_else(none)?;
        let mut lease = self.inner.leases.lease();
        lease.hold(&image.blobs);
        let manifest = image.manifest.digest.clone();
        let admitted = self
            .inner
            .admit(manifest, vec![tagged.clone()], Vec::new(), lease);
        Ok((admitted.await?.id.clone(), tagged))
    }

    /// Removes an image with all its names, and the layers and blobs that nothing else needs.
    /// A name that is no image is success.
    pub async fn remove(&self, name_or_id: &str, in_use: Arc<dyn LayersInUse>) -> Result<()> {
        let name = name_or_id.to_owned();
        let removal = self.inner.change("image removal", move |work| {
            let Some(image) = work.catalog().find(&name)? else {
                // An earlier removal may have failed half way: it is done when this says so.
                return work.catch_up();
            };
            // The other way round than a pull: record last. The deletion needs no space that a
            // full disk does not have.
            let mut catalog = Catalog::clone(&work.catalog());
            catalog.remove(&image.id);
            work.behind.store(true, Ordering::Relaxed);
            work.publish(catalog.clone());
            // What fails here is for the next collection: the image must not come back.
            let collected = work.collect_of(&image, in_use.as_ref());
            match work.write_down(&catalog) {
                // Not even for the index is there room: what was removed makes some.
                Err(error) if error.kind() == ErrorKind::ResourceExhausted => {
                    work.purge()?;
                    work.write_down(&catalog)?;
                }
                written => written?,
            }
            collected
        });
        removal.await?;
        self.inner.give_back().await;
        Ok(())
    }

    /// Removes layers that neither an image nor a container needs and blobs that no image has
    /// needed for a while ([`Options::keep_unreferenced`]). Walks the disk: for a timer.
    pub async fn collect(&self, in_use: Arc<dyn LayersInUse>) -> Result<()> {
        let collection = self.inner.change("image collection", move |work| {
            work.read_again()?;
            work.collect_all(in_use.as_ref())?;
            work.catch_up()
        });
        collection.await?;
        self.inner.give_back().await;
        Ok(())
    }

    /// Adopts images that `index.json` names and that are complete, but that are not listed.
    /// Returns how many. [`Images::open`] does this by itself.
    pub async fn rebuild(&self) -> Result<usize> {
        let rebuild = self.inner.change("image rebuild", |work| {
            let mut catalog = Catalog::clone(&work.catalog());
            let before = catalog.images().count();
            work.adopt_from_index(&mut catalog)?;
            let added = catalog.images().count() - before;
            work.write_down(&catalog)?;
            work.publish(catalog);
            Ok(added)
        });
        rebuild.await
    }

    /// The file system that containers write to, if it is another than that of the layers: what all
    /// of it has in use (statfs(2)), since to walk what containers wrote would take minutes.
    pub fn container_fs_info(&self) -> Result<Option<FsInfo>> {
        let Some(path) = &self.inner.containers else {
            return Ok(None);
        };
        let stat = gantry_sys::fs::statfs(path)
            .map_err(|e| Error::io(format_args!("statfs {}", path.display()), e))?;
        let block = u64::try_from(stat.f_bsize).unwrap_or_default();
        let blocks = stat.f_blocks.saturating_sub(stat.f_bfree);
        Ok(Some(FsInfo {
            mountpoint: path.clone(),
            used_bytes: blocks.saturating_mul(block),
            inodes_used: stat.f_files.saturating_sub(stat.f_ffree),
        }))
    }

    /// Space and inodes of the layers of each snapshotter, as counted when they were made; all blobs
    /// are counted with the first. From memory.
    pub fn fs_info(&self) -> Vec<FsInfo> {
        let (blob_bytes, blobs) = self.inner.content.used();
        let usage = self.inner.usage();
        let one = |(n, snapshotter): (usize, &Arc<dyn Snapshotter>)| {
            let blobs = match n {
                0 => Usage {
                    bytes: blob_bytes,
                    inodes: blobs,
                },
                _ => Usage::default(),
            };
            let own = usage
                .iter()
                .filter(|((name, _), _)| *name == snapshotter.name());
            let sum = own.fold(blobs, |sum, (_, usage)| Usage {
                bytes: sum.bytes.saturating_add(usage.bytes),
                inodes: sum.inodes.saturating_add(usage.inodes),
            });
            FsInfo {
                mountpoint: snapshotter.root().to_owned(),
                used_bytes: sum.bytes,
                inodes_used: sum.inodes,
            }
        };
        self.inner
            .snapshotters
            .iter()
            .enumerate()
            .map(one)
            .collect()
    }
}

fn is_unpacked(snapshotter: &Arc<dyn Snapshotter>, image: &Image) -> bool {
    let mut layers = image.layers.iter();
    layers.all(|chain| snapshotter.has_layer(chain))
}

/// Whether a blob is a layer that is unpacked. One blob may be several layers.
fn is_unpacked_blob(snapshotter: &Arc<dyn Snapshotter>, image: &Image, blob: &Digest) -> bool {
    let blobs = image.layer_blobs().iter().zip(&image.layers);
    let mut layers = blobs.filter(|(own, _)| *own == blob).peekable();
    layers.peek().is_some() && layers.all(|(_, chain)| snapshotter.has_layer(chain))
}

/// Where containers write, if that is not the file system of the layers.
fn own_file_system(snapshotter: &dyn Snapshotter) -> Result<Option<PathBuf>> {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| {
        let metadata = std::fs::metadata(path);
        metadata.map_err(|e| Error::io(format_args!("stat {}", path.display()), e))
    };
    let containers = snapshotter.containers();
    let same = device(containers)?.dev() == device(snapshotter.root())?.dev();
    Ok((!same).then(|| containers.to_owned()))
}

/// How long a removal waits for the deletion of what it removed.
const DELETION: Duration = Duration::from_secs(10);

/// Runs blocking work on a thread for it.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Error::Worker { what }))
}

/// Runs work on to its end, also when the caller goes away: what holds layers must not be dropped
/// while threads of it are at them.
pub(crate) async fn to_its_end<T: Send + 'static>(
    what: &'static str,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .unwrap_or(Err(Error::Worker { what }))
}

fn globs(patterns: &[String]) -> Result<GlobSet> {
    let mut set = GlobSetBuilder::new();
    let bad = |e: globset::Error| Error::invalid("pinned image pattern", e);
    for pattern in patterns {
        set.add(Glob::new(pattern).map_err(bad)?);
    }
    set.build().map_err(bad)
}

impl Inner {
    pub fn catalog(&self) -> Arc<Catalog> {
        self.catalog
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn publish(&self, catalog: Catalog) {
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(catalog);
    }

    /// By snapshotter and chain id.
    pub fn usage(&self) -> MutexGuard<'_, HashMap<(&'static str, Digest), Usage>> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn usage_of(&self, snapshotter: &Arc<dyn Snapshotter>, chain: &Digest) -> Option<Usage> {
        let key = (snapshotter.name(), chain.clone());
        self.usage().get(&key).copied()
    }

    /// Notes what committed layers occupy.
    pub fn count(&self, snapshotter: &Arc<dyn Snapshotter>, layers: Vec<(Digest, Usage)>) {
        let layers = layers.into_iter();
        self.usage()
            .extend(layers.map(|(chain, usage)| ((snapshotter.name(), chain), usage)));
    }

    fn is_pinned(&self, image: &Image) -> bool {
        image
            .tags
            .iter()
            .chain(&image.digests)
            .any(|name| self.pinned.is_match(name))
    }

    /// The images of records and index that are complete, and whether records and index differ
    /// from them. Records go first: a name that both claim is theirs.
    fn recover(&mut self) -> Result<(Catalog, bool)> {
        let scan = self.store.scan::<ImageRecord>()?;
        for (key, error) in scan.unreadable {
            tracing::error!(%key, %error, "an image record cannot be read: it is kept as it is");
            if error.is_newer() {
                self.newer.insert(key);
            }
        }
        let mut catalog = Catalog::default();
        let mut changed = false;
        let mut records = scan.records;
        // Of two records with one name the newer is right: the older was not yet rewritten.
        records.sort_by_key(|(_, record)| record.created_at);
        for (key, record) in records {
            match self.image_of(&record) {
                Ok(image) => changed |= !catalog.insert(image).is_empty(),
                Err(error @ (Error::Io { .. } | Error::Snapshotter(_))) => {
                    tracing::error!(image = %key, %error,
                        "an image cannot be read: it is not listed, its record is kept, and nothing \
                         is collected until it can be");
                    self.unread().insert(key, record);
                }
                Err(error) => {
                    tracing::warn!(image = %key, %error, "an image is incomplete: pull it anew");
                    self.store.remove::<ImageRecord>(&key)?;
                    changed = true;
                }
            }
        }
        let before = catalog.images().count();
        if let Err(error) = self.adopt_from_index(&mut catalog) {
            tracing::error!(%error, "the index of the content store is written anew");
            changed = true;
        }
        changed |= catalog.images().count() != before;
        changed |= before > 0 && !self.content.index_path().exists();
        Ok((catalog, changed))
    }

    fn unread(&self) -> MutexGuard<'_, HashMap<String, ImageRecord>> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all images are known, so that what none of them needs may go.
    pub fn all_read(&self) -> bool {
        let unread = self.unread();
        for id in unread.keys() {
            tracing::warn!(image = %id, "nothing is collected while an image cannot be read");
        }
        for id in &self.newer {
            tracing::warn!(image = %id, "nothing is collected while there is a newer image record");
        }
        unread.is_empty() && self.newer.is_empty()
    }

    /// Lists the images that could not be read before and now can.
    fn read_again(&self) -> Result<()> {
        let unread: Vec<ImageRecord> = self.unread().values().cloned().collect();
        let mut catalog = Catalog::clone(&self.catalog());
        let mut changed = false;
        for record in unread {
            match self.image_of(&record) {
                Err(Error::Io { .. } | Error::Snapshotter(_)) => continue,
                Err(error) => {
                    tracing::warn!(image = %record.id, %error, "an image is incomplete: pull it anew");
                }
                Ok(mut image) => {
                    // A name that another image was given meanwhile is that one's.
                    let free = |name: &String| !matches!(catalog.find(name), Ok(Some(_)));
                    image.tags.retain(free);
                    image.digests.retain(free);
                    image.pinned = self.is_pinned(&image);
                    catalog.insert(image);
                }
            }
            self.unread().remove(&record.id);
            changed = true;
        }
        if changed {
            self.publish(catalog.clone());
            self.write_down(&catalog)?;
        }
        Ok(())
    }

    fn image_of(&self, record: &ImageRecord) -> Result<Image> {
        let manifest = record
            .manifest
            .parse()
            .map_err(|e| Error::invalid(&record.id, e))?;
        let mut image = self.load_complete(&manifest)?;
        if image.id != record.id {
            return Err(Error::mismatch(
                &record.id,
                "its manifest is that of another image",
            ));
        }
        image = image.with_names(record.tags.clone(), record.digests.clone());
        image.created_at = record.created_at;
        image.pinned = self.is_pinned(&image);
        Ok(image)
    }

    /// The image of a manifest, if each of its layers is here: unpacked for the first snapshotter, or
    /// to be unpacked.
    fn load_complete(&self, manifest: &Digest) -> Result<Image> {
        let image = Image::load(&self.content, manifest)?;
        for (chain, blob) in image.layers.iter().zip(image.layer_blobs()) {
            if !self.snapshotters.first().has_layer(chain) && self.content.size(blob)?.is_none() {
                return Err(Error::Gone { blob: blob.clone() });
            }
        }
        Ok(image)
    }

    /// A blob of the image that is not here, and that is not of layers which are unpacked for the
    /// first snapshotter.
    fn lacks(&self, image: &Image) -> Result<Option<Digest>> {
        let first = self.snapshotters.first();
        for blob in &image.blobs {
            if !is_unpacked_blob(first, image, blob) && self.content.size(blob)?.is_none() {
                return Ok(Some(blob.clone()));
            }
        }
        Ok(None)
    }

    /// Whether a blob is a layer that no snapshotter has to unpack any more.
    pub fn is_unpacked_everywhere(&self, image: &Image, blob: &Digest) -> bool {
        let mut snapshotters = self.snapshotters.iter();
        snapshotters.all(|snapshotter| is_unpacked_blob(snapshotter, image, blob))
    }

    /// Fails unless the blobs of those layers are here that `snapshotter` has not.
    fn can_unpack(&self, image: &Image, snapshotter: &Arc<dyn Snapshotter>) -> Result<()> {
        for (chain, blob) in image.layers.iter().zip(image.layer_blobs()) {
            if !snapshotter.has_layer(chain) && self.content.size(blob)?.is_none() {
                return Err(Error::NotUnpacked {
                    image: image.id.clone(),
                    snapshotter: snapshotter.name(),
                    blob: blob.clone(),
                });
            }
        }
        Ok(())
    }

    fn adopt_from_index(&self, catalog: &mut Catalog) -> Result<()> {
        for (manifest, named) in index::read(&self.content.index_path())? {
            let mut image = match self.load_complete(&manifest) {
                Ok(image) => image,
                Err(error) => {
                    tracing::warn!(%manifest, %error, "index.json names an incomplete image");
                    continue;
                }
            };
            if catalog.get(&image.id).is_some() {
                continue;
            }
            let free = |name: &String| !matches!(catalog.find(name), Ok(Some(_)));
            let tags = named.tags.into_iter().filter(free).collect();
            let digests = named.digests.into_iter().filter(free).collect();
            image = image.with_names(tags, digests);
            image.created_at = named.created_at;
            image.pinned = self.is_pinned(&image);
            catalog.insert(image);
        }
        Ok(())
    }

    /// Runs a change of the catalog, beside which no other happens, on a thread for it. The lock is
    /// the work's and not the caller's: one that goes away in the middle must not let another
    /// change begin from what this one is about to replace.
    pub async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        what: &'static str,
        work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let changing = self.changing.clone().lock_owned().await;
        let inner = self.clone();
        blocking(what, move || {
            let done = work(&inner);
            drop(changing);
            done
        })
        .await
    }

    /// Gives back the space of what was removed. Nobody holds a lock meanwhile, nor is waited for
    /// without end: among it may be millions of files that a container wrote. What cannot be
    /// deleted is tried again by the next.
    pub async fn give_back(self: &Arc<Self>) {
        let purge = async {
            // One at a time: two would be at the same trees.
            let alone = self.deleting.clone().lock_owned().await;
            let work = self.clone();
            blocking("deletion", move || {
                let purged = work.purge();
                drop(alone);
                purged
            })
            .await
        };
        match tokio::time::timeout(DELETION, purge).await {
            Ok(Err(error)) => tracing::warn!(%error, "space of what was removed is not given back"),
            Ok(Ok(())) => {}
            Err(_) => tracing::info!("what was removed takes long to delete; that goes on"),
        }
    }

    /// Writes down what an earlier change could not.
    fn catch_up(&self) -> Result<()> {
        if self.behind.load(Ordering::Relaxed) {
            self.write_down(&self.catalog())?;
        }
        Ok(())
    }

    /// Makes index and records say what `catalog` says; durable on return.
    fn write_down(&self, catalog: &Catalog) -> Result<()> {
        self.behind.store(true, Ordering::Relaxed);
        failpoint::at("images::before-write-down")?;
        index::write(&self.content.index_path(), catalog)?;
        let records: HashMap<String, ImageRecord> = self
            .store
            .scan::<ImageRecord>()?
            .records
            .into_iter()
            .collect();
        for image in catalog.images() {
            self.unread().remove(&image.id);
            let record = image.record();
            if self.newer.contains(&image.id) {
                // The index says as much as we know of it.
                continue;
            }
            if records.get(&image.id) != Some(&record) {
                self.store.put(&image.id, &record)?;
            }
        }
        for id in records.keys().filter(|id| catalog.get(id).is_none()) {
            if !self.unread().contains_key(id) {
                self.store.remove::<ImageRecord>(id)?;
            }
        }
        self.behind.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Adds an image whose blobs and layers are on disk, and held by `lease`, under these names
    /// besides those it has.
    pub async fn admit(
        self: &Arc<Self>,
        manifest: Digest,
        tags: Vec<String>,
        digests: Vec<String>,
        lease: Lease,
    ) -> Result<Arc<Image>> {
        let admission = self.change("image record", move |work| {
            // Until the image is listed it is what keeps its parts.
            let mut held = lease;
            let image = work.load_complete(&manifest)?;
            held.hold(image.blobs.iter().chain(&image.layers));
            let mut catalog = Catalog::clone(&work.catalog());
            let known = catalog.get(&image.id).cloned();
            let merge = |old: Option<&Vec<String>>, new: Vec<String>| {
                let mut names = old.cloned().unwrap_or_default();
                names.extend(new);
                names.sort();
                names.dedup();
                names
            };
            let known = known.as_deref();
            let mut image = image.with_names(
                merge(known.map(|image| &image.tags), tags),
                merge(known.map(|image| &image.digests), digests),
            );
            let now = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            let now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
            image.created_at = known.map_or(now, |image| image.created_at);
            image.pinned = work.is_pinned(&image);
            // With its names it has the indexes that they name.
            if !work.content.settle(&image.blobs)?
                && let Some(blob) = work.lacks(&image)?
            {
                return Err(Error::Gone { blob });
            }
            work.content.sync()?;
            let id = image.id.clone();
            if known == Some(&image) {
                return Ok(known
                    .cloned()
                    .map(Arc::new)
                    .unwrap_or_else(|| Arc::new(image)));
            }
            for loser in catalog.insert(image) {
                work.repin(&mut catalog, &loser);
            }
            work.write_down(&catalog)?;
            let image = catalog
                .get(&id)
                .cloned()
                .ok_or(Error::NoSuchImage { name: id })?;
            work.publish(catalog);
            Ok(image)
        });
        admission.await
    }

    /// An image that lost a name may have lost the one that pinned it.
    fn repin(&self, catalog: &mut Catalog, id: &str) {
        if let Some(image) = catalog.get(id) {
            let mut image = Image::clone(image);
            image.pinned = self.is_pinned(&image);
            catalog.insert(image);
        }
    }
}

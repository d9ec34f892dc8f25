//! Layers on disk and the root file systems made of them.
//!
//! All calls block; async callers use a blocking thread. Implementations keep no state that a
//! look at the disk could not rebuild: layers are directories named by chain id, container
//! snapshots are directories named by container id.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_types::{ContainerId, Digest};

use crate::Error;

/// A layer that is being unpacked: write the tree below `dir`, then commit.
#[derive(Debug)]
pub struct Stage {
    pub chain: Digest,
    /// Parent chain id; `None` for a base layer.
    pub parent: Option<Digest>,
    /// Root of the layer's tree while staged; private to this stage.
    pub dir: PathBuf,
}

/// What a committed layer or a snapshot occupies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

/// What a walk through a snapshot has counted.
#[derive(Debug)]
pub enum Measured {
    Whole(Usage),
    /// Of a tree larger than what the walk may cost, with the bound that it met.
    AtLeast(Usage, Error),
}

/// How deletions are written into a staged layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// overlayfs: 0:0 character device, `trusted.overlay.opaque=y` on a directory.
    Overlay,
    /// The stage already holds the parent's tree: deletions are applied to it.
    Apply,
}

/// Whose the files of a mount are, beside what the image says. The default is: nobody's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner<'a> {
    /// Files belong to the ids that their owners in the image have in there.
    pub user_namespace: Option<UserNamespace<'a>>,
    /// SELinux context of every file (`context=`, mount(8)).
    pub label: Option<&'a str>,
}

/// A user namespace, for those who mount through it and for those who count by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserNamespace<'a> {
    pub path: &'a Path,
    pub uids: Ids,
    pub gids: Ids,
}

/// Ids 0 to `length` - 1 inside are `first` and on outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    pub first: u32,
    pub length: u32,
}

impl Ids {
    /// What an id inside is outside; `None` for one that is not mapped. It is not the id of the same
    /// number outside: that is somebody of the host's, or of another pod's.
    pub fn outside(self, inside: u32) -> Option<u32> {
        match inside < self.length {
            true => self.first.checked_add(inside),
            false => None,
        }
    }
}

pub trait Snapshotter: Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// Directory whose file system holds the layers (for ImageFsInfo).
    fn root(&self) -> &Path;

    /// Directory whose file system holds what containers write; may be that of [`Snapshotter::root`].
    fn containers(&self) -> &Path;

    fn whiteouts(&self) -> Whiteouts;

    fn has_layer(&self, chain: &Digest) -> bool;

    /// Starts a layer. Stages of the same chain may exist side by side; the first commit wins.
    fn stage(&self, chain: &Digest, parent: Option<&Digest>) -> Result<Stage, Error>;

    /// Makes the trees durable (one `syncfs` for all of them: it flushes the whole file system, so
    /// one per layer would multiply the wait of every other writer), then visible under their
    /// chain ids by rename, in the order given: base first. The usage is what the unpacker counted;
    /// a layer that has its parent's tree in it ([`Whiteouts::Apply`]) is measured instead. What
    /// each layer occupies is kept with it, and returned. A layer that was committed meanwhile by
    /// someone else is success. On error the stages not yet committed are thrown away.
    fn commit(&self, stages: Vec<(Stage, Usage)>) -> Result<Vec<(Digest, Usage)>, Error>;

    /// Throws a stage away.
    fn abort(&self, stage: Stage) -> Result<(), Error>;

    /// Chain ids of all committed layers with what each occupies.
    fn layers(&self) -> Result<Vec<(Digest, Usage)>, Error>;

    /// The tree of a committed layer, to be read only: an unpacker that stages one layer alone
    /// ([`Whiteouts::Overlay`]) takes from it what the layer above left unsaid. `None` if absent.
    fn layer_dir(&self, chain: &Digest) -> Option<PathBuf>;

    /// Takes a layer out of sight by rename, which is quick enough for a caller that holds a lock;
    /// its space comes back with [`Snapshotter::purge`]. Absent is success.
    fn remove_layer(&self, chain: &Digest) -> Result<(), Error>;

    /// Deletes what was renamed away. May take long.
    fn purge(&self) -> Result<(), Error>;

    /// Makes the writable part of a container's root; idempotent. `layers` from base to top; `owner`
    /// as for the mounts that follow.
    fn prepare(
        &self,
        container: &ContainerId,
        layers: &[Digest],
        owner: Owner<'_>,
    ) -> Result<(), Error>;

    /// Mounts a prepared snapshot at `target` (an existing directory); idempotent.
    /// FailedPrecondition where kernel or file system cannot make its files `owner`'s.
    fn mount(
        &self,
        container: &ContainerId,
        layers: &[Digest],
        target: &Path,
        owner: Owner<'_>,
    ) -> Result<(), Error>;

    /// Mounts `layers` (base to top) at `target` (an existing directory) so that nobody can write
    /// to them, whatever flags a process with every capability changes on its own mount of it;
    /// idempotent. No layers make an empty tree. `owner` as for [`Snapshotter::mount`].
    fn view(&self, layers: &[Digest], target: &Path, owner: Owner<'_>) -> Result<(), Error>;

    /// A directory beside the writable part of a prepared snapshot, counted and removed with it:
    /// for what a container keeps outside its root, the volumes of its image. Made if absent.
    fn volumes(&self, container: &ContainerId) -> Result<PathBuf, Error>;

    /// Unmounts `target`; not mounted is success.
    fn unmount(&self, target: &Path) -> Result<(), Error>;

    /// What the writable part of a prepared snapshot occupies, volumes included. NotFound for a
    /// container without one.
    fn usage(&self, container: &ContainerId) -> Result<Measured, Error>;

    /// Containers that have a snapshot.
    fn snapshots(&self) -> Result<Vec<ContainerId>, Error>;

    /// Removes a container's snapshot; absent is success. The caller has unmounted it.
    fn remove(&self, container: &ContainerId) -> Result<(), Error>;

    /// Start-up: takes what a killed process left half made out of sight. Called before any other
    /// call, when nothing of this process is under way. What it occupied comes back with
    /// [`Snapshotter::purge`]: the daemon does not wait for that.
    fn clean(&self) -> Result<(), Error>;
}

/// The snapshotters of a node: the one of handlers that name none, and those that handlers choose
/// beside it. Cheap to clone.
#[derive(Clone)]
pub struct Snapshotters {
    first: Arc<dyn Snapshotter>,
    others: Arc<[Arc<dyn Snapshotter>]>,
}

impl Snapshotters {
    /// `others` must not name `first`, nor each other, again.
    pub fn new(first: Arc<dyn Snapshotter>, others: Vec<Arc<dyn Snapshotter>>) -> Self {
        Self {
            first,
            others: others.into(),
        }
    }

    /// The one that images are unpacked for at once.
    pub fn first(&self) -> &Arc<dyn Snapshotter> {
        &self.first
    }

    /// All of them, [`Snapshotters::first`] first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Snapshotter>> {
        std::iter::once(&self.first).chain(self.others.iter())
    }

    /// By [`Snapshotter::name`].
    pub fn named(&self, name: &str) -> Option<&Arc<dyn Snapshotter>> {
        self.iter().find(|snapshotter| snapshotter.name() == name)
    }

    /// Whether there are others than the first.
    pub fn are_several(&self) -> bool {
        !self.others.is_empty()
    }
}

impl From<Arc<dyn Snapshotter>> for Snapshotters {
    fn from(only: Arc<dyn Snapshotter>) -> Self {
        Self::new(only, Vec::new())
    }
}

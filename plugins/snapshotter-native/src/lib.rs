//! Layers and root file systems as plain copies: no more is asked of the file system than that it
//! keeps owners and modes, so that it works where overlayfs does not (on overlayfs itself, in a node
//! that is a container; on NFS; on ZFS before 2.2).
//!
//! Below `<root>/native` it is laid out as [`gantry_snapshotter_directories`] says. A layer's `fs` is
//! the whole tree up to that layer, a snapshot's `fs` the whole root of its container, and
//! `views/<serial>/{fs,target}` is what is mounted to be read, as a copy too: a bind mount of the
//! layer itself would be read-only only until a process with every capability says otherwise. Copies
//! share their data where the file system can (btrfs, XFS, bcachefs); elsewhere each costs its size.

mod copy;
mod views;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use gantry_ports::Error;
use gantry_ports::snapshotter::{Measured, Owner, Snapshotter, Stage, Usage, Whiteouts};
use gantry_snapshotter_directories::{Layout, layers, measure, mounts, snapshots};
use gantry_types::{ContainerId, Digest};

const EMPTY: &str = "empty";

/// The native implementation of [`Snapshotter`].
pub struct Native {
    layout: Layout,
}

impl Native {
    /// Opens or makes `<root>/native`.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Self::open_split(root, root)
    }

    /// As [`Native::open`], with what is containers' own below `containers`.
    pub fn open_split(images: &Path, containers: &Path) -> Result<Self, Error> {
        let layout = Layout::open_split(&images.join("native"), &containers.join("native"))?;
        layout.directory(views::DIRECTORY)?;
        // What an image without layers is a copy of.
        let empty = layout.directory(EMPTY)?;
        fs::set_permissions(&empty, fs::Permissions::from_mode(0o755))
            .map_err(|e| Error::io(format_args!("chmod {}", empty.display()), e))?;
        Ok(Self { layout })
    }

    /// Makes `to`, a path that is free, the tree of the topmost of `layers`, or an empty directory.
    fn fill(&self, layers: &[Digest], to: &Path, owner: Owner<'_>) -> Result<(), Error> {
        let from = match layers.last() {
            Some(top) => layers::tree(&self.layout, top)?,
            None => self.layout.directory(EMPTY)?,
        };
        fs::create_dir(to).map_err(|e| Error::io(format_args!("create {}", to.display()), e))?;
        copy::tree(&from, to, owner)
    }
}

impl Snapshotter for Native {
    fn name(&self) -> &'static str {
        "native"
    }

    fn root(&self) -> &Path {
        self.layout.root()
    }

    fn containers(&self) -> &Path {
        self.layout.containers()
    }

    fn whiteouts(&self) -> Whiteouts {
        Whiteouts::Apply
    }

    fn has_layer(&self, chain: &Digest) -> bool {
        // One that cannot be looked at is not known to be gone.
        self.layout.layer(chain).try_exists().unwrap_or(true)
    }

    fn stage(&self, chain: &Digest, parent: Option<&Digest>) -> Result<Stage, Error> {
        let from = parent
            .map(|parent| layers::tree(&self.layout, parent))
            .transpose()?;
        let mut stage = layers::stage(&self.layout, chain, None)?;
        stage.parent = parent.cloned();
        if let Some(from) = from
            && let Err(error) = copy::tree(&from, &stage.dir, Owner::default())
        {
            layers::abort(&self.layout, &stage)?;
            return Err(error);
        }
        Ok(stage)
    }

    fn commit(&self, stages: Vec<(Stage, Usage)>) -> Result<Vec<(Digest, Usage)>, Error> {
        let mut measured = Vec::with_capacity(stages.len());
        let mut stages = stages.into_iter();
        while let Some((stage, _)) = stages.next() {
            match measure(std::slice::from_ref(&stage.dir)) {
                Ok(usage) => measured.push((stage, usage)),
                Err(error) => {
                    let all = measured.iter().chain(stages.as_slice());
                    let all = all.map(|(stage, _)| stage).chain([&stage]);
                    layers::abort_all(&self.layout, all);
                    return Err(error);
                }
            }
        }
        layers::commit(&self.layout, measured)
    }

    fn abort(&self, stage: Stage) -> Result<(), Error> {
        layers::abort(&self.layout, &stage)
    }

    fn layers(&self) -> Result<Vec<(Digest, Usage)>, Error> {
        layers::list(&self.layout)
    }

    fn layer_dir(&self, chain: &Digest) -> Option<PathBuf> {
        layers::tree(&self.layout, chain).ok()
    }

    fn remove_layer(&self, chain: &Digest) -> Result<(), Error> {
        self.layout.discard(&self.layout.layer(chain)).map(drop)
    }

    fn purge(&self) -> Result<(), Error> {
        self.layout.purge()
    }

    fn prepare(
        &self,
        container: &ContainerId,
        layers: &[Digest],
        owner: Owner<'_>,
    ) -> Result<(), Error> {
        snapshots::prepare(&self.layout, container, |stage| {
            self.fill(layers, &stage.join("fs"), owner)
        })
    }

    fn mount(
        &self,
        container: &ContainerId,
        _: &[Digest],
        target: &Path,
        // The copy has it already.
        _: Owner<'_>,
    ) -> Result<(), Error> {
        let own = snapshots::own(&self.layout, container)?;
        if mounts::is_mount_point(target)? {
            return Ok(());
        }
        gantry_sys::mount::bind(&own, target).map_err(|e| {
            let (own, target) = (own.display(), target.display());
            Error::io(format_args!("mount {own} at {target}"), e)
        })
    }

    fn view(&self, layers: &[Digest], target: &Path, owner: Owner<'_>) -> Result<(), Error> {
        if mounts::is_mount_point(target)? {
            return Ok(());
        }
        views::make(&self.layout, target, |to| self.fill(layers, to, owner))
    }

    fn volumes(&self, container: &ContainerId) -> Result<PathBuf, Error> {
        snapshots::volumes(&self.layout, container)
    }

    fn unmount(&self, target: &Path) -> Result<(), Error> {
        mounts::unmount(target)?;
        views::remove(&self.layout, target)
    }

    fn usage(&self, container: &ContainerId) -> Result<Measured, Error> {
        snapshots::usage(&self.layout, container)
    }

    fn snapshots(&self) -> Result<Vec<ContainerId>, Error> {
        snapshots::list(&self.layout)
    }

    fn remove(&self, container: &ContainerId) -> Result<(), Error> {
        snapshots::remove(&self.layout, container)
    }

    fn clean(&self) -> Result<(), Error> {
        self.layout.clean().and(views::clean(&self.layout))
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

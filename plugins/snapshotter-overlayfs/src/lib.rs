//! Layers and root file systems on overlayfs.
//!
//! Below `<root>/overlayfs` it is laid out as [`gantry_snapshotter_directories`] says. A snapshot's
//! `fs` is the upper directory, with overlayfs's `work` beside it; `empty/{0,1}` lie below layers
//! that are mounted alone.

mod idmap;
mod mount;
mod probe;
mod snapshots;

use std::path::{Path, PathBuf};

use gantry_ports::Error;
use gantry_ports::snapshotter::{Measured, Owner, Snapshotter, Stage, Usage, Whiteouts};
use gantry_snapshotter_directories::{Layout, layers, mounts, snapshots as directories};
use gantry_types::{ContainerId, Digest};

/// The overlayfs implementation of [`Snapshotter`].
pub struct Overlayfs {
    layout: Layout,
}

impl Overlayfs {
    /// Opens or makes `<root>/overlayfs`.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Self::open_split(root, root)
    }

    /// As [`Overlayfs::open`], with what is containers' own below `containers`.
    pub fn open_split(images: &Path, containers: &Path) -> Result<Self, Error> {
        let layout = Layout::open_split(&images.join("overlayfs"), &containers.join("overlayfs"))?;
        snapshots::empty(&layout, 0)?;
        snapshots::empty(&layout, 1)?;
        Ok(Self { layout })
    }

    /// Tries what every container needs of kernel and file system: FailedPrecondition with the
    /// kernel's reason where they do not have it. Mounts, in a mount namespace of its own.
    pub fn probe(&self) -> Result<(), Error> {
        probe::probe(&self.layout)
    }
}

impl Snapshotter for Overlayfs {
    fn name(&self) -> &'static str {
        "overlayfs"
    }

    fn root(&self) -> &Path {
        self.layout.root()
    }

    fn containers(&self) -> &Path {
        self.layout.containers()
    }

    fn whiteouts(&self) -> Whiteouts {
        Whiteouts::Overlay
    }

    fn has_layer(&self, chain: &Digest) -> bool {
        // One that cannot be looked at is not known to be gone.
        self.layout.layer(chain).try_exists().unwrap_or(true)
    }

    fn stage(&self, chain: &Digest, parent: Option<&Digest>) -> Result<Stage, Error> {
        layers::stage(&self.layout, chain, parent)
    }

    fn commit(&self, stages: Vec<(Stage, Usage)>) -> Result<Vec<(Digest, Usage)>, Error> {
        layers::commit(&self.layout, stages)
    }

    fn abort(&self, stage: Stage) -> Result<(), Error> {
        layers::abort(&self.layout, &stage)
    }

    fn layers(&self) -> Result<Vec<(Digest, Usage)>, Error> {
        layers::list(&self.layout)
    }

    fn layer_dir(&self, chain: &Digest) -> Option<PathBuf> {
        let dir = self.layout.layer(chain).join("fs");
        dir.exists().then_some(dir)
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
        // Ids and labels are those of the mount.
        _: Owner<'_>,
    ) -> Result<(), Error> {
        snapshots::prepare(&self.layout, container, layers)
    }

    fn mount(
        &self,
        container: &ContainerId,
        layers: &[Digest],
        target: &Path,
        owner: Owner<'_>,
    ) -> Result<(), Error> {
        snapshots::mount(&self.layout, container, layers, target, owner)
    }

    fn view(&self, layers: &[Digest], target: &Path, owner: Owner<'_>) -> Result<(), Error> {
        snapshots::view(&self.layout, layers, target, owner)
    }

    fn volumes(&self, container: &ContainerId) -> Result<PathBuf, Error> {
        directories::volumes(&self.layout, container)
    }

    fn unmount(&self, target: &Path) -> Result<(), Error> {
        mounts::unmount(target)
    }

    fn usage(&self, container: &ContainerId) -> Result<Measured, Error> {
        directories::usage(&self.layout, container)
    }

    fn snapshots(&self) -> Result<Vec<ContainerId>, Error> {
        directories::list(&self.layout)
    }

    fn remove(&self, container: &ContainerId) -> Result<(), Error> {
        directories::remove(&self.layout, container)
    }

    fn clean(&self) -> Result<(), Error> {
        self.layout.clean()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_the_contract() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP it_keeps_the_contract: mounting needs root");
            return;
        }
        let work = tempfile::tempdir().unwrap();
        gantry_ports::testsuite::snapshotter::run(
            |root| Box::new(Overlayfs::open(root).unwrap()),
            work.path(),
        );
    }

    #[test]
    fn it_keeps_the_contract_on_two_file_systems() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP it_keeps_the_contract_on_two_file_systems: mounting needs root");
            return;
        }
        let work = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir_in("/dev/shm").unwrap();
        gantry_ports::testsuite::snapshotter::run(
            |root| Box::new(Overlayfs::open_split(other.path(), root).unwrap()),
            work.path(),
        );
        assert!(!work.path().join("root/overlayfs/layers").exists());
    }

    #[test]
    fn nobody_else_may_enter() {
        use std::os::unix::fs::PermissionsExt;
        let work = tempfile::tempdir().unwrap();
        let s = Overlayfs::open(work.path()).unwrap();
        for dir in ["", "layers", "stages", "snapshots", "trash", "empty"] {
            let mode = std::fs::metadata(s.root().join(dir))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o700, "{dir}");
        }
    }
}

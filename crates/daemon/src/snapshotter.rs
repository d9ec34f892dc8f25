//! The snapshotters that the configuration names.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use gantry_ports::{Snapshotter, Snapshotters};
use gantry_snapshotter_native::Native;
use gantry_snapshotter_overlayfs::Overlayfs;

use crate::config::{Config, SnapshotterName};
use crate::image_root;

/// Opens them, that of `images.snapshotter` first. Blocks.
///
/// # Errors
/// Kernel or file system cannot do overlayfs; containers of this node have their roots from a
/// snapshotter that no key names any more, or on layers of another `images.root`: they would be lost
/// sight of.
pub fn open(config: &Config) -> Result<Snapshotters> {
    let (images, containers) = (config.image_root(), config.root.as_path());
    let mut named: Vec<Arc<dyn Snapshotter>> = Vec::new();
    let mut left: Vec<Arc<dyn Snapshotter>> = Vec::new();
    for name in SnapshotterName::ALL {
        let key = config.names_snapshotter(name);
        let dirs = [images.join(name.as_str()), containers.join(name.as_str())];
        if key.is_none() && !dirs.iter().any(|dir| dir.exists()) {
            continue;
        }
        let opened: Arc<dyn Snapshotter> = match name {
            SnapshotterName::Overlayfs => {
                let overlayfs = Overlayfs::open_split(images, containers)?;
                if let Some(key) = &key {
                    overlayfs.probe().with_context(|| {
                        format!("{key} = \"native\" works on any file system, by copies")
                    })?;
                }
                Arc::new(overlayfs)
            }
            SnapshotterName::Native => Arc::new(Native::open_split(images, containers)?),
        };
        match key {
            Some(key) => {
                if name == SnapshotterName::Native {
                    tracing::info!(
                        key,
                        "layers and roots are copies: slower and larger than with overlayfs"
                    );
                }
                named.push(opened);
            }
            None => left.push(opened),
        }
    }
    let mounted = gantry_supervisor::mounted_images(&config.state).unwrap_or_else(|error| {
        // There may be one of any: what they stand on is not taken away, and all else goes on.
        tracing::error!(%error, "which images are mounted is not known");
        vec![gantry_supervisor::ImageMount::unknown()]
    });
    let users = |of: &mut dyn Iterator<Item = &Arc<dyn Snapshotter>>| -> Result<Users> {
        let mut users = Users::default();
        for snapshotter in of {
            let name = snapshotter.name();
            let mounted = mounted.iter().filter(|mount| mount.stands_on(name));
            users.containers += snapshotter.snapshots()?.len();
            users.mounted += mounted.count();
        }
        Ok(users)
    };
    let mut has_layers = false;
    for snapshotter in named.iter().chain(&left) {
        has_layers |= !snapshotter.layers()?.is_empty();
    }
    let all = users(&mut named.iter().chain(&left))?;
    image_root::keep(&config.root, images, all, has_layers)?;
    for former in left {
        leave(former.as_ref(), users(&mut std::iter::once(&former))?)?;
    }
    let first = config.images.snapshotter.as_str();
    let first = named.iter().position(|opened| opened.name() == first);
    // `images.snapshotter` is a key that names one.
    let first = named.remove(first.context("images.snapshotter was not opened")?);
    Ok(Snapshotters::new(first, named))
}

/// Who stands on layers.
#[derive(Clone, Copy, Default)]
pub struct Users {
    pub containers: usize,
    /// `gantryctl image mount`
    pub mounted: usize,
}

impl Users {
    pub fn are_none(self) -> bool {
        self.containers + self.mounted == 0
    }
}

impl std::fmt::Display for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} containers", self.containers)?;
        if self.mounted > 0 {
            write!(f, " and {} mounted images", self.mounted)?;
        }
        write!(f, " of this node")
    }
}

/// How they are brought to an end.
pub const END: &str = "remove the containers (crictl rmp -fa), unmount the images (umount)";

/// Deletes the layers of a snapshotter that was configured before: images are unpacked anew.
fn leave(former: &dyn Snapshotter, users: Users) -> Result<()> {
    let name = former.name();
    if !users.are_none() {
        bail!(
            "images.snapshotter: {users} have their files from {name}, which neither it nor \
             runtime.handlers.<name>.snapshotter names: start with it, {END}, and change it then"
        );
    }
    former.clean()?;
    let layers = former.layers()?;
    if !layers.is_empty() {
        tracing::info!(snapshotter = name, layers = layers.len(), "layers removed");
    }
    for (chain, _) in layers {
        former.remove_layer(&chain)?;
    }
    Ok(former.purge()?)
}

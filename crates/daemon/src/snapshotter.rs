//! The snapshotter that the configuration names.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use gantry_ports::Snapshotter;
use gantry_snapshotter_native::Native;
use gantry_snapshotter_overlayfs::Overlayfs;

use crate::config::{Config, SnapshotterName};

/// Opens it. Blocks.
///
/// # Errors
/// Kernel or file system cannot do overlayfs; or containers of this node have their roots from the
/// other snapshotter, which would be lost sight of.
pub fn open(config: &Config) -> Result<Arc<dyn Snapshotter>> {
    let (images, containers) = (config.image_root(), config.root.as_path());
    Ok(match config.images.snapshotter {
        SnapshotterName::Overlayfs => {
            let overlayfs = Overlayfs::open_split(images, containers)?;
            overlayfs
                .probe()
                .context("images.snapshotter = \"native\" works on any file system, by copies")?;
            leave(Native::open_split, images, containers, "native")?;
            Arc::new(overlayfs)
        }
        SnapshotterName::Native => {
            leave(Overlayfs::open_split, images, containers, "overlayfs")?;
            tracing::info!("layers and roots are copies: slower and larger than with overlayfs");
            Arc::new(Native::open_split(images, containers)?)
        }
    })
}

/// Deletes the layers of the snapshotter that was configured before: images are unpacked anew.
fn leave<S: Snapshotter>(
    open: impl FnOnce(&Path, &Path) -> Result<S, gantry_ports::Error>,
    images: &Path,
    containers: &Path,
    name: &str,
) -> Result<()> {
    if !images.join(name).exists() && !containers.join(name).exists() {
        return Ok(());
    }
    let former = open(images, containers)?;
    let snapshots = former.snapshots()?.len();
    if snapshots > 0 {
        bail!(
            "images.snapshotter: {snapshots} containers of this node have their roots from \
             {name}: start with it, remove them (crictl rmp -fa), and change it then"
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

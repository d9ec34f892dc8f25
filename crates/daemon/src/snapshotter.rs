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
    let root = &config.root;
    Ok(match config.images.snapshotter {
        SnapshotterName::Overlayfs => {
            let overlayfs = Overlayfs::open(root)?;
            overlayfs
                .probe()
                .context("images.snapshotter = \"native\" works on any file system, by copies")?;
            leave(Native::open, root, "native")?;
            Arc::new(overlayfs)
        }
        SnapshotterName::Native => {
            leave(Overlayfs::open, root, "overlayfs")?;
            tracing::info!("layers and roots are copies: slower and larger than with overlayfs");
            Arc::new(Native::open(root)?)
        }
    })
}

/// Deletes the layers of the snapshotter that was configured before: images are unpacked anew.
fn leave<S: Snapshotter>(
    open: impl FnOnce(&Path) -> Result<S, gantry_ports::Error>,
    root: &Path,
    name: &str,
) -> Result<()> {
    if !root.join(name).exists() {
        return Ok(());
    }
    let former = open(root)?;
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

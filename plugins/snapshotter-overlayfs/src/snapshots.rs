//! Writable parts of containers' roots.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use gantry_ports::Error;
use gantry_ports::snapshotter::Owner;
use gantry_snapshotter_directories::layers::{copy_root, tree};
use gantry_snapshotter_directories::mounts::is_mount_point;
use gantry_snapshotter_directories::{Layout, snapshots};
use gantry_types::{ContainerId, Digest};

use crate::{idmap, mount};

/// A directory that stays empty: overlayfs without a writable part wants two others.
pub fn empty(layout: &Layout, n: usize) -> Result<PathBuf, Error> {
    layout.directory(format!("empty/{n}"))
}

pub fn prepare(layout: &Layout, container: &ContainerId, layers: &[Digest]) -> Result<(), Error> {
    let top = layers.last().map(|chain| tree(layout, chain)).transpose()?;
    snapshots::prepare(layout, container, |stage| fill(stage, top.as_deref()))
}

fn fill(stage: &Path, top: Option<&Path>) -> Result<(), Error> {
    let upper = stage.join("fs");
    for dir in [&upper, &stage.join("work")] {
        fs::create_dir(dir).map_err(|e| Error::io(format_args!("create {}", dir.display()), e))?;
    }
    match top {
        Some(layer) => copy_root(layer, &upper),
        None => fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))
            .map_err(|e| Error::io(format_args!("chmod {}", upper.display()), e)),
    }
}

pub fn mount(
    layout: &Layout,
    container: &ContainerId,
    layers: &[Digest],
    target: &Path,
    owner: Owner<'_>,
) -> Result<(), Error> {
    let upper = snapshots::own(layout, container)?;
    if is_mount_point(target)? {
        return Ok(());
    }
    let mut lower = lowers(layout, layers)?;
    if lower.is_empty() {
        // overlayfs wants at least one.
        lower.push(empty(layout, 0)?);
    }
    let writable = Some(mount::Writable {
        upper,
        work: layout.snapshot(container).join("work"),
    });
    overlay(lower, writable, target, owner)
}

fn overlay(
    lower: Vec<PathBuf>,
    writable: Option<mount::Writable>,
    target: &Path,
    owner: Owner<'_>,
) -> Result<(), Error> {
    let dirs = mount::Overlay {
        lower,
        writable,
        label: owner.label.map(str::to_owned),
    };
    match owner.user_namespace {
        Some(namespace) => idmap::mount(&dirs, target, namespace.path),
        None => mount::overlay(&dirs, target),
    }
}

/// Trees of the layers, topmost first.
fn lowers(layout: &Layout, layers: &[Digest]) -> Result<Vec<PathBuf>, Error> {
    let layers = layers.iter().rev();
    layers.map(|chain| tree(layout, chain)).collect()
}

pub fn view(
    layout: &Layout,
    layers: &[Digest],
    target: &Path,
    owner: Owner<'_>,
) -> Result<(), Error> {
    if is_mount_point(target)? {
        return Ok(());
    }
    let mut lower = lowers(layout, layers)?;
    // A bind mount of the one layer would do too, but whoever has the capability could make it
    // writable again, and with it the layer of every other container.
    for n in 0..2_usize.saturating_sub(lower.len()) {
        lower.push(empty(layout, n)?);
    }
    overlay(lower, None, target, owner)
}

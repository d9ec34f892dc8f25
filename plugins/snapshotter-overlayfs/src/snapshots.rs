//! Writable parts of containers' roots.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use gantry_ports::Error;
use gantry_ports::snapshotter::{Owner, Usage};
use gantry_types::Digest;
use gantry_types::{ContainerId, ErrorKind};

use crate::layers::copy_root;
use crate::layout::{self, Layout};
use crate::{idmap, mount};

pub fn prepare(layout: &Layout, container: &ContainerId, layers: &[Digest]) -> Result<(), Error> {
    let to = layout.snapshot(container);
    if to.exists() {
        return Ok(());
    }
    let top = layers
        .last()
        .map(|chain| existing(layout, chain))
        .transpose()?;
    let stage = layout.new_stage()?;
    match fill(&stage, top.as_deref()).and_then(|()| {
        fs::rename(&stage, &to).map_err(|e| Error::io(format_args!("create {}", to.display()), e))
    }) {
        Ok(()) => Ok(()),
        Err(error) => {
            // Made meanwhile by a call that was repeated: the same thing under the same name.
            let made = to.exists();
            layout.delete(&stage)?;
            if made { Ok(()) } else { Err(error) }
        }
    }
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

/// Directory of a committed layer.
fn existing(layout: &Layout, chain: &Digest) -> Result<PathBuf, Error> {
    let dir = layout.layer(chain).join("fs");
    match dir.exists() {
        true => Ok(dir),
        false => Err(Error::new(
            ErrorKind::NotFound,
            format!("layer {chain} is not on disk"),
        )),
    }
}

pub fn mount(
    layout: &Layout,
    container: &ContainerId,
    layers: &[Digest],
    target: &Path,
    owner: Owner<'_>,
) -> Result<(), Error> {
    let snapshot = layout.snapshot(container);
    let upper = snapshot.join("fs");
    if !upper.exists() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("snapshot {} does not exist", snapshot.display()),
        ));
    }
    if mount::is_mount_point(target)? {
        return Ok(());
    }
    let mut lower = lowers(layout, layers)?;
    if lower.is_empty() {
        // overlayfs wants at least one.
        lower.push(layout.empty(0));
    }
    let writable = Some(mount::Writable {
        upper,
        work: snapshot.join("work"),
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
        Some(namespace) => idmap::mount(&dirs, target, namespace),
        None => mount::overlay(&dirs, target),
    }
}

/// Trees of the layers, topmost first.
fn lowers(layout: &Layout, layers: &[Digest]) -> Result<Vec<PathBuf>, Error> {
    let layers = layers.iter().rev();
    layers.map(|chain| existing(layout, chain)).collect()
}

pub fn view(
    layout: &Layout,
    layers: &[Digest],
    target: &Path,
    owner: Owner<'_>,
) -> Result<(), Error> {
    if mount::is_mount_point(target)? {
        return Ok(());
    }
    let mut lower = lowers(layout, layers)?;
    // A bind mount of the one layer would do too, but whoever has the capability could make it
    // writable again, and with it the layer of every other container.
    for n in 0..2_usize.saturating_sub(lower.len()) {
        lower.push(layout.empty(n));
    }
    overlay(lower, None, target, owner)
}

pub fn volumes(layout: &Layout, container: &ContainerId) -> Result<PathBuf, Error> {
    let dir = layout.snapshot(container).join("volumes");
    match fs::create_dir(&dir) {
        Ok(()) => Ok(dir),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(dir),
        Err(e) => Err(Error::io(format_args!("create {}", dir.display()), e)),
    }
}

pub fn usage(layout: &Layout, container: &ContainerId) -> Result<Usage, Error> {
    let upper = layout.snapshot(container).join("fs");
    let mut usage = Usage::default();
    // A file with several names counts once.
    let mut linked = HashSet::new();
    let mut pending = Vec::new();
    for root in [upper, layout.snapshot(container).join("volumes")] {
        let metadata = match fs::symlink_metadata(&root) {
            Ok(metadata) => metadata,
            // Most containers have no volumes.
            Err(e) if e.kind() == io::ErrorKind::NotFound && !pending.is_empty() => continue,
            Err(e) => return Err(Error::io(format_args!("stat {}", root.display()), e)),
        };
        usage.bytes += metadata.blocks() * 512;
        usage.inodes += 1;
        pending.push(root);
    }
    while let Some(dir) = pending.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if gone(&e) => continue,
            Err(e) => return Err(Error::io(format_args!("read {}", dir.display()), e)),
        };
        for entry in entries {
            // The container writes while we walk: what vanishes in between does not count.
            let (entry, meta) = match entry.and_then(|e| e.metadata().map(|m| (e, m))) {
                Ok(pair) => pair,
                Err(e) if gone(&e) => continue,
                Err(e) => return Err(Error::io(format_args!("read {}", dir.display()), e)),
            };
            if meta.nlink() > 1 && !meta.is_dir() && !linked.insert(meta.ino()) {
                continue;
            }
            usage.bytes += meta.blocks() * 512;
            usage.inodes += 1;
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(usage)
}

fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

pub fn list(layout: &Layout) -> Result<Vec<ContainerId>, Error> {
    let mut ids = Vec::new();
    for path in layout::entries(&layout.snapshots())? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match name.parse() {
            Ok(id) => ids.push(id),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "not a snapshot of ours: left alone");
            }
        }
    }
    Ok(ids)
}

pub fn remove(layout: &Layout, container: &ContainerId) -> Result<(), Error> {
    layout.delete(&layout.snapshot(container))
}

//! Writable parts of containers' roots.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use gantry_ports::Error;
use gantry_ports::snapshotter::Usage;
use gantry_types::Digest;
use gantry_types::{ContainerId, ErrorKind};

use crate::layers::copy_root;
use crate::layout::{self, Layout};
use crate::mount;

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
    let lower = layers
        .iter()
        .rev()
        .map(|chain| existing(layout, chain))
        .collect::<Result<Vec<_>, _>>()?;
    if lower.is_empty() {
        // overlayfs wants at least one lower directory.
        return mount::bind(&upper, target);
    }
    mount::overlay(
        &mount::Overlay {
            lower,
            upper,
            work: snapshot.join("work"),
        },
        target,
    )
}

pub fn usage(layout: &Layout, container: &ContainerId) -> Result<Usage, Error> {
    let upper = layout.snapshot(container).join("fs");
    let mut usage = Usage::default();
    // A file with several names counts once.
    let mut linked = HashSet::new();
    let root = fs::symlink_metadata(&upper)
        .map_err(|e| Error::io(format_args!("stat {}", upper.display()), e))?;
    usage.bytes += root.blocks() * 512;
    usage.inodes += 1;
    let mut pending = vec![upper];
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

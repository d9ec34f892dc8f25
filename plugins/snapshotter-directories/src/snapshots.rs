//! What belongs to one container: made, measured, listed, removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_ports::Error;
use gantry_ports::snapshotter::Measured;
use gantry_types::{ContainerId, ErrorKind};

use crate::layout::{self, Layout};
use crate::measure::{Bounds, measure_within};

/// Makes a container's snapshot; one that exists is success. `fill` gets the directory that the
/// snapshot will be.
pub fn prepare(
    layout: &Layout,
    container: &ContainerId,
    fill: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<(), Error> {
    let to = layout.snapshot(container);
    if to.exists() {
        return Ok(());
    }
    let stage = layout.new_stage_of_containers()?;
    match fill(&stage).and_then(|()| {
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

/// What is the container's own of its root.
pub fn own(layout: &Layout, container: &ContainerId) -> Result<PathBuf, Error> {
    let snapshot = layout.snapshot(container);
    let own = snapshot.join("fs");
    match own.exists() {
        true => Ok(own),
        false => Err(Error::new(
            ErrorKind::NotFound,
            format!("snapshot {} does not exist", snapshot.display()),
        )),
    }
}

/// The directory for a container's volumes, made if absent.
pub fn volumes(layout: &Layout, container: &ContainerId) -> Result<PathBuf, Error> {
    let dir = layout.snapshot(container).join("volumes");
    match fs::create_dir(&dir) {
        Ok(()) => Ok(dir),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(dir),
        Err(e) => Err(Error::io(format_args!("create {}", dir.display()), e)),
    }
}

/// What a walk through a snapshot may cost: its tree is as its container wants it, may grow ahead of
/// the walk, and others wait to be measured. A million files take a few seconds from memory, and
/// this time from a slow disk; who has walked in vain has brought some of it into memory.
const BOUNDS: Bounds = Bounds {
    entries: 5_000_000,
    time: Duration::from_secs(60),
    held: 64 << 20,
};

/// What a container's snapshot occupies, volumes included.
///
/// # Errors
/// As [`crate::measure()`]. A tree that is too large is counted in part, with ResourceExhausted or
/// DeadlineExceeded.
pub fn usage(layout: &Layout, container: &ContainerId) -> Result<Measured, Error> {
    let snapshot = layout.snapshot(container);
    let mut roots = vec![snapshot.join("fs")];
    // Most containers have no volumes.
    roots.extend(Some(snapshot.join("volumes")).filter(|dir| dir.exists()));
    measure_within(&roots, BOUNDS)
}

/// Containers that have a snapshot.
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

/// Removes a snapshot; absent is success.
pub fn remove(layout: &Layout, container: &ContainerId) -> Result<(), Error> {
    layout.delete(&layout.snapshot(container))
}

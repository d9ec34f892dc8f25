//! Images that people look at: read-only views of their layers (`gantryctl image mount`).
//!
//! The layers of a mounted image stay, whatever becomes of the image and of the daemon. Like the
//! mounts themselves, what is known of them is of this boot: one file in the state directory. It
//! is written before the mount is made, so that no mount is without; an entry whose mount somebody
//! has taken away by hand is dropped when next it is met.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_ports::snapshotter::Owner;
use gantry_types::Digest;
use serde_json::{Value, json};

use crate::mountinfo::{self, MountInfo};
use crate::pod::blocking;
use crate::rundir::{RunDirs, write_file};
use crate::{Context, Error, failpoint};

const MOUNT: &str = "mount image";
const UNMOUNT: &str = "unmount image";

/// An image that is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageMount {
    /// Where, with its links resolved.
    pub target: PathBuf,
    pub image_id: String,
    /// Who made the view, by name.
    pub snapshotter: String,
    /// Chain ids from base to top.
    pub layers: Vec<Digest>,
}

#[derive(Default)]
pub(crate) struct ImageMounts {
    entries: Mutex<Vec<Entry>>,
}

struct Entry {
    mount: ImageMount,
    /// Its mount is being made or taken away, so that it says nothing that there is none.
    busy: bool,
}

impl ImageMounts {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        // Every change is one insertion, removal or assignment.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what an earlier daemon of this boot wrote down.
    pub fn load(&self, file: &Path) -> Result<(), Error> {
        const STEP: &str = "read mounted images";
        let bytes = match fs::read(file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io(STEP, file, &error)),
        };
        let bad = |reason: &dyn std::fmt::Display| {
            Error::internal(STEP, format!("{}: {reason}", file.display()))
        };
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| bad(&error))?;
        let mounts = value.as_array().and_then(|all| {
            let entries = all.iter().map(|value| {
                let mount = parse(value)?;
                Some(Entry { mount, busy: false })
            });
            entries.collect::<Option<Vec<_>>>()
        });
        *self.lock() = mounts.ok_or_else(|| bad(&"is no list of mounted images"))?;
        Ok(())
    }

    /// Those that are there.
    pub fn all(&self) -> Vec<ImageMount> {
        let mounts = mountinfo::read().ok();
        let there = |entry: &&Entry| {
            let mounts = mounts.as_deref().unwrap_or_default();
            // Who cannot see the mounts takes them all for mounted.
            entry.busy || mounts.is_empty() || is_mounted(mounts, &entry.mount.target)
        };
        let entries = self.lock();
        let there = entries.iter().filter(there);
        there.map(|entry| entry.mount.clone()).collect()
    }

    /// Drops those that are mounted no more, and writes the rest down.
    fn keep(&self, file: &Path, mounts: &[MountInfo]) -> Result<(), Error> {
        let mut entries = self.lock();
        entries.retain(|entry| entry.busy || is_mounted(mounts, &entry.mount.target));
        let all: Vec<Value> = entries.iter().map(|entry| print(&entry.mount)).collect();
        let written = match all.is_empty() {
            true => match fs::remove_file(file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
            false => write_file(file, Value::Array(all).to_string().as_bytes(), 0o600),
        };
        written.map_err(|error| Error::io("write down mounted images", file, &error))
    }

    fn set_busy(&self, target: &Path, busy: bool) {
        let mut entries = self.lock();
        for entry in entries.iter_mut() {
            if entry.mount.target == target {
                entry.busy = busy;
            }
        }
    }
}

/// The images that are mounted by daemons over this state directory, for one that is yet to start.
///
/// # Errors
/// What was written down cannot be read.
pub fn mounted_images(state: &Path) -> Result<Vec<ImageMount>, Error> {
    let mounts = ImageMounts::default();
    mounts.load(&RunDirs::new(state, Path::new("")).image_mounts())?;
    Ok(mounts.all())
}

fn print(mount: &ImageMount) -> Value {
    let layers: Vec<&str> = mount.layers.iter().map(Digest::as_str).collect();
    json!({ "target": mount.target, "imageID": mount.image_id,
        "snapshotter": mount.snapshotter, "layers": layers })
}

fn parse(value: &Value) -> Option<ImageMount> {
    let layers = value["layers"].as_array()?.iter();
    Some(ImageMount {
        target: value["target"].as_str()?.into(),
        image_id: value["imageID"].as_str()?.to_owned(),
        snapshotter: value["snapshotter"].as_str()?.to_owned(),
        layers: layers
            .map(|layer| layer.as_str()?.parse().ok())
            .collect::<Option<_>>()?,
    })
}

fn is_mounted(mounts: &[MountInfo], target: &Path) -> bool {
    mounts.iter().any(|mount| mount.point == target)
}

fn invalid(reason: impl ToString) -> Error {
    Error::Invalid {
        field: "target".to_owned(),
        reason: reason.to_string(),
    }
}

/// Mounts an image at `target`, an existing directory on which nothing is mounted, for all to read
/// and nobody to write. It stays mounted until [`unmount`], whatever becomes of this daemon.
pub(crate) async fn mount(
    ctx: &Arc<Context>,
    image: &str,
    target: &Path,
) -> Result<ImageMount, Error> {
    if !target.is_absolute() {
        return Err(invalid("is not an absolute path"));
    }
    let found = ctx.images.use_image(image).map_err(Error::step(MOUNT))?;
    let held = found.ok_or_else(|| Error::NotFound {
        what: "image",
        id: image.to_owned(),
    })?;
    let snapshotter = Arc::clone(ctx.snapshotters.first());
    let unpacked = ctx.images.unpack(&held, &snapshotter).await;
    unpacked.map_err(Error::step(MOUNT))?;
    let (ctx, target) = (Arc::clone(ctx), target.to_owned());
    // Not to be torn apart when the caller goes away.
    blocking(move || {
        let target = directory(&ctx, &target)?;
        let mount = ImageMount {
            target: target.clone(),
            image_id: held.id.clone(),
            snapshotter: snapshotter.name().to_owned(),
            layers: held.layers.clone(),
        };
        let file = ctx.records.dirs.image_mounts();
        let mounts = mountinfo::read()?;
        {
            let mut entries = ctx.image_mounts.lock();
            let busy = |entry: &Entry| entry.busy && entry.mount.target == target;
            if is_mounted(&mounts, &target) || entries.iter().any(busy) {
                return Err(Error::State {
                    what: "directory",
                    id: target.display().to_string(),
                    reason: "something is mounted there".to_owned(),
                });
            }
            entries.retain(|entry| entry.mount.target != target);
            let mount = mount.clone();
            entries.push(Entry { mount, busy: true });
        }
        let mounted = ctx
            .image_mounts
            .keep(&file, &mounts)
            .and_then(|()| failpoint::at("image-mount::written"))
            .and_then(|()| {
                snapshotter
                    .view(&mount.layers, &target, Owner::default())
                    .map_err(Error::step(MOUNT))
            });
        ctx.image_mounts.set_busy(&target, false);
        if let Err(error) = mounted {
            // Also what is half there. Its file names it until the next change: nothing is mounted.
            let undone = snapshotter.unmount(&target);
            undone.map_err(Error::step(MOUNT))?;
            let mut entries = ctx.image_mounts.lock();
            entries.retain(|entry| entry.mount.target != target);
            return Err(error);
        }
        Ok(mount)
    })
    .await
}

/// The directory that `target` names, if images may be mounted on it.
fn directory(ctx: &Context, target: &Path) -> Result<PathBuf, Error> {
    let real = fs::canonicalize(target).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => invalid("does not exist"),
        _ => Error::io(MOUNT, target, &error),
    })?;
    if !real.is_dir() {
        return Err(invalid("is not a directory"));
    }
    // What is mounted there would hide records, layers and sockets.
    if ctx.owns(&real) {
        return Err(invalid("is gantry's own"));
    }
    // What the file in the state directory can name.
    if real.to_str().is_none() {
        return Err(invalid("is not UTF-8"));
    }
    Ok(real)
}

/// Takes the view of an image away.
pub(crate) async fn unmount(ctx: &Arc<Context>, target: &Path) -> Result<(), Error> {
    let (work, target) = (Arc::clone(ctx), target.to_owned());
    let layers_may_go = blocking(move || {
        let ctx = work;
        let target = fs::canonicalize(&target).unwrap_or(target);
        let none = || Error::NotFound {
            what: "mounted image",
            id: target.display().to_string(),
        };
        let found = {
            let mut entries = ctx.image_mounts.lock();
            let entry = entries
                .iter_mut()
                .find(|entry| entry.mount.target == target)
                .ok_or_else(none)?;
            if entry.busy {
                return Err(Error::State {
                    what: "mounted image",
                    id: target.display().to_string(),
                    reason: "it is being mounted or unmounted".to_owned(),
                });
            }
            entry.busy = true;
            entry.mount.clone()
        };
        let mut snapshotters = ctx.snapshotters.iter();
        // Not that of one which is no longer configured: a mount is anybody's to take away.
        let unmounted = snapshotters.try_for_each(|all| all.unmount(&target));
        ctx.image_mounts.set_busy(&target, false);
        unmounted.map_err(Error::step(UNMOUNT))?;
        let mounts = mountinfo::read()?;
        let file = ctx.records.dirs.image_mounts();
        ctx.image_mounts.keep(&file, &mounts)?;
        Ok(!matches!(ctx.images.status(&found.image_id), Ok(Some(_))))
    })
    .await?;
    if layers_may_go {
        ctx.collect_layers().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read_back_without_what_is_mounted_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image-mounts");
        let mount = |target: &str| ImageMount {
            target: target.into(),
            image_id: "sha256:x".to_owned(),
            snapshotter: "native".to_owned(),
            layers: vec![Digest::sha256([1; 32]), Digest::sha256([2; 32])],
        };
        let mounts = ImageMounts::default();
        mounts.load(&file).unwrap();
        assert!(mounts.all().is_empty());
        let (there, gone) = (mount("/there \"quoted\""), mount("/gone"));
        for mount in [&there, &gone] {
            let mount = mount.clone();
            mounts.lock().push(Entry { mount, busy: false });
        }
        let table = "30 22 0:25 / /there\\040\"quoted\" ro - overlay overlay ro\n";
        mounts.keep(&file, &mountinfo::parse(table)).unwrap();
        let again = ImageMounts::default();
        again.load(&file).unwrap();
        let left: Vec<_> = again
            .lock()
            .iter()
            .map(|entry| entry.mount.clone())
            .collect();
        assert_eq!(left, [there]);
        for bad in [
            "",
            "{}",
            "[{}]",
            r#"[{"target":"/a","imageID":"b","layers":["c"]}]"#,
        ] {
            fs::write(&file, bad).unwrap();
            let error = again.load(&file).unwrap_err();
            assert_eq!(
                gantry_types::Kind::kind(&error),
                gantry_types::ErrorKind::Internal
            );
            assert_eq!(again.lock().len(), 1, "{bad}");
        }
    }
}

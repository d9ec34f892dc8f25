//! Images that people look at: read-only views of their layers (`gantryctl image mount`).
//!
//! The layers of a mounted image stay, whatever becomes of the image and of the daemon. Like the
//! mounts themselves, what is known of them is of this boot: one file in the state directory. It
//! is written before the mount is made, so that no mount is without; an entry whose mount somebody
//! has taken away by hand is dropped when next it is met.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// What tells the mount from others at its place; `None` until it is made.
    pub mount_id: Option<u64>,
}

impl ImageMount {
    /// Whether its layers may be of this snapshotter. An older daemon did not say of which.
    pub fn stands_on(&self, snapshotter: &str) -> bool {
        self.snapshotter.is_empty() || self.snapshotter == snapshotter
    }

    /// One that may be anywhere and of anything.
    pub fn unknown() -> Self {
        Self {
            target: PathBuf::new(),
            image_id: String::new(),
            snapshotter: String::new(),
            layers: Vec::new(),
            mount_id: None,
        }
    }

    fn is_there(&self, mounts: &[MountInfo]) -> bool {
        match self.mount_id {
            // Who cannot see the mounts takes them all for mounted.
            _ if mounts.is_empty() => true,
            // The kernel gives the id of a mount that has gone to the next.
            Some(id) => {
                let mut own = mounts.iter().filter(|mount| mount.point == self.target);
                own.any(|mount| mount.id == id)
            }
            None => top(mounts, &self.target).is_some(),
        }
    }
}

#[derive(Default)]
pub(crate) struct ImageMounts {
    entries: Mutex<Vec<Entry>>,
    /// The file is there and says what we do not understand: it is not replaced.
    unread: AtomicBool,
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

    /// Reads what an earlier daemon of this boot wrote down. What cannot be read is kept, and
    /// nothing is mounted or unmounted then.
    pub fn load(&self, file: &Path) -> Result<(), Error> {
        let read = self.read(file);
        self.unread.store(read.is_err(), Ordering::Release);
        read
    }

    fn read(&self, file: &Path) -> Result<(), Error> {
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
        let entries = self.lock();
        let mounts = mountinfo::read().unwrap_or_default();
        let there = |entry: &&Entry| entry.busy || entry.mount.is_there(&mounts);
        let there = entries.iter().filter(there);
        there.map(|entry| entry.mount.clone()).collect()
    }

    fn check_read(&self, file: &Path) -> Result<(), Error> {
        match self.unread.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::State {
                what: "list of mounted images",
                id: file.display().to_string(),
                reason: "cannot be read and is left alone".to_owned(),
            }),
        }
    }

    /// Begins a mount: it is written down, and nothing else is mounted at its place.
    fn begin(&self, file: &Path, mount: ImageMount) -> Result<(), Error> {
        self.check_read(file)?;
        let mut entries = self.lock();
        let mounts = mountinfo::read()?;
        let target = &mount.target;
        let busy = |entry: &Entry| entry.busy && entry.mount.target == *target;
        if top(&mounts, target).is_some() || entries.iter().any(busy) {
            return Err(Error::State {
                what: "directory",
                id: target.display().to_string(),
                reason: "something is mounted there".to_owned(),
            });
        }
        entries.push(Entry { mount, busy: true });
        let kept = keep(&mut entries, file, &mounts);
        if kept.is_err() {
            // Nobody will end it: it must not keep the place, nor the layers.
            entries.pop();
        }
        kept
    }

    /// Ends what [`ImageMounts::begin`] began: with the mount there, or without.
    fn end(&self, file: &Path, target: &Path, made: bool) -> Result<(), Error> {
        let mut entries = self.lock();
        ended(&mut entries, file, target, made, mountinfo::read())
    }
}

/// Whatever fails, the entry is busy no more, and none is dropped for a table that was not read: the
/// layers of a mounted image would be collected under it.
fn ended(
    entries: &mut Vec<Entry>,
    file: &Path,
    target: &Path,
    made: bool,
    mounts: Result<Vec<MountInfo>, Error>,
) -> Result<(), Error> {
    let known = mounts.as_deref().unwrap_or_default();
    entries.retain_mut(|entry| {
        if !entry.busy || entry.mount.target != target {
            return true;
        }
        entry.busy = false;
        entry.mount.mount_id = top(known, target).map(|mount| mount.id);
        made
    });
    keep(entries, file, &mounts?)
}

/// Drops those that are mounted no more, and writes the rest down.
fn keep(entries: &mut Vec<Entry>, file: &Path, mounts: &[MountInfo]) -> Result<(), Error> {
    entries.retain(|entry| entry.busy || entry.mount.is_there(mounts));
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

/// What is seen at `target`, if something is mounted there.
fn top<'a>(mounts: &'a [MountInfo], target: &Path) -> Option<&'a MountInfo> {
    mounts.iter().rfind(|mount| mount.point == target)
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
        "snapshotter": mount.snapshotter, "layers": layers, "mountID": mount.mount_id })
}

fn parse(value: &Value) -> Option<ImageMount> {
    let layers = value["layers"].as_array()?.iter();
    Some(ImageMount {
        target: value["target"].as_str()?.into(),
        image_id: value["imageID"].as_str()?.to_owned(),
        // Who did not say may mean any.
        snapshotter: value["snapshotter"].as_str().unwrap_or_default().to_owned(),
        layers: layers
            .map(|layer| layer.as_str()?.parse().ok())
            .collect::<Option<_>>()?,
        mount_id: value["mountID"].as_u64(),
    })
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
            mount_id: None,
        };
        let file = ctx.records.dirs.image_mounts();
        ctx.image_mounts.begin(&file, mount.clone())?;
        let view = || {
            failpoint::at("image-mount::written")?;
            let made = snapshotter.view(&mount.layers, &target, Owner::default());
            made.map_err(Error::step(MOUNT))
        };
        let made = view().inspect_err(|_| {
            // Also what is half there.
            if let Err(error) = snapshotter.unmount(&target) {
                tracing::warn!(target = %target.display(), %error, "a mount that failed is left");
            }
        });
        let ended = ctx.image_mounts.end(&file, &target, made.is_ok());
        made?;
        if let Err(error) = ended {
            // It is written down without its id: whatever is at its place counts as it.
            tracing::warn!(target = %target.display(), %error, "a mount is not written down in full");
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
    if ctx.owns(&real) || ctx.is_above_own(&real) {
        return Err(invalid("is gantry's own, or above it"));
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
        let state = |reason: &str| Error::State {
            what: "mounted image",
            id: target.display().to_string(),
            reason: reason.to_owned(),
        };
        ctx.image_mounts
            .check_read(&ctx.records.dirs.image_mounts())?;
        let found = {
            let mut entries = ctx.image_mounts.lock();
            let mounts = mountinfo::read()?;
            let entry = entries
                .iter_mut()
                .find(|entry| entry.mount.target == target)
                .ok_or_else(none)?;
            if entry.busy {
                return Err(state("it is being mounted or unmounted"));
            }
            let top = top(&mounts, &target).map(|mount| mount.id);
            // What somebody else has mounted there, over the view or after it, stays.
            if top.is_some() && entry.mount.mount_id.is_some() && top != entry.mount.mount_id {
                return Err(state("something else is mounted there"));
            }
            entry.busy = true;
            entry.mount.clone()
        };
        let mut snapshotters = ctx.snapshotters.iter();
        // Not that of one which is no longer configured: a mount is anybody's to take away.
        let unmounted = snapshotters.try_for_each(|all| all.unmount(&target));
        let file = ctx.records.dirs.image_mounts();
        let ended = ctx.image_mounts.end(&file, &target, unmounted.is_err());
        unmounted.map_err(Error::step(UNMOUNT))?;
        ended?;
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
            mount_id: None,
        };
        let mounts = ImageMounts::default();
        mounts.load(&file).unwrap();
        assert!(mounts.all().is_empty());
        let with_id = |target: &str, id| ImageMount {
            mount_id: Some(id),
            ..mount(target)
        };
        // What cannot be written down is not begun.
        let nowhere = dir.path().join("missing/image-mounts");
        assert!(mounts.begin(&nowhere, mount("/not/begun")).is_err());
        assert!(mounts.lock().is_empty());
        // A table that cannot be read says nothing of what is mounted.
        let mut entries: Vec<Entry> = [("/made", true), ("/other", false)]
            .map(|(target, busy)| Entry {
                mount: mount(target),
                busy,
            })
            .into();
        let unread = Err(Error::internal("read the mount table", "no descriptor"));
        assert!(ended(&mut entries, &file, Path::new("/made"), true, unread).is_err());
        assert_eq!(entries.len(), 2);
        assert!(entries.iter().all(|entry| !entry.busy));
        let there = [mount("/there \"quoted\""), with_id("/covered", 31)];
        let gone = [mount("/gone"), with_id("/another-is-there-now", 7)];
        for mount in there.iter().chain(&gone) {
            let mount = mount.clone();
            mounts.lock().push(Entry { mount, busy: false });
        }
        let table = "\
30 22 0:25 / /there\\040\"quoted\" ro - overlay overlay ro
31 22 0:26 / /covered ro - overlay overlay ro
33 31 0:26 / /covered rw - tmpfs tmpfs rw
32 22 0:27 / /another-is-there-now ro - overlay overlay ro
";
        keep(&mut mounts.lock(), &file, &mountinfo::parse(table)).unwrap();
        let again = ImageMounts::default();
        again.load(&file).unwrap();
        let left: Vec<_> = again
            .lock()
            .iter()
            .map(|entry| entry.mount.clone())
            .collect();
        assert_eq!(left, there);
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
            assert_eq!(again.lock().len(), 2, "{bad}");
            // It may name what is mounted: not to be written over.
            assert!(again.begin(&file, mount("/new")).is_err());
            assert_eq!(fs::read(&file).unwrap(), bad.as_bytes());
        }
    }
}

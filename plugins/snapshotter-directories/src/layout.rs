//! The directories, and the two ways anything leaves them: by rename, then by deletion.

use std::ffi::CStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use gantry_ports::Error;
use gantry_types::{ContainerId, Digest};
use rustix::fs::{AtFlags, CWD, Dir, FileType, IFlags, Mode, OFlags};
use rustix::io::Errno;

/// Where everything is: layers below one root, and what is containers' own below another or the
/// same. What is made is made beside the place where it goes, so that a rename puts it there.
pub struct Layout {
    images: PathBuf,
    containers: PathBuf,
    /// Names of stages and trash, unique within the process. Those that a former one left are
    /// stepped over.
    serial: AtomicU64,
}

impl Layout {
    /// Opens the directories below `root`, or makes them.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Self::open_split(root, root)
    }

    /// As [`Layout::open`], with what is containers' own below `containers`, on a file system of its
    /// own perhaps.
    pub fn open_split(images: &Path, containers: &Path) -> Result<Self, Error> {
        let layout = Self {
            images: images.to_owned(),
            containers: containers.to_owned(),
            serial: AtomicU64::new(0),
        };
        for dir in [
            images.to_owned(),
            layout.layers(),
            containers.to_owned(),
            layout.snapshots(),
        ] {
            make(&dir)?;
        }
        for root in layout.roots() {
            make(&root.join(STAGES))?;
            make(&root.join(TRASH))?;
        }
        Ok(layout)
    }

    fn roots(&self) -> [&Path; 2] {
        [&self.images, &self.containers]
    }

    /// A directory of the implementation's own, made if absent.
    pub fn directory(&self, name: impl AsRef<Path>) -> Result<PathBuf, Error> {
        let dir = self.images.join(name);
        make(&dir)?;
        Ok(dir)
    }

    /// Holds the layers.
    pub fn root(&self) -> &Path {
        &self.images
    }

    /// Holds what is containers' own.
    pub fn containers(&self) -> &Path {
        &self.containers
    }

    pub fn layers(&self) -> PathBuf {
        self.images.join("layers")
    }

    /// A SHA-256 chain id is 64 digits and a SHA-512 one is 128, so the digits alone tell.
    pub fn layer(&self, chain: &Digest) -> PathBuf {
        self.layers().join(chain.hex())
    }

    pub fn snapshots(&self) -> PathBuf {
        self.containers.join("snapshots")
    }

    pub fn snapshot(&self, container: &ContainerId) -> PathBuf {
        self.snapshots().join(container.as_str())
    }

    /// A new directory, mode 0700, for what becomes a layer.
    pub fn new_stage(&self) -> Result<PathBuf, Error> {
        self.new_stage_in(&self.images)
    }

    /// A new directory, mode 0700, for what becomes a container's own.
    pub fn new_stage_of_containers(&self) -> Result<PathBuf, Error> {
        self.new_stage_in(&self.containers)
    }

    fn new_stage_in(&self, root: &Path) -> Result<PathBuf, Error> {
        loop {
            let dir = root.join(STAGES).join(self.next().to_string());
            match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => return Ok(dir),
                // Left by another instance over the same root that has not been cleaned.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(format_args!("create {}", dir.display()), e)),
            }
        }
    }

    /// Renames `path` into the trash; `None` if it does not exist.
    pub fn discard(&self, path: &Path) -> Result<Option<PathBuf>, Error> {
        // A rename does not leave its file system.
        let own =
            path.starts_with(self.snapshots()) || path.starts_with(self.containers.join(STAGES));
        let root = if own { &self.containers } else { &self.images };
        loop {
            let to = root.join(TRASH).join(self.next().to_string());
            match fs::rename(path, &to) {
                Ok(()) => return Ok(Some(to)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
                    ) => {}
                Err(e) => return Err(Error::io(format_args!("discard {}", path.display()), e)),
            }
        }
    }

    /// Renames `path` away, then deletes it. What cannot be deleted stays in the trash, of which
    /// every purge tries to delete all: it is out of sight, which is what callers count on.
    pub fn delete(&self, path: &Path) -> Result<(), Error> {
        if let Some(trash) = self.discard(path)?
            && let Err(error) = remove_tree(&trash)
        {
            tracing::warn!(path = %path.display(), %error, "its space is not given back");
        }
        Ok(())
    }

    /// Deletes what is in the trash. All of it is tried; the first failure is returned.
    pub fn purge(&self) -> Result<(), Error> {
        let [images, containers] = self.roots();
        empty(&images.join(TRASH)).and(empty(&containers.join(TRASH)))
    }

    /// Takes stages of a process that is gone out of sight. To delete them may take minutes, for
    /// which nobody may have to wait at a start: that is for a purge.
    pub fn clean(&self) -> Result<(), Error> {
        for root in self.roots() {
            for stage in entries(&root.join(STAGES))? {
                self.discard(&stage)?;
            }
        }
        Ok(())
    }

    fn next(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }
}

const STAGES: &str = "stages";
const TRASH: &str = "trash";

fn make(dir: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(dir)
        .map_err(|e| Error::io(format_args!("create {}", dir.display()), e))
}

/// The entries of a directory of ours.
pub fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
    };
    read().map_err(|e| Error::io(format_args!("read {}", dir.display()), e))
}

fn empty(dir: &Path) -> Result<(), Error> {
    let mut result = Ok(());
    for path in entries(dir)? {
        result = result.and(remove_tree(&path));
    }
    result
}

/// How deep a tree is walked before what is deeper is moved up. A container may have nested its
/// directories a million deep: neither our stack nor our descriptors may follow it there.
const DEPTH_MAX: u32 = 64;

/// Deletes a tree without following links; absent is success.
pub fn remove_tree(path: &Path) -> Result<(), Error> {
    match try_remove_tree(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(Error::io(
            format_args!("delete {}", path.display()),
            e.into(),
        )),
    }
}

fn try_remove_tree(path: &Path) -> Result<(), Errno> {
    let top = match open_directory(CWD, path) {
        // Not a directory, or a link.
        Err(Errno::NOTDIR | Errno::LOOP) => return rustix::fs::unlink(path),
        other => other?,
    };
    let mut moved = 0;
    // Another that deletes the same tree may move directories up behind our back.
    let mut filled = 0;
    loop {
        let before = moved;
        clear(&top, &top, 0, &mut moved)?;
        if moved == before {
            match rustix::fs::rmdir(path) {
                Err(Errno::NOTEMPTY) if filled < FILLED_MAX => filled += 1,
                done => return done,
            }
        }
    }
}

/// How often a directory that was emptied may be found filled again.
const FILLED_MAX: u32 = 100;

/// unlinkat(2), also of what a container has protected from it (chattr(1), `i` and `a`), by itself
/// or by its directory.
fn unlink(dir: &OwnedFd, name: &CStr, flags: AtFlags) -> Result<(), Errno> {
    match rustix::fs::unlinkat(dir, name, flags) {
        Err(Errno::PERM) => {
            let protected = unprotect(dir, name);
            // An old kernel says PERM for a directory too.
            protected.and_then(|()| rustix::fs::unlinkat(dir, name, flags))
        }
        done => done,
    }
}

/// Takes the flags off that forbid to delete `name`.
fn unprotect(dir: &OwnedFd, name: &CStr) -> Result<(), Errno> {
    let clear = |file: &OwnedFd| {
        let protection = IFlags::IMMUTABLE | IFlags::APPEND;
        match rustix::fs::ioctl_getflags(file) {
            Ok(flags) if flags.intersects(protection) => {
                rustix::fs::ioctl_setflags(file, flags - protection)
            }
            // Some file systems have no flags.
            _ => Ok(()),
        }
    };
    clear(dir)?;
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    // Nothing else has flags, and to open a device is to use it.
    if !matches!(
        FileType::from_raw_mode(stat.st_mode),
        FileType::RegularFile | FileType::Directory
    ) {
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    clear(&rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

fn open_directory(dir: impl AsFd, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// Empties `dir`; directories that are too deep end up in `top`, counted by `moved`. What is gone
/// already is fine: a purge and the removal of one snapshot may meet in the trash.
fn clear(top: &OwnedFd, dir: &OwnedFd, depth: u32, moved: &mut u64) -> Result<(), Errno> {
    let gone = |result| match result {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    };
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entry.file_type() != FileType::Directory {
            match unlink(dir, name, AtFlags::empty()) {
                // A directory after all, on a file system that does not say so in readdir.
                Err(Errno::ISDIR) => {}
                other => {
                    gone(other)?;
                    continue;
                }
            }
        }
        if depth == DEPTH_MAX {
            move_up(dir, name, top, moved)?;
            continue;
        }
        let inner = match open_directory(dir, name) {
            Err(Errno::NOENT) => continue,
            other => other?,
        };
        clear(top, &inner, depth + 1, moved)?;
        gone(unlink(dir, name, AtFlags::REMOVEDIR))?;
    }
    Ok(())
}

fn move_up(dir: &OwnedFd, name: &CStr, top: &OwnedFd, moved: &mut u64) -> Result<(), Errno> {
    loop {
        *moved += 1;
        match rustix::fs::renameat(dir, name, top, format!(".deep-{moved}")) {
            // Of a removal that was killed.
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_protected_is_deleted_too() {
        let work = tempfile::tempdir().unwrap();
        let tree = work.path().join("tree");
        fs::create_dir_all(tree.join("dir/below")).unwrap();
        fs::write(tree.join("dir/file"), "x").unwrap();
        fs::write(tree.join("dir/below/log"), "x").unwrap();
        for (path, flag) in [
            ("dir/file", IFlags::IMMUTABLE),
            ("dir/below/log", IFlags::APPEND),
            ("dir/below", IFlags::IMMUTABLE),
            ("dir", IFlags::IMMUTABLE),
        ] {
            let file = fs::File::open(tree.join(path)).unwrap();
            // ext4 takes no flags without those that it has set itself.
            let set = rustix::fs::ioctl_getflags(&file)
                .and_then(|flags| rustix::fs::ioctl_setflags(&file, flags | flag));
            if let Err(error) = set {
                // No root, or a file system without.
                println!("SKIP what_is_protected_is_deleted_too: {error}");
                return;
            }
        }
        assert!(fs::remove_dir_all(&tree).is_err());
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn what_cannot_be_deleted_is_out_of_sight_and_holds_up_nobody() {
        let work = tempfile::tempdir().unwrap();
        let layout = Layout::open(work.path()).unwrap();
        let stage = layout.new_stage().unwrap();
        // Not to be deleted by anybody: a mount point.
        let busy = stage.join("busy");
        fs::create_dir(&busy).unwrap();
        if let Err(error) = rustix::mount::mount_bind(&busy, &busy) {
            println!("SKIP what_cannot_be_deleted_is_out_of_sight_and_holds_up_nobody: {error}");
            return;
        }
        layout.clean().unwrap();
        let deleted = layout.new_stage().and_then(|other| layout.delete(&other));
        let left = layout.purge();
        let trash = entries(&work.path().join(TRASH)).unwrap();
        for path in &trash {
            let _ = rustix::mount::unmount(path.join("busy"), rustix::mount::UnmountFlags::DETACH);
        }
        deleted.unwrap();
        assert!(left.is_err() && trash.len() == 1 && !stage.exists());
        layout.purge().unwrap();
        assert!(entries(&work.path().join(TRASH)).unwrap().is_empty());
    }

    #[test]
    fn a_tree_deeper_than_any_stack_is_deleted() {
        let work = tempfile::tempdir().unwrap();
        let root = work.path().join("tree");
        fs::create_dir(&root).unwrap();
        std::os::unix::fs::symlink(work.path(), root.join("link")).unwrap();
        // As if a removal had been killed in the middle.
        fs::create_dir_all(root.join(".deep-1/x")).unwrap();
        let mut dir = open_directory(CWD, &root).unwrap();
        for _ in 0..5000 {
            rustix::fs::mkdirat(&dir, "d", Mode::from_raw_mode(0o700)).unwrap();
            rustix::fs::mkdirat(&dir, "e", Mode::from_raw_mode(0o700)).unwrap();
            dir = open_directory(&dir, "d").unwrap();
        }
        fs::write(work.path().join("outside"), "x").unwrap();
        remove_tree(&root).unwrap();
        assert!(!root.exists() && work.path().join("outside").exists());
        remove_tree(&root).unwrap();
    }
}

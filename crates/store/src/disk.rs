//! What sled 0.34 leaves out of its flush, and a power loss finds.
//!
//! On Linux sled ends a flush with sync_file_range(2), which sends data to the disk and neither
//! empties the disk's cache nor makes durable how long the file is: what was flushed may be gone
//! after a power loss, up to all that was written since the file system's last own commit. Large
//! values are files of their own (`blobs/`) that are not synced at all, and the file `conf` neither.
//! A segment of the log is used anew once what it held was written elsewhere, and nothing says that
//! this is on disk before the segment is.
//!
//! So the store's directory is synchronous, as chattr(1) has it with `+S`: each write of sled's, to
//! whichever file, is on disk in its order before sled goes on. File systems without that flag, or
//! where new files do not inherit it, get a sync after each flush instead, which leaves the order within one flush to luck.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub struct Disk {
    dir: PathBuf,
    /// Every write is on disk when it returns.
    synchronous: bool,
}

impl Disk {
    /// Makes the directory, and it and what is in it synchronous.
    pub fn prepare(dir: &Path) -> io::Result<Self> {
        if !dir.is_dir() {
            fs::create_dir_all(dir)?;
            sync_parent(dir)?;
        }
        Ok(Self {
            dir: dir.to_owned(),
            synchronous: make_synchronous(dir)?,
        })
    }

    /// To be called after each of sled's flushes: what it has flushed is on disk afterwards.
    pub fn flushed(&self) -> io::Result<()> {
        if self.synchronous {
            return Ok(());
        }
        File::open(self.dir.join("db"))?.sync_all()?;
        if fs::read_dir(self.dir.join("blobs"))?.next().is_some() {
            gantry_sys::fs::syncfs(File::open(&self.dir)?)?;
        }
        Ok(())
    }
}

/// Whether a directory and all below it are synchronous now.
fn make_synchronous(dir: &Path) -> io::Result<bool> {
    // First the directory: what sled makes from now on is so from its beginning.
    let mut all = gantry_sys::fs::set_synchronous(File::open(dir)?)? && is_inherited(dir)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            all &= make_synchronous(&entry.path())?;
        } else if kind.is_file() {
            let file = File::open(entry.path())?;
            all &= gantry_sys::fs::set_synchronous(&file)?;
            // What was written before it was synchronous.
            file.sync_all()?;
        }
    }
    Ok(all)
}

/// Whether what is made in a synchronous directory is synchronous: not so on Btrfs.
fn is_inherited(dir: &Path) -> io::Result<bool> {
    let path = dir.join("probe");
    let probe = File::create(&path)?;
    let inherited = gantry_sys::fs::is_synchronous(&probe);
    fs::remove_file(&path)?;
    inherited
}

/// Makes durable that a name was made or taken away.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

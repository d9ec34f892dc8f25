//! The directories, and the two ways anything leaves them: by rename, then by deletion.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use gantry_ports::Error;
use gantry_types::{ContainerId, Digest};

pub struct Layout {
    root: PathBuf,
    /// Names of stages and trash: unique within the process, and [`Layout::clean`] empties both
    /// directories before the first is given out.
    serial: AtomicU64,
}

impl Layout {
    pub fn open(root: &Path) -> Result<Self, Error> {
        let layout = Self {
            root: root.to_owned(),
            serial: AtomicU64::new(0),
        };
        for dir in [
            root.to_owned(),
            layout.layers(),
            layout.stages(),
            layout.snapshots(),
            layout.trash(),
        ] {
            DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(&dir)
                .map_err(|e| Error::io(format_args!("create {}", dir.display()), e))?;
        }
        Ok(layout)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// A SHA-256 chain id is 64 digits and a SHA-512 one is 128, so the digits alone tell.
    pub fn layer(&self, chain: &Digest) -> PathBuf {
        self.layers().join(chain.hex())
    }

    pub fn stages(&self) -> PathBuf {
        self.root.join("stages")
    }

    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    pub fn snapshot(&self, container: &ContainerId) -> PathBuf {
        self.snapshots().join(container.as_str())
    }

    pub fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// A new directory, mode 0700, below `stages`.
    pub fn new_stage(&self) -> Result<PathBuf, Error> {
        loop {
            let dir = self.stages().join(self.next().to_string());
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
        loop {
            let to = self.trash().join(self.next().to_string());
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

    /// Renames `path` away, then deletes it.
    pub fn delete(&self, path: &Path) -> Result<(), Error> {
        match self.discard(path)? {
            Some(trash) => remove_tree(&trash),
            None => Ok(()),
        }
    }

    /// Deletes what is in the trash. All of it is tried; the first failure is returned.
    pub fn purge(&self) -> Result<(), Error> {
        empty(&self.trash())
    }

    /// Removes stages and trash of a process that is gone.
    pub fn clean(&self) -> Result<(), Error> {
        empty(&self.stages()).and(empty(&self.trash()))
    }

    fn next(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }
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

/// Deletes a tree without following links; absent is success.
pub fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(format_args!("delete {}", path.display()), e)),
    }
}

//! Trouble on request for the executables that the testkit writes: a file in a directory is what
//! goes wrong, and it goes right again when the file is removed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What a call does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Says why and fails.
    Fail,
    /// Sleeps for longer than anybody waits.
    Hang,
    /// Is killed by SIGKILL.
    Die,
    /// Does its work and then fails.
    FailAfter,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Fault::Fail => "fail",
            Fault::Hang => "hang",
            Fault::Die => "die",
            Fault::FailAfter => "fail-after",
        }
    }

    const ALL: [Fault; 4] = [Fault::Fail, Fault::Hang, Fault::Die, Fault::FailAfter];
}

/// The switches of one executable.
#[derive(Clone, Debug)]
pub struct Faults {
    dir: PathBuf,
}

impl Faults {
    pub(crate) fn new(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// From now on calls of `command` (`create`, `ADD`) go wrong.
    pub fn set(&self, command: &str, fault: Fault) {
        let path = self.dir.join(format!("{}-{command}", fault.name()));
        fs::write(&path, "").unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// From now on calls of `command` go right.
    pub fn clear(&self, command: &str) {
        for fault in Fault::ALL {
            // Absent is what is wanted.
            let _ = fs::remove_file(self.dir.join(format!("{}-{command}", fault.name())));
        }
    }

    /// The commands that were called so far, in order.
    pub fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// How often `command` was called so far.
    pub fn count(&self, command: &str) -> usize {
        self.calls().iter().filter(|call| *call == command).count()
    }
}

/// A file that takes all the space of its file system, until it is dropped.
#[derive(Debug)]
pub struct Ballast {
    path: PathBuf,
}

impl Ballast {
    /// Fills the file system of directory `dir`, which should be small.
    pub fn fill(dir: &Path) -> io::Result<Self> {
        let ballast = Self {
            path: dir.join("ballast"),
        };
        let mut file = File::create(&ballast.path)?;
        // The last pages too.
        for size in [1 << 20, 4096, 1] {
            let piece = vec![0; size];
            loop {
                match file.write_all(&piece) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(ballast)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        // Gone with its file system is as good.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes an executable script.
pub(crate) fn write_script(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

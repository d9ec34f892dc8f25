//! What sled 0.34 leaves of a snapshot that it could not finish, and then takes for a damaged one.
//!
//! While it opens, sled writes down what it has read of the log: to `snap.<lsn>.generating`, which
//! it renames to `snap.<lsn>`. A kill, a power loss or a full disk between the two leaves the first
//! name, and the next open reads the newest of all files that begin with `snap.`: that one, empty or
//! cut short. Nothing is wrong with the store: the finished snapshot before it is still there.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;

const UNFINISHED: &str = ".generating";

/// Removes unfinished snapshots, unless a process has the store open: sled writes them under its
/// lock, which is flock(2) on the file `db`. Then there is nothing to do, since sled will refuse.
pub fn remove_unfinished(dir: &Path) -> io::Result<()> {
    let log = match File::open(dir.join("db")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    match log.try_lock() {
        Err(TryLockError::WouldBlock) => return Ok(()),
        Err(TryLockError::Error(error)) => return Err(error),
        Ok(()) => {}
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(UNFINISHED) {
            tracing::info!(path = %entry.path().display(), "an unfinished snapshot of the store is removed");
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_unfinished_and_nobodys_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        remove_unfinished(dir.path()).unwrap();
        for name in ["db", "conf", "snap.0A", "snap.0B.generating"] {
            fs::write(path(name), "").unwrap();
        }
        let holder = File::open(path("db")).unwrap();
        holder.lock().unwrap();
        remove_unfinished(dir.path()).unwrap();
        assert!(path("snap.0B.generating").exists());
        drop(holder);
        remove_unfinished(dir.path()).unwrap();
        assert!(!path("snap.0B.generating").exists());
        for name in ["db", "conf", "snap.0A"] {
            assert!(path(name).exists(), "{name}");
        }
    }
}

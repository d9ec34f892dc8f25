//! Run directories: what describes a live pod or container without the store.
//!
//! ```text
//! <state>/pods/<pod id>/            config status        sealed PodConfig, PodStatus
//!                       shim.sock shim.log ns/           the shim's
//!                       shm/                             tmpfs shared by the pod
//!                       etc/                             a small tmpfs: hostname hosts resolv.conf
//! <state>/containers/<container id>/ config status       sealed ContainerConfig, ContainerStatus
//!                       config.json                      the OCI bundle
//!                       rootfs/                          mount point
//!                       images/<n>/                      mount points: images among its mounts
//!                       exit                             written by the shim
//! <state>/image-mounts              images that gantryctl has mounted (src/image_mounts.rs)
//! <netns dir>/gantry-<pod id>                            pinned network namespace
//! ```
//!
//! The directories are 0700: they hold secrets of pods (environment in config.json).

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_store::{EnvelopeError, Record, open_record, record, seal_envelope};
use gantry_types::{ContainerId, PodId};

use crate::{Error, failpoint};

#[derive(Clone, Debug)]
pub struct RunDirs {
    state: PathBuf,
    netns: PathBuf,
}

impl RunDirs {
    pub fn new(state: &Path, netns: &Path) -> Self {
        Self {
            state: state.to_owned(),
            netns: netns.to_owned(),
        }
    }

    pub fn state(&self) -> &Path {
        &self.state
    }

    pub fn pods(&self) -> PathBuf {
        self.state.join("pods")
    }

    pub fn containers(&self) -> PathBuf {
        self.state.join("containers")
    }

    pub fn pod(&self, id: &PodId) -> PathBuf {
        self.pods().join(id.as_str())
    }

    pub fn container(&self, id: &ContainerId) -> PathBuf {
        self.containers().join(id.as_str())
    }

    pub fn socket(&self, id: &PodId) -> PathBuf {
        self.pod(id).join("shim.sock")
    }

    pub fn pins(&self, id: &PodId) -> PathBuf {
        self.pod(id).join("ns")
    }

    pub fn shm(&self, id: &PodId) -> PathBuf {
        self.pod(id).join("shm")
    }

    /// Where hostname, hosts and resolv.conf are.
    pub fn etc(&self, id: &PodId) -> PathBuf {
        self.pod(id).join("etc")
    }

    pub fn rootfs(&self, id: &ContainerId) -> PathBuf {
        self.container(id).join("rootfs")
    }

    pub fn images(&self, id: &ContainerId) -> PathBuf {
        self.container(id).join("images")
    }

    pub fn image_mounts(&self) -> PathBuf {
        self.state.join("image-mounts")
    }

    pub fn netns(&self, id: &PodId) -> PathBuf {
        self.netns.join(format!("{NETNS_PREFIX}{id}"))
    }

    /// Pods whose pinned network namespace lies in the netns directory.
    pub fn pinned_netns(&self) -> io::Result<Vec<PodId>> {
        names(&self.netns).map(|names| {
            names
                .iter()
                .filter_map(|name| name.strip_prefix(NETNS_PREFIX)?.parse().ok())
                .collect()
        })
    }

    /// Makes the directories that all others lie in.
    pub fn make(&self) -> io::Result<()> {
        for dir in [&self.state, &self.pods()] {
            make_dir(dir)?;
        }
        // Root of a pod's user namespace has to reach the root file system; what lies here is
        // closed one by one.
        make_public_dir(&self.containers())?;
        fs::set_permissions(self.containers(), fs::Permissions::from_mode(0o711))?;
        make_public_dir(&self.netns)
    }
}

const NETNS_PREFIX: &str = "gantry-";

/// Makes a directory that only root may enter; there already is success.
pub fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)?;
    gantry_sys::failpoint::at("rundir::made")
}

/// Lets the members of a group pass through a directory, and nobody look into it.
pub fn open_to_group(path: &Path, gid: u32) -> io::Result<()> {
    std::os::unix::fs::chown(path, None, Some(gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o710))
}

/// Makes a directory, and those above it that are missing, that everybody may enter, whatever the
/// umask; there already is success and changes nothing.
pub fn make_public_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_public_dir(parent)?;
    }
    match fs::create_dir(path) {
        // Made by someone else meanwhile.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755))),
    }
}

/// File names in a directory; a directory that is absent has none.
pub fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Removes a run directory with all that is in it; absent is success. Mounts below it must be
/// gone: a busy directory is an error, never a recursion into somebody's files.
///
/// A shim or a runtime that is about to end may still write a file or rename one into place, so a
/// directory that changes under the removal is gone through again, for a tenth of a second.
pub fn remove_dir(path: &Path) -> Result<(), Error> {
    use io::ErrorKind::{DirectoryNotEmpty, NotFound};
    let mut tries = 0;
    loop {
        let error = match no_mount_below(path).and_then(|()| fs::remove_dir_all(path)) {
            Ok(()) => return failpoint::at("rundir::removed"),
            Err(error) => error,
        };
        // Not found may be an entry that went between the listing and the look at it.
        let absent = fs::symlink_metadata(path).is_err_and(|error| error.kind() == NotFound);
        if absent {
            return Ok(());
        }
        if tries == 20 || !matches!(error.kind(), DirectoryNotEmpty | NotFound) {
            return Err(Error::io("remove run directory", path, &error));
        }
        tries += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An error when something on another file system is below `path`. remove_dir_all would empty it
/// before it fails at the mount point.
fn no_mount_below(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let device = fs::symlink_metadata(path)?.dev();
    let mut dirs = vec![path.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let metadata = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if metadata.dev() != device {
                let message = format!("{} is mounted", path.display());
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
            }
            if metadata.is_dir() {
                dirs.push(path);
            }
        }
    }
    Ok(())
}

/// A record that lives as a file in a run directory beside its copy in the store.
pub trait RunRecord: Record {
    const FILE: &'static str;
}

impl RunRecord for record::PodConfig {
    const FILE: &'static str = "config";
}
impl RunRecord for record::PodStatus {
    const FILE: &'static str = "status";
}
impl RunRecord for record::ContainerConfig {
    const FILE: &'static str = "config";
}
impl RunRecord for record::ContainerStatus {
    const FILE: &'static str = "status";
}

/// Writes a record file by temp file and rename, so that a reader never sees half of one. No
/// fsync: the directory is a tmpfs and does not outlive the boot.
pub fn write_record<R: RunRecord>(dir: &Path, record: &R) -> Result<(), Error> {
    let path = dir.join(R::FILE);
    write_file(&path, &seal_envelope(R::VERSION, record), 0o600)
        .map_err(|error| Error::io("write record file", &path, &error))?;
    failpoint::at("rundir::written")
}

/// Reads a record file; `None` when there is none or it cannot be read, which is logged: the
/// store has the other copy.
pub fn read_record<R: RunRecord>(dir: &Path) -> Option<R> {
    let path = dir.join(R::FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "record file cannot be read");
            return None;
        }
    };
    open_record(&bytes)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "bad record file"))
        .ok()
}

/// The record files of a run directory that a newer gantryd wrote, and why they cannot be read.
pub fn newer<C: RunRecord, S: RunRecord>(dir: &Path) -> Vec<(PathBuf, EnvelopeError)> {
    fn look<R: RunRecord>(dir: &Path) -> Option<(PathBuf, EnvelopeError)> {
        let path = dir.join(R::FILE);
        let error = open_record::<R>(&fs::read(&path).ok()?).err()?;
        error.is_newer().then_some((path, error))
    }
    look::<C>(dir).into_iter().chain(look::<S>(dir)).collect()
}

/// Whether a run directory holds a record that cannot be read: what it describes may be alive.
pub fn damaged<C: RunRecord, S: RunRecord>(dir: &Path) -> bool {
    let unreadable = |file: &str, readable: bool| dir.join(file).exists() && !readable;
    unreadable(C::FILE, read_record::<C>(dir).is_some())
        || unreadable(S::FILE, read_record::<S>(dir).is_some())
}

/// Whether a run directory holds what a start makes an object of, or may hold it.
pub fn recoverable<C: RunRecord, S: RunRecord>(dir: &Path) -> bool {
    damaged::<C, S>(dir) || dir.join(C::FILE).exists() && dir.join(S::FILE).exists()
}

/// Writes a file by temp file and rename.
pub fn write_file(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    use std::io::Write;
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temp = PathBuf::from(name);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temp)?;
    // The daemon's umask hides everything; containers read what is meant for them as any user.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    drop(file);
    fs::rename(&temp, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_file_is_read_back_and_a_damaged_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let status = record::PodStatus {
            reason: "why".into(),
            ..Default::default()
        };
        write_record(dir.path(), &status).unwrap();
        assert_eq!(read_record::<record::PodStatus>(dir.path()), Some(status));
        fs::write(dir.path().join("status"), b"torn").unwrap();
        assert_eq!(read_record::<record::PodStatus>(dir.path()), None);
        assert_eq!(read_record::<record::PodConfig>(dir.path()), None);
    }

    #[test]
    fn a_directory_with_a_record_that_cannot_be_read_is_damaged_and_one_without_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let is_damaged = || damaged::<record::PodConfig, record::PodStatus>(dir.path());
        assert!(!is_damaged());
        write_record(dir.path(), &record::PodConfig::default()).unwrap();
        assert!(!is_damaged());
        fs::write(dir.path().join("status"), b"torn").unwrap();
        assert!(is_damaged());
    }

    #[test]
    fn a_file_of_a_newer_daemon_is_told_from_a_damaged_one() {
        let dir = tempfile::tempdir().unwrap();
        let newer = || newer::<record::PodConfig, record::PodStatus>(dir.path());
        assert_eq!(newer(), []);
        fs::write(dir.path().join("config"), b"torn").unwrap();
        let status = seal_envelope(2, &record::PodStatus::default());
        fs::write(dir.path().join("status"), status).unwrap();
        let (found, known) = (2, 1);
        let version = EnvelopeError::Version { found, known };
        assert_eq!(newer(), [(dir.path().join("status"), version)]);
        assert!(damaged::<record::PodConfig, record::PodStatus>(dir.path()));
    }

    #[test]
    fn a_directory_that_changes_under_its_removal_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        fs::create_dir(&run).unwrap();
        let until = std::time::Instant::now() + Duration::from_millis(30);
        let writer = std::thread::spawn({
            let run = run.clone();
            move || {
                let (temporary, file) = (run.join(".exit.new"), run.join("exit"));
                while std::time::Instant::now() < until {
                    // Fails once the directory has gone.
                    let _ = fs::write(&temporary, "x").and_then(|()| fs::rename(&temporary, &file));
                }
            }
        });
        remove_dir(&run).unwrap();
        writer.join().unwrap();
        assert!(!run.exists());
    }

    #[test]
    fn removal_stops_at_a_mount() {
        use nix::mount::{MntFlags, MsFlags, mount, umount2};
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        if fs::metadata(dir.path()).unwrap().uid() != 0 {
            println!("SKIP removal_stops_at_a_mount: needs root");
            return;
        }
        let run = dir.path().join("run");
        let point = run.join("rootfs");
        fs::create_dir_all(&point).unwrap();
        let none = None::<&str>;
        mount(Some("t"), &point, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::write(point.join("somebody's"), b"file").unwrap();
        let outcome = remove_dir(&run);
        let kept = point.join("somebody's").exists();
        umount2(&point, MntFlags::MNT_DETACH).unwrap();
        assert!(outcome.is_err());
        assert!(kept);
        remove_dir(&run).unwrap();
        assert!(!run.exists());
    }

    #[test]
    fn what_is_meant_for_containers_is_open_whatever_the_umask() {
        // The umask belongs to the process, and other tests run beside this one: a stricter one
        // is what the daemon has all the time.
        gantry_sys::fs::umask(0o077);
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let file = dir.path().join("resolv.conf");
        write_file(&file, b"nameserver 10.0.0.1\n", 0o644).unwrap();
        assert_eq!(mode(&file), 0o644);
        let made = dir.path().join("a/b");
        make_public_dir(&made).unwrap();
        assert_eq!((mode(&made), mode(&dir.path().join("a"))), (0o755, 0o755));
        make_public_dir(&made).unwrap();
        assert!(make_public_dir(&file).is_err());
    }

    #[test]
    fn only_our_network_namespaces_are_ours() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = RunDirs::new(&dir.path().join("state"), &dir.path().join("netns"));
        dirs.make().unwrap();
        let id = PodId::from_random([3; 32]);
        fs::write(dirs.netns(&id), b"").unwrap();
        fs::write(dir.path().join("netns/cni-1234"), b"").unwrap();
        fs::write(dir.path().join("netns/gantry-notanid"), b"").unwrap();
        assert_eq!(dirs.pinned_netns().unwrap(), [id]);
    }
}

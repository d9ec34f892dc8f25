//! Files by descriptor: resolution that cannot leave a root, and the `*at` calls.
//!
//! Whoever writes below a directory that someone else controls (a layer, a container's root)
//! opens the root once with [`open_root`], resolves parents with [`open_beneath`] or
//! [`open_in_root`], and then names only last components relative to the descriptor it got.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs as rfs;
pub use rustix::fs::{AtFlags, FileType, OFlags, RenameFlags, ResolveFlags, Stat, StatFs};

/// How often an interrupted resolution is repeated. openat2(2) returns EAGAIN when a rename
/// raced with `..` under RESOLVE_BENEATH or RESOLVE_IN_ROOT; a peer that renames for ever must
/// not keep us here.
const RESOLVE_ATTEMPTS: u32 = 128;

fn mode(bits: u32) -> rfs::Mode {
    rfs::Mode::from_raw_mode(bits & 0o7777)
}

/// Opens a directory as the root for later resolutions (`O_PATH|O_DIRECTORY|O_CLOEXEC`).
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    Ok(rfs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        rfs::Mode::empty(),
    )?)
}

/// openat2(2); `O_CLOEXEC` is added. `bits` are the permission bits of a file that is created.
pub fn openat2(
    dir: impl AsFd,
    path: &Path,
    flags: OFlags,
    bits: u32,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    // The kernel refuses a mode without O_CREAT or O_TMPFILE (openat2(2), EINVAL).
    let creates = flags.intersects(OFlags::CREATE) || flags.contains(OFlags::TMPFILE);
    let mode = if creates {
        mode(bits)
    } else {
        rfs::Mode::empty()
    };
    let mut left = RESOLVE_ATTEMPTS;
    loop {
        match rfs::openat2(&dir, path, flags | OFlags::CLOEXEC, mode, resolve) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if left > 0 => left -= 1,
            other => return Ok(other?),
        }
    }
}

/// Opens `path` as if `root` were `/`: absolute symbolic links and `..` stay inside it.
pub fn open_in_root(root: impl AsFd, path: &Path, flags: OFlags, bits: u32) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, flags, bits, resolve)
}

/// Opens `path` below `root`; a path or link that leads out fails with EXDEV.
pub fn open_beneath(root: impl AsFd, path: &Path, flags: OFlags, bits: u32) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, flags, bits, resolve)
}

/// openat(2) of a single component that is not followed if it is a symbolic link.
pub fn open_nofollow(
    dir: impl AsFd,
    name: &OsStr,
    flags: OFlags,
    bits: u32,
) -> io::Result<OwnedFd> {
    Ok(rfs::openat(
        dir,
        name,
        flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        mode(bits),
    )?)
}

/// mkdirat(2); the umask applies.
pub fn mkdirat(dir: impl AsFd, name: &OsStr, bits: u32) -> io::Result<()> {
    Ok(rfs::mkdirat(dir, name, mode(bits))?)
}

/// linkat(2) without flags: a symbolic link is linked itself, never its target.
pub fn linkat(old_dir: impl AsFd, old: &OsStr, new_dir: impl AsFd, new: &OsStr) -> io::Result<()> {
    Ok(rfs::linkat(old_dir, old, new_dir, new, AtFlags::empty())?)
}

/// symlinkat(2): `name` in `dir` points to `target`, which is not resolved.
pub fn symlinkat(target: &OsStr, dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    Ok(rfs::symlinkat(target, dir, name)?)
}

/// mknodat(2); `major` and `minor` only matter for device nodes.
pub fn mknodat(
    dir: impl AsFd,
    name: &OsStr,
    kind: FileType,
    bits: u32,
    major: u32,
    minor: u32,
) -> io::Result<()> {
    Ok(rfs::mknodat(
        dir,
        name,
        kind,
        mode(bits),
        rfs::makedev(major, minor),
    )?)
}

/// unlinkat(2) of a file, or with `directory` of an empty directory.
pub fn unlinkat(dir: impl AsFd, name: &OsStr, directory: bool) -> io::Result<()> {
    let flags = if directory {
        AtFlags::REMOVEDIR
    } else {
        AtFlags::empty()
    };
    Ok(rfs::unlinkat(dir, name, flags)?)
}

/// fstatat(2) that does not follow a symbolic link.
pub fn lstatat(dir: impl AsFd, name: &OsStr) -> io::Result<Stat> {
    Ok(rfs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// fstat(2); also of an `O_PATH` descriptor.
pub fn fstat(file: impl AsFd) -> io::Result<Stat> {
    Ok(rfs::fstat(file)?)
}

/// fchownat(2) that does not follow a symbolic link.
pub fn lchownat(dir: impl AsFd, name: &OsStr, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (rfs::Uid::from_raw(uid), rfs::Gid::from_raw(gid));
    Ok(rfs::chownat(
        dir,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Owner of an open file, `O_PATH` included (fchownat(2) with AT_EMPTY_PATH). Clears the
/// set-user-ID and set-group-ID bits: change the mode afterwards.
pub fn chown(file: impl AsFd, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (rfs::Uid::from_raw(uid), rfs::Gid::from_raw(gid));
    Ok(rfs::chownat(
        file,
        "",
        Some(uid),
        Some(gid),
        AtFlags::EMPTY_PATH,
    )?)
}

/// Mode bits of an open file, `O_PATH` included: fchmod(2) refuses those, the link below
/// `/proc/self/fd` does not. Not for symbolic links, which have no mode.
pub fn chmod(file: impl AsFd, bits: u32) -> io::Result<()> {
    Ok(rfs::chmod(proc_fd(file.as_fd()), mode(bits))?)
}

/// Modification and access time of `name` itself, in seconds and nanoseconds since the epoch
/// (utimensat(2)).
pub fn lutimensat(dir: impl AsFd, name: &OsStr, seconds: i64, nanos: u32) -> io::Result<()> {
    let times = timestamps(seconds, nanos);
    Ok(rfs::utimensat(
        dir,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Modification and access time of an open file, not of an `O_PATH` descriptor (futimens(3)).
pub fn futimens(file: impl AsFd, seconds: i64, nanos: u32) -> io::Result<()> {
    Ok(rfs::futimens(file, &timestamps(seconds, nanos))?)
}

fn timestamps(seconds: i64, nanos: u32) -> rfs::Timestamps {
    let time = rfs::Timespec {
        tv_sec: seconds,
        tv_nsec: nanos.into(),
    };
    rfs::Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// Sets an extended attribute on an open file of any kind, `O_PATH` and symbolic links included:
/// fsetxattr(2) refuses those descriptors, the link below `/proc/self/fd` leads to the very inode.
pub fn set_xattr(file: impl AsFd, name: &OsStr, value: &[u8]) -> io::Result<()> {
    let flags = rfs::XattrFlags::empty();
    Ok(rfs::setxattr(proc_fd(file.as_fd()), name, value, flags)?)
}

/// The value of an extended attribute of an open file of any kind; `None` if it has none.
pub fn get_xattr(file: impl AsFd, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    let path = proc_fd(file.as_fd());
    loop {
        let size = match rfs::getxattr_query(&path, name) {
            Err(rustix::io::Errno::NODATA) => return Ok(None),
            size => size?,
        };
        let mut value = vec![0; size];
        match rfs::getxattr(&path, name, &mut value[..]) {
            Err(rustix::io::Errno::NODATA) => return Ok(None),
            // It grew in between: ask again.
            Err(rustix::io::Errno::RANGE) => {}
            size => {
                value.truncate(size?);
                return Ok(Some(value));
            }
        }
    }
}

/// Names of the extended attributes of an open file of any kind.
pub fn list_xattr(file: impl AsFd) -> io::Result<Vec<std::ffi::OsString>> {
    let path = proc_fd(file.as_fd());
    loop {
        let size = rfs::listxattr_query(&path)?;
        let mut list = vec![0u8; size];
        match rfs::listxattr(&path, &mut list[..]) {
            Err(rustix::io::Errno::RANGE) => {}
            size => {
                list.truncate(size?);
                let names = list.split(|&b| b == 0).filter(|name| !name.is_empty());
                return Ok(names
                    .map(|name| OsStr::from_bytes(name).to_owned())
                    .collect());
            }
        }
    }
}

/// Whether an open file is a pipe or FIFO.
pub fn is_fifo(file: impl AsFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rfs::fstat(file)?.st_mode) == FileType::Fifo)
}

/// A path that the kernel resolves to exactly the file behind `file` (proc(5), `/proc/PID/fd`);
/// valid in this process while the descriptor is open.
pub fn proc_fd(file: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Writes everything of the file system that holds `file` to disk (syncfs(2)).
pub fn syncfs(file: impl AsFd) -> io::Result<()> {
    Ok(rfs::syncfs(file)?)
}

/// Makes a file or directory synchronous (`FS_SYNC_FL`, ioctl_iflags(2)): whoever changes it from
/// now on, its change is on disk when the call returns. On most file systems what is made in such a
/// directory is synchronous too. Returns false where the file system has no such flag.
pub fn set_synchronous(file: impl AsFd) -> io::Result<bool> {
    use rfs::IFlags;
    use rustix::io::Errno;
    let set = || {
        let flags = rfs::ioctl_getflags(&file)?;
        if !flags.contains(IFlags::SYNC) {
            rfs::ioctl_setflags(&file, flags | IFlags::SYNC)?;
        }
        // There are file systems that take flags and forget them.
        Ok(rfs::ioctl_getflags(&file)?.contains(IFlags::SYNC))
    };
    match set() {
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(false),
        other => Ok(other?),
    }
}

/// Whether a file is synchronous (`FS_SYNC_FL`).
pub fn is_synchronous(file: impl AsFd) -> io::Result<bool> {
    Ok(rfs::ioctl_getflags(file)?.contains(rfs::IFlags::SYNC))
}

/// Lets the disk begin with a piece of a file that was just written (sync_file_range(2)), so that
/// whoever syncs it later finds little left to do. A hint: what fails here fails there too.
pub fn start_writeback(file: impl AsFd, offset: u64, length: u64) {
    let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
        return;
    };
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: sync_file_range takes numbers alone and touches no memory of ours; the descriptor is
    // open for as long as `file` is borrowed.
    unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), offset, length, flags) };
}

/// statfs(2).
pub fn statfs(path: &Path) -> io::Result<StatFs> {
    Ok(rfs::statfs(path)?)
}

/// statfs(2); libc gives it another type on each C library.
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
const OVERLAYFS_SUPER_MAGIC: i64 = 0x794c_7630;

/// Whether `path` lies on a cgroup v2 hierarchy.
pub fn is_cgroup2(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.f_type as i64 == CGROUP2_SUPER_MAGIC)
}

/// Whether `path` lies on overlayfs.
pub fn is_overlay(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.f_type as i64 == OVERLAYFS_SUPER_MAGIC)
}

/// Sets the umask of this process and returns the old one. Only for a process's start: the
/// umask is shared by all threads.
pub fn umask(bits: u32) -> u32 {
    rustix::process::umask(mode(bits)).bits()
}

/// An unnamed file in memory with this content, positioned at its start (memfd_create(2)):
/// standard input for a child without a pipe that could fill up.
pub fn memfd(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    use std::io::{Seek, Write};
    let name = CString::new(name)?;
    let fd = rfs::memfd_create(name.as_c_str(), rfs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file.into())
}

/// Writes `content` to `path` so that a reader, or a crash, sees either the old file or the new
/// one: temp file beside it, then rename. With `sync` the data is on disk before the rename and
/// the name after it; leave it out on a tmpfs.
pub fn write_atomic(path: &Path, content: &[u8], bits: u32, sync: bool) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let nanos = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.subsec_nanos());
    let mut temp = path.as_os_str().to_owned();
    temp.push(format!(".{}.{nanos}.tmp", std::process::id()));
    let temp = PathBuf::from(temp);
    let write = || {
        let mut file = std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(bits)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temp)?;
        file.write_all(content)?;
        if sync {
            file.sync_all()?;
        }
        std::fs::rename(&temp, path)?;
        match path.parent() {
            Some(parent) if sync => std::fs::File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    };
    let result = write();
    if result.is_err() {
        // Gone after a successful rename; otherwise a half-written leftover.
        let _ = std::fs::remove_file(&temp);
    }
    result
}

/// Removes the temporary files that calls of [`write_atomic`] for `path` left when they were killed.
/// Not to be called while one may be under way.
pub fn remove_temporaries(path: &Path) -> io::Result<()> {
    let (Some(dir), Some(name)) = (
        path.parent(),
        path.file_name().and_then(|name| name.to_str()),
    ) else {
        return Ok(());
    };
    let is_temporary = |other: &str| {
        let numbers = other
            .strip_prefix(name)
            .and_then(|rest| rest.strip_suffix(".tmp"));
        let numbers = numbers.and_then(|rest| rest.strip_prefix('.')?.split_once('.'));
        let is_number = |text: &str| text.parse::<u32>().is_ok();
        numbers.is_some_and(|(pid, nanos)| is_number(pid) && is_number(nanos))
    };
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if is_temporary(&entry.file_name().to_string_lossy()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn resolution_stays_in_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root_path = dir.path().join("root");
        std::fs::create_dir(&root_path).unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        std::os::unix::fs::symlink("../secret", root_path.join("up")).unwrap();
        std::os::unix::fs::symlink("/inside", root_path.join("abs")).unwrap();
        std::fs::write(root_path.join("inside"), "in").unwrap();
        let root = open_root(&root_path).unwrap();

        let up = open_beneath(&root, Path::new("up"), OFlags::RDONLY, 0).unwrap_err();
        assert_eq!(up.raw_os_error(), Some(libc::EXDEV));
        let up = open_in_root(&root, Path::new("up"), OFlags::RDONLY, 0).unwrap_err();
        assert_eq!(
            up.raw_os_error(),
            Some(libc::ENOENT),
            "`..` at the root stays there"
        );
        open_in_root(&root, Path::new("/abs"), OFlags::RDONLY, 0).unwrap();
        let abs = open_beneath(&root, Path::new("abs"), OFlags::RDONLY, 0).unwrap_err();
        assert_eq!(abs.raw_os_error(), Some(libc::EXDEV));
    }

    #[test]
    fn a_path_descriptor_can_be_changed_and_described() {
        let dir = tempfile::tempdir().unwrap();
        let root = open_root(dir.path()).unwrap();
        std::fs::write(dir.path().join("f"), "x").unwrap();
        let file = open_nofollow(&root, "f".as_ref(), OFlags::PATH, 0).unwrap();
        chmod(&file, 0o4711).unwrap();
        assert_eq!(
            dir.path()
                .join("f")
                .metadata()
                .unwrap()
                .permissions()
                .mode()
                & 0o7777,
            0o4711
        );
        lutimensat(&root, "f".as_ref(), 1_000_000_000, 5).unwrap();
        let meta = dir.path().join("f").metadata().unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_000_000, 5));
        assert_eq!(get_xattr(&file, "user.none".as_ref()).unwrap(), None);
        if set_xattr(&file, "user.gantry".as_ref(), b"v").is_ok() {
            let value = get_xattr(&file, "user.gantry".as_ref()).unwrap();
            assert_eq!(value.as_deref(), Some(&b"v"[..]));
            assert!(list_xattr(&file).unwrap().contains(&"user.gantry".into()));
        }
    }

    #[test]
    fn an_atomic_write_replaces_and_leaves_no_temp_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit");
        write_atomic(&path, b"1", 0o600, false).unwrap();
        write_atomic(&path, b"2", 0o600, true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"2");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_killed_atomic_writes_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let others = [
            "index.json",
            "index.json.tmp",
            "index.json.1.x.tmp",
            "other.json.1.2.tmp",
        ];
        for name in others
            .iter()
            .chain(&["index.json.1.2.tmp", "index.json.4000000.999999999.tmp"])
        {
            std::fs::write(at(name), "").unwrap();
        }
        remove_temporaries(&at("index.json")).unwrap();
        assert!(others.iter().all(|name| at(name).exists()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), others.len());
    }

    #[test]
    fn a_synchronous_directory_makes_synchronous_files() {
        let dir = tempfile::tempdir().unwrap();
        if !set_synchronous(std::fs::File::open(dir.path()).unwrap()).unwrap() {
            println!("SKIP a_synchronous_directory_makes_synchronous_files: no such flag here");
            return;
        }
        let file = std::fs::File::create(dir.path().join("file")).unwrap();
        let flags = rfs::ioctl_getflags(&file).unwrap();
        assert!(flags.contains(rfs::IFlags::SYNC), "{flags:?}");
    }

    #[test]
    fn a_memfd_is_read_from_its_start() {
        use std::io::Read;
        let mut text = String::new();
        let fd = memfd("test", b"hello").unwrap();
        std::fs::File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }
}

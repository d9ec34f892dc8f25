//! Copying a directory with all that is in it, by descriptors and without following a link.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs as rfs;
use rustix::io::Errno;

use crate::fs::{self, FileType, OFlags, ResolveFlags, Stat};

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW);

/// What a copy has that is not as in the original.
pub trait Dress {
    /// Whether the copy has this extended attribute.
    fn keeps(&self, attribute: &OsStr) -> bool;

    /// Uid and gid of the copy.
    fn owner(&self, uid: u32, gid: u32) -> (u32, u32) {
        (uid, gid)
    }

    /// The copy's value of an attribute that it keeps.
    fn value(&self, _attribute: &OsStr, value: Vec<u8>) -> Vec<u8> {
        value
    }

    /// An attribute that every file of the copy gets.
    fn label(&self) -> Option<(&OsStr, &[u8])> {
        None
    }
}

/// Says which extended attributes are kept; the rest is as in the original.
impl<F: Fn(&OsStr) -> bool> Dress for F {
    fn keeps(&self, attribute: &OsStr) -> bool {
        self(attribute)
    }
}

/// Copies what is in directory `from` into the empty directory `to`, and gives `to` itself the
/// owner, mode, attributes and times of `from`, as `rules` change them. Hard links within the tree
/// stay hard links, holes stay holes, and data is shared where the file system can (FICLONE,
/// ioctl_ficlone(2)). Extended attributes that are not kept and sockets, at whose copy nobody
/// listens, are left out.
///
/// Nobody may write to either tree meanwhile. However deep the tree is, two directories are open
/// at a time; one deeper than a path can name (PATH_MAX) is an error. After an error `to` holds a
/// part of the copy.
pub fn copy(from: &OwnedFd, to: &OwnedFd, rules: impl Dress) -> io::Result<()> {
    let mut copy = Copy {
        from,
        to,
        rules,
        links: HashMap::new(),
    };
    // As they are met: parents before what is in them.
    let mut found = Directories(vec![(0, OsString::from("."))]);
    let mut next = 0;
    while next < found.0.len() {
        copy.directory(next, &mut found)?;
        next += 1;
    }
    // Last and from the leaves up: a default ACL would be inherited by what is made below it, and
    // each entry made changes the time of its directory.
    for dir in (0..found.0.len()).rev() {
        let (old, new) = copy.open(&found.path(dir))?;
        let stat = fs::fstat(&old)?;
        copy.dress(&old, &new, &stat)?;
        times(&new, &stat)?;
    }
    Ok(())
}

/// Directories of a tree, each as its parent's number and its name: the whole paths of an image's could
/// be four KiB each. The first is the root.
struct Directories(Vec<(usize, OsString)>);

impl Directories {
    fn path(&self, mut dir: usize) -> PathBuf {
        let mut names = Vec::new();
        while let Some((parent, name)) = self.0.get(dir) {
            names.push(name);
            if dir == 0 {
                break;
            }
            dir = *parent;
        }
        names.iter().rev().collect()
    }
}

struct Copy<'a, D> {
    from: &'a OwnedFd,
    to: &'a OwnedFd,
    rules: D,
    /// By inode number in `from`, for files with several names: the copy, by directory and name.
    links: HashMap<u64, (usize, OsString)>,
}

impl<D: Dress> Copy<'_, D> {
    /// The directory in both trees.
    fn open(&self, dir: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let open = |root: &OwnedFd| fs::openat2(root, dir, DIRECTORY, 0, resolve);
        Ok((open(self.from)?, open(self.to)?))
    }

    fn directory(&mut self, dir: usize, found: &mut Directories) -> io::Result<()> {
        let (old, new) = self.open(&found.path(dir))?;
        for entry in rfs::Dir::read_from(&old)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let stat = fs::lstatat(&old, name)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                fs::mkdirat(&new, name, 0o700)?;
                found.0.push((dir, name.to_owned()));
                continue;
            }
            if stat.st_nlink > 1 {
                if let Some((dir, first)) = self.links.get(&stat.st_ino) {
                    link(self.to, (&found.path(*dir), first), &new, name)?;
                    continue;
                }
                self.links.insert(stat.st_ino, (dir, name.to_owned()));
            }
            self.file((&old, &new), name, &stat)?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        (old, new): (&OwnedFd, &OwnedFd),
        name: &OsStr,
        stat: &Stat,
    ) -> io::Result<()> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        match kind {
            FileType::Socket => {
                self.links.remove(&stat.st_ino);
                return Ok(());
            }
            FileType::Symlink => {
                let target = rfs::readlinkat(old, name, Vec::new())?;
                fs::symlinkat(OsStr::from_bytes(target.to_bytes()), new, name)?;
            }
            FileType::RegularFile => {
                let data = File::from(fs::open_nofollow(old, name, OFlags::RDONLY, 0)?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let copy = File::from(fs::open_nofollow(new, name, flags, 0o600)?);
                content(&data, &copy)?;
            }
            kind => {
                let (major, minor) = (rfs::major(stat.st_rdev), rfs::minor(stat.st_rdev));
                fs::mknodat(new, name, kind, 0o600, major, minor)?;
            }
        }
        let open = |dir: &OwnedFd| fs::open_nofollow(dir, name, OFlags::PATH, 0);
        self.dress(&open(old)?, &open(new)?, stat)?;
        let (seconds, nanos) = modified(stat);
        fs::lutimensat(new, name, seconds, nanos)
    }

    /// Owner, mode and attributes, in this order: a change of owner takes set-id bits and file
    /// capabilities away.
    fn dress(&self, old: &OwnedFd, new: &OwnedFd, stat: &Stat) -> io::Result<()> {
        let (uid, gid) = self.rules.owner(stat.st_uid, stat.st_gid);
        fs::chown(new, uid, gid)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            fs::chmod(new, stat.st_mode)?;
        }
        let names: Vec<OsString> = match fs::list_xattr(old) {
            Err(error) if unsupported(&error) => Vec::new(),
            names => names?,
        };
        for name in names.iter().filter(|name| self.rules.keeps(name)) {
            let Some(value) = fs::get_xattr(old, name)? else {
                continue;
            };
            match fs::set_xattr(new, name, &self.rules.value(name, value)) {
                // The other file system has none; nothing that runs there expects them.
                Err(error) if unsupported(&error) => {}
                set => set?,
            }
        }
        match self.rules.label() {
            // Unlike the rest it is asked for: a file without it would be one that was not labelled.
            Some((name, value)) => fs::set_xattr(new, name, value),
            None => Ok(()),
        }
    }
}

/// Gives the empty file `to` the content of `from`: by sharing it, else piece by piece without the
/// holes, which an image may have made larger than any disk.
fn content(from: &File, to: &File) -> io::Result<()> {
    match rfs::ioctl_ficlone(to, from) {
        Ok(()) => return Ok(()),
        // Unknown to the file system, to the kernel, for these two files; another file system.
        Err(Errno::NOTSUP | Errno::NOTTY | Errno::INVAL | Errno::XDEV | Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut at = 0;
    while at < size {
        let start = match rfs::seek(from, rfs::SeekFrom::Data(at)) {
            Ok(start) => start,
            // A hole up to the end.
            Err(Errno::NXIO) => break,
            // Without the notion of holes all is data.
            Err(Errno::INVAL) => rfs::seek(from, rfs::SeekFrom::Start(at))?,
            Err(error) => return Err(error.into()),
        };
        let end = match rfs::seek(from, rfs::SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(Errno::INVAL) => size,
            Err(error) => return Err(error.into()),
        };
        rfs::seek(from, rfs::SeekFrom::Start(start))?;
        rfs::seek(to, rfs::SeekFrom::Start(start))?;
        let (mut piece, mut to) = (from.take(end - start), to);
        let copied = io::copy(&mut piece, &mut to)?;
        if copied < end - start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = end;
    }
    Ok(())
}

/// A second name for what was copied as `first` in the directory at `parent`.
fn link(
    root: &OwnedFd,
    (parent, first): (&Path, &OsStr),
    dir: &OwnedFd,
    name: &OsStr,
) -> io::Result<()> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let parent = fs::openat2(root, parent, DIRECTORY, 0, resolve)?;
    fs::linkat(&parent, first, dir, name)
}

fn unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

fn modified(stat: &Stat) -> (i64, u32) {
    // The kernel gives nanoseconds below a billion, in a type that differs by architecture.
    let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or_default();
    #[allow(clippy::useless_conversion)]
    (i64::from(stat.st_mtime), nanos)
}

fn times(dir: impl AsFd, stat: &Stat) -> io::Result<()> {
    let (seconds, nanos) = modified(stat);
    fs::futimens(dir, seconds, nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs as std_fs;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

    fn is_root(test: &str) -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            println!("SKIP {test}: changing owners needs root");
        }
        root
    }

    fn copy_of(from: &Path, to: &Path) -> io::Result<()> {
        std_fs::create_dir(to)?;
        let open = |path: &Path| rfs::open(path, DIRECTORY, rfs::Mode::empty());
        copy(&open(from)?, &open(to)?, |name: &OsStr| name != "user.no")
    }

    #[test]
    fn everything_but_sockets_is_copied_as_it_is() {
        if !is_root("everything_but_sockets_is_copied_as_it_is") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std_fs::create_dir_all(from.join("a/b")).unwrap();
        std_fs::write(from.join("a/b/file"), "text").unwrap();
        std_fs::hard_link(from.join("a/b/file"), from.join("twin")).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
        let root = fs::open_root(&from).unwrap();
        let null = OsStr::new("null");
        fs::mknodat(&root, null, FileType::CharacterDevice, 0o666, 1, 3).unwrap();
        fs::mknodat(&root, OsStr::new("fifo"), FileType::Fifo, 0o640, 0, 0).unwrap();
        for (path, uid, mode) in [
            ("a/b/file", 7, 0o4711),
            ("a/b", 8, 0o1770),
            (".", 9, 0o2750),
        ] {
            std::os::unix::fs::chown(from.join(path), Some(uid), Some(uid + 100)).unwrap();
            std_fs::set_permissions(from.join(path), PermissionsExt::from_mode(mode)).unwrap();
        }
        let file = fs::open_root(&from.join("a")).unwrap();
        let user_xattrs = fs::set_xattr(&file, OsStr::new("user.yes"), b"1").is_ok();
        let _ = fs::set_xattr(&file, OsStr::new("user.no"), b"2");
        fs::lutimensat(&root, OsStr::new("a"), 1_000_000_000, 7).unwrap();

        copy_of(&from, &to).unwrap();
        let meta = |path: &str| std_fs::symlink_metadata(to.join(path)).unwrap();
        for (path, uid, mode) in [
            ("a/b/file", 7, 0o4711),
            ("a/b", 8, 0o1770),
            (".", 9, 0o2750),
        ] {
            let copy = meta(path);
            assert_eq!((copy.uid(), copy.gid()), (uid, uid + 100), "{path}");
            assert_eq!(copy.permissions().mode() & 0o7777, mode, "{path}");
        }
        assert_eq!(std_fs::read_to_string(to.join("twin")).unwrap(), "text");
        assert_eq!(meta("twin").ino(), meta("a/b/file").ino());
        assert_ne!(
            meta("twin").ino(),
            std_fs::metadata(from.join("twin")).unwrap().ino()
        );
        let link = std_fs::read_link(to.join("link")).unwrap();
        assert_eq!(link, Path::new("/etc/passwd"));
        assert_eq!(meta("null").rdev(), 0x103);
        assert!(meta("fifo").file_type().is_fifo());
        assert!(!to.join("socket").exists());
        assert_eq!(
            (meta("a").mtime(), meta("a").mtime_nsec()),
            (1_000_000_000, 7)
        );
        if user_xattrs {
            let names = fs::list_xattr(fs::open_root(&to.join("a")).unwrap()).unwrap();
            assert_eq!(names, ["user.yes"]);
        }
    }

    #[test]
    fn holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std_fs::create_dir(&from).unwrap();
        let file = File::create(from.join("sparse")).unwrap();
        file.set_len(8 << 30).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"middle", 4 << 30).unwrap();
        std_fs::write(from.join("empty"), "").unwrap();
        if !is_root("holes_stay_holes") {
            return;
        }
        copy_of(&from, &to).unwrap();
        let copy = File::open(to.join("sparse")).unwrap();
        let mut text = [0; 8];
        std::os::unix::fs::FileExt::read_at(&copy, &mut text, (4 << 30) - 1).unwrap();
        assert_eq!(&text, b"\0middle\0");
        let meta = copy.metadata().unwrap();
        assert_eq!(meta.len(), 8 << 30);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        assert_eq!(std_fs::metadata(to.join("empty")).unwrap().len(), 0);
    }

    struct Shifted;

    impl Dress for Shifted {
        fn keeps(&self, attribute: &OsStr) -> bool {
            attribute == "user.yes"
        }

        fn owner(&self, uid: u32, gid: u32) -> (u32, u32) {
            (uid + 1000, gid + 2000)
        }

        fn value(&self, _: &OsStr, mut value: Vec<u8>) -> Vec<u8> {
            value.push(b'!');
            value
        }

        fn label(&self) -> Option<(&OsStr, &[u8])> {
            Some((OsStr::new("trusted.label"), b"new"))
        }
    }

    #[test]
    fn owners_attributes_and_labels_are_as_the_rules_say() {
        if !is_root("owners_attributes_and_labels_are_as_the_rules_say") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std_fs::create_dir(&from).unwrap();
        std_fs::create_dir(&to).unwrap();
        std_fs::write(from.join("file"), "").unwrap();
        std_fs::set_permissions(from.join("file"), PermissionsExt::from_mode(0o4755)).unwrap();
        symlink("file", from.join("link")).unwrap();
        let open = |path: &Path| fs::open_root(path).unwrap();
        let file = |root: &Path| {
            fs::open_nofollow(open(root), OsStr::new("file"), OFlags::PATH, 0).unwrap()
        };
        fs::set_xattr(file(&from), OsStr::new("user.yes"), b"1").unwrap();
        copy(&open(&from), &open(&to), Shifted).unwrap();
        let meta = |path: &str| std_fs::symlink_metadata(to.join(path)).unwrap();
        for path in [".", "file", "link"] {
            assert_eq!((meta(path).uid(), meta(path).gid()), (1000, 2000), "{path}");
        }
        assert_eq!(meta("file").mode() & 0o7777, 0o4755);
        let value = |name: &str| fs::get_xattr(file(&to), OsStr::new(name)).unwrap();
        assert_eq!(value("user.yes").as_deref(), Some(&b"1!"[..]));
        assert_eq!(value("trusted.label").as_deref(), Some(&b"new"[..]));
    }

    #[test]
    fn a_deep_tree_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        let deep: PathBuf = std::iter::repeat_n("d", 600).collect();
        std_fs::create_dir_all(from.join(&deep)).unwrap();
        std_fs::write(from.join(&deep).join("leaf"), "x").unwrap();
        if is_root("a_deep_tree_is_copied") {
            copy_of(&from, &dir.path().join("to")).unwrap();
            assert!(dir.path().join("to").join(&deep).join("leaf").exists());
        }
    }
}

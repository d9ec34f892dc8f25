//! One layer's entries, in their order.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use gantry_ports::snapshotter::Whiteouts;
use gantry_sys::fs as sys;
use gantry_sys::fs::{FileType, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::{Limits, Unpacked, whiteout, xattr};
use crate::tar::{self, Entry, Kind};
use crate::{Error, Result};

/// uid_t and gid_t; the highest value means "unchanged" to chown(2).
const OWNER_MAX: u64 = u32::MAX as u64 - 1;
/// Least bytes of a file that the disk is told of at once: for a smaller one that costs more than
/// it gains.
const WRITEBACK_MIN: u64 = 128 << 10;
/// Permissions of a directory that no entry describes.
const DIRECTORY_MODE: u32 = 0o755;

pub struct Applier<'a> {
    root: OwnedFd,
    whiteouts: Whiteouts,
    limits: &'a Limits,
    out: Unpacked,
    entries: u64,
    remembered: usize,
    /// Directories with the times they get once nothing is written into them any more.
    directories: HashMap<Vec<u8>, (i64, u32)>,
    /// Ordered, so that parents come before their children.
    implicit: BTreeSet<Vec<u8>>,
    /// Device and inode of directories that are opaque already: a layer that says so again and
    /// again costs nothing.
    opaque: HashSet<(u64, u64)>,
    /// Only with [`Whiteouts::Apply`]: what this layer itself brought. Whiteouts spare it.
    brought: HashSet<Vec<u8>>,
    /// The directory of the last entry: archives go directory by directory.
    parent: Option<(Vec<u8>, Rc<OwnedFd>)>,
    buffer: Vec<u8>,
}

/// An I/O failure or a reason of ours, before the entry's name is put to it.
enum Trouble {
    Io(io::Error),
    Refused(&'static str),
    Limit(u64, &'static str),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Trouble::Io(error)
    }
}

impl From<Errno> for Trouble {
    fn from(error: Errno) -> Self {
        Trouble::Io(error.into())
    }
}

impl Trouble {
    /// A path of which some component does not exist or is no directory.
    fn is_absence(&self) -> bool {
        matches!(self, Trouble::Io(e) if matches!(
            Errno::from_io_error(e),
            Some(Errno::NOENT | Errno::NOTDIR)
        ))
    }
}

type Done<T = ()> = std::result::Result<T, Trouble>;

impl<'a> Applier<'a> {
    pub fn new(root: OwnedFd, whiteouts: Whiteouts, limits: &'a Limits) -> Self {
        Self {
            root,
            whiteouts,
            limits,
            out: Unpacked::default(),
            entries: 0,
            remembered: 0,
            directories: HashMap::new(),
            implicit: BTreeSet::new(),
            opaque: HashSet::new(),
            brought: HashSet::new(),
            parent: None,
            buffer: vec![0; 128 * 1024],
        }
    }

    pub fn run(mut self, stream: &mut dyn Read) -> Result<Unpacked> {
        let mut reader = tar::Reader::new(stream);
        while let Some(entry) = reader.next().map_err(|e| Error::io("tar stream", e))? {
            self.entry(&entry, &mut reader)
                .map_err(|trouble| named(trouble, &entry.path))?;
        }
        self.finish()
            .map_err(|trouble| named(trouble, b"directory times"))?;
        Ok(self.out)
    }

    fn entry(&mut self, entry: &Entry, data: &mut tar::Reader<&mut dyn Read>) -> Done {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(Trouble::Limit(self.limits.entries, "entries"));
        }
        let path = self.clean(&entry.path)?;
        let Some(name) = path
            .rsplit(|&b| b == b'/')
            .next()
            .filter(|name| !name.is_empty())
        else {
            return self.root_entry(entry);
        };
        let parent_path = &path[..path.len() - name.len()];
        let parent_path = parent_path.strip_suffix(b"/").unwrap_or(parent_path);
        match whiteout::read(name) {
            whiteout::Name::Bad => Err(Trouble::Refused(
                "a whiteout of nothing or of its own directory",
            )),
            whiteout::Name::Metadata => Ok(()),
            whiteout::Name::Opaque => {
                let dir = self.directory(parent_path)?;
                self.make_opaque(&dir, parent_path)
            }
            whiteout::Name::Deletes(target) => {
                let dir = self.directory(parent_path)?;
                self.delete(&dir, parent_path, target)
            }
            whiteout::Name::Plain => {
                let dir = self.directory(parent_path)?;
                self.create(entry, &dir, &path, name, data)?;
                if self.whiteouts == Whiteouts::Apply {
                    self.remember(path.len())?;
                    self.brought.insert(path);
                }
                Ok(())
            }
        }
    }

    /// The path without `.`, doubled and outer slashes; empty for the root. `..` is refused: no
    /// archive of a tree needs it.
    fn clean(&self, path: &[u8]) -> Done<Vec<u8>> {
        if path.len() > self.limits.path_bytes {
            return Err(Trouble::Limit(
                self.limits.path_bytes as u64,
                "bytes of path",
            ));
        }
        let mut clean = Vec::with_capacity(path.len());
        let mut depth = 0;
        for part in path.split(|&b| b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(Trouble::Refused("the path has a `..` in it")),
                part => {
                    if !clean.is_empty() {
                        clean.push(b'/');
                    }
                    clean.extend_from_slice(part);
                    depth += 1;
                }
            }
        }
        if depth > self.limits.path_depth {
            return Err(Trouble::Limit(
                self.limits.path_depth as u64,
                "components of path",
            ));
        }
        Ok(clean)
    }

    fn remember(&mut self, bytes: usize) -> Done {
        // The maps around a name cost about as much as a short one.
        self.remembered += bytes + 64;
        if self.remembered > self.limits.remembered_bytes {
            return Err(Trouble::Limit(
                self.limits.remembered_bytes as u64,
                "bytes of names",
            ));
        }
        Ok(())
    }

    fn made(&mut self, bytes: u64) -> Done {
        // What a file occupies is blocks, not bytes; 4 KiB is the block of the file systems that
        // layers live on.
        self.out.usage.bytes += bytes.next_multiple_of(4096);
        self.out.usage.inodes += 1;
        if self.out.usage.inodes > self.limits.entries {
            return Err(Trouble::Limit(self.limits.entries, "inodes"));
        }
        Ok(())
    }

    fn root_entry(&mut self, entry: &Entry) -> Done {
        if entry.kind != Kind::Directory {
            return Err(Trouble::Refused("the root is not a directory"));
        }
        let root = open(&self.root, b".", OFlags::RDONLY | OFlags::DIRECTORY)?;
        describe(&root, entry)?;
        self.directory_time(Vec::new(), entry.mtime)
    }

    fn directory_time(&mut self, path: Vec<u8>, mtime: (i64, u32)) -> Done {
        self.remember(path.len())?;
        self.directories.insert(path, mtime);
        Ok(())
    }

    /// The directory at `path`, made with its parents if it is not there.
    fn directory(&mut self, path: &[u8]) -> Done<Rc<OwnedFd>> {
        if let Some((cached, dir)) = &self.parent
            && cached == path
        {
            return Ok(dir.clone());
        }
        let dir = match self.resolve(path) {
            Err(trouble) if trouble.is_absence() => self.make_directories(path)?,
            other => other?,
        };
        let dir = Rc::new(dir);
        self.parent = Some((path.to_vec(), dir.clone()));
        Ok(dir)
    }

    /// Opens a directory of the layer, as if the layer's root were `/`.
    fn resolve(&self, path: &[u8]) -> Done<OwnedFd> {
        let path = Path::new(OsStr::from_bytes(if path.is_empty() { b"." } else { path }));
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let plain = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match sys::openat2(&self.root, path, flags, 0, plain) {
            Err(e) if Errno::from_io_error(&e) == Some(Errno::LOOP) => {}
            other => return Ok(other?),
        }
        let dir = sys::open_in_root(&self.root, path, flags, 0)?;
        // Through links a short name leads as deep as the layer likes, and who deletes or walks
        // a tree pays for its depth.
        let depth = |dir: &OwnedFd| {
            std::fs::read_link(sys::proc_fd(dir.as_fd())).map(|path| path.components().count())
        };
        if depth(&dir)? > depth(&self.root)? + self.limits.path_depth {
            return Err(Trouble::Limit(
                self.limits.path_depth as u64,
                "components of path",
            ));
        }
        Ok(dir)
    }

    fn make_directories(&mut self, path: &[u8]) -> Done<OwnedFd> {
        let mut dir = self.resolve(b"")?;
        let mut end = 0;
        while end < path.len() {
            let start = if end == 0 { 0 } else { end + 1 };
            end = path[start..]
                .iter()
                .position(|&b| b == b'/')
                .map_or(path.len(), |n| start + n);
            let (so_far, name) = (&path[..end], &path[start..end]);
            dir = match self.resolve(so_far) {
                Ok(dir) => dir,
                Err(trouble) if trouble.is_absence() => {
                    let hidden = match lstat(&dir, name)? {
                        None => false,
                        Some(stat) if is_whiteout(&stat) => {
                            sys::unlinkat(&dir, OsStr::from_bytes(name), false)?;
                            true
                        }
                        // A file, or a link that leads nowhere.
                        Some(_) => return Err(Trouble::Refused("its parent is not a directory")),
                    };
                    sys::mkdirat(&dir, OsStr::from_bytes(name), DIRECTORY_MODE)?;
                    let made = open(&dir, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                    rustix::fs::fchmod(&made, DIRECTORY_MODE.into())?;
                    self.made(0)?;
                    self.remember(so_far.len())?;
                    self.implicit.insert(so_far.to_vec());
                    if hidden {
                        self.make_opaque(&made, so_far)?;
                    }
                    made
                }
                Err(trouble) => return Err(trouble),
            };
        }
        Ok(dir)
    }

    fn create(
        &mut self,
        entry: &Entry,
        dir: &OwnedFd,
        path: &[u8],
        name: &[u8],
        data: &mut tar::Reader<&mut dyn Read>,
    ) -> Done {
        let os_name = OsStr::from_bytes(name);
        // The link's target is looked up first: it may be what is replaced.
        let target = match entry.kind {
            Kind::Hardlink => Some(self.link_target(entry)?),
            _ => None,
        };
        let mut hidden = false;
        if let Some(stat) = lstat(dir, name)? {
            let file_type = FileType::from_raw_mode(stat.st_mode);
            if entry.kind == Kind::Directory && file_type == FileType::Directory {
                let made = open(dir, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                describe(&made, entry)?;
                self.implicit.remove(path);
                return self.directory_time(path.to_vec(), entry.mtime);
            }
            if let Some((target, target_name)) = &target {
                let existing = lstat(target, target_name)?;
                if existing.is_some_and(|t| (t.st_dev, t.st_ino) == (stat.st_dev, stat.st_ino)) {
                    return Ok(());
                }
            }
            hidden = self.whiteouts == Whiteouts::Overlay && is_whiteout(&stat);
            self.clear(dir, name, file_type)?;
        }
        match entry.kind {
            Kind::File => {
                self.file(entry, dir, name, data)?;
            }
            Kind::Directory => {
                sys::mkdirat(dir, os_name, DIRECTORY_MODE)?;
                let made = open(dir, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                describe(&made, entry)?;
                self.made(0)?;
                if hidden {
                    // What the layers below have here was deleted: the new directory must not
                    // show it again.
                    self.make_opaque(&made, path)?;
                }
                self.directory_time(path.to_vec(), entry.mtime)?;
            }
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > self.limits.path_bytes {
                    return Err(Trouble::Refused(
                        "a symbolic link without or with too long a target",
                    ));
                }
                sys::symlinkat(OsStr::from_bytes(&entry.link), dir, os_name)?;
                self.made(0)?;
                let (uid, gid) = owner(entry)?;
                sys::lchownat(dir, os_name, uid, gid)?;
                sys::lutimensat(dir, os_name, entry.mtime.0, entry.mtime.1)?;
            }
            Kind::Hardlink => {
                if let Some((target, target_name)) = target {
                    sys::linkat(&target, OsStr::from_bytes(&target_name), dir, os_name)?;
                }
            }
            Kind::Char | Kind::Block | Kind::Fifo => self.node(entry, dir, name)?,
        }
        Ok(())
    }

    fn file(
        &mut self,
        entry: &Entry,
        dir: &OwnedFd,
        name: &[u8],
        data: &mut tar::Reader<&mut dyn Read>,
    ) -> Done {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let file = sys::open_nofollow(dir, OsStr::from_bytes(name), flags, 0o600)?;
        let mut stored = 0;
        match &entry.sparse {
            None => {
                let mut offset = 0;
                while offset < entry.size {
                    offset += self.copy(data, &file, offset, entry.size - offset)?;
                }
                stored = entry.size;
            }
            Some(pieces) => {
                if entry.size > self.limits.expansion.bytes {
                    return Err(Trouble::Limit(
                        self.limits.expansion.bytes,
                        "bytes in a file",
                    ));
                }
                rustix::fs::ftruncate(&file, entry.size)?;
                for piece in pieces {
                    let mut done = 0;
                    while done < piece.length {
                        done += self.copy(data, &file, piece.offset + done, piece.length - done)?;
                    }
                    stored += piece.length;
                }
            }
        }
        if stored >= WRITEBACK_MIN {
            // The disk works while the rest is decompressed, and the commit finds little left.
            sys::start_writeback(&file, 0, entry.size);
        }
        self.made(stored)?;
        describe(&file, entry)?;
        Ok(sys::futimens(&file, entry.mtime.0, entry.mtime.1)?)
    }

    /// Copies up to a bufferful of at most `most` bytes to `offset`.
    fn copy(
        &mut self,
        data: &mut tar::Reader<&mut dyn Read>,
        file: &OwnedFd,
        offset: u64,
        most: u64,
    ) -> Done<u64> {
        let most = usize::try_from(most)
            .unwrap_or(usize::MAX)
            .min(self.buffer.len());
        let n = match data.read(&mut self.buffer[..most]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(0),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            other => other?,
        };
        let mut written = 0;
        while written < n {
            let at = offset + written as u64;
            match rustix::io::pwrite(file, &self.buffer[written..n], at) {
                Err(Errno::INTR) => {}
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                other => written += other?,
            }
        }
        Ok(n as u64)
    }

    fn node(&mut self, entry: &Entry, dir: &OwnedFd, name: &[u8]) -> Done {
        let (kind, file_type) = match entry.kind {
            Kind::Char => (entry.kind, FileType::CharacterDevice),
            Kind::Block => (entry.kind, FileType::BlockDevice),
            _ => (Kind::Fifo, FileType::Fifo),
        };
        if kind == Kind::Char && entry.device == (0, 0) {
            // To overlayfs this is a deletion; only `.wh.` names may delete.
            return Err(Trouble::Refused(
                "a character device 0:0 would act as a whiteout",
            ));
        }
        let os_name = OsStr::from_bytes(name);
        let (major, minor) = entry.device;
        sys::mknodat(dir, os_name, file_type, 0o600, major, minor)?;
        self.made(0)?;
        // Through a descriptor of the node itself: fchmodat(2) would follow a link that took its
        // place meanwhile.
        let node = sys::open_nofollow(dir, os_name, OFlags::PATH, 0)?;
        if FileType::from_raw_mode(sys::fstat(&node)?.st_mode) != file_type {
            return Err(Trouble::Refused("it was replaced while it was made"));
        }
        let (uid, gid) = owner(entry)?;
        sys::chown(&node, uid, gid)?;
        sys::chmod(&node, entry.mode)?;
        sys::lutimensat(dir, os_name, entry.mtime.0, entry.mtime.1)?;
        Ok(())
    }

    /// Directory and name of what a hard link points to. The last component is not followed: a
    /// link to a symbolic link is a second name of that link.
    fn link_target(&mut self, entry: &Entry) -> Done<(OwnedFd, Vec<u8>)> {
        let target = self.clean(&entry.link)?;
        let at = target.iter().rposition(|&b| b == b'/');
        let (parent, name) = match at {
            Some(at) => (&target[..at], &target[at + 1..]),
            None => (&b""[..], &target[..]),
        };
        let missing = Trouble::Refused("a hard link to a file that this layer does not have");
        if name.is_empty() {
            return Err(missing);
        }
        let dir = match self.resolve(parent) {
            Err(trouble) if trouble.is_absence() => return Err(missing),
            other => other?,
        };
        match lstat(&dir, name)? {
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                Err(Trouble::Refused("a hard link to a directory"))
            }
            Some(stat) if is_whiteout(&stat) => Err(missing),
            Some(_) => Ok((dir, name.to_vec())),
            None => Err(missing),
        }
    }

    /// Removes what an entry replaces.
    fn clear(&mut self, dir: &OwnedFd, name: &[u8], file_type: FileType) -> Done {
        if file_type == FileType::Directory {
            if !self.opaque.is_empty() {
                // Their inodes may come again as those of other directories.
                forget(&mut self.opaque, dir, name)?;
            }
            remove_tree(dir.as_fd(), name)?;
            // Cached descriptors and times may be of what is gone.
            self.parent = None;
        } else {
            if file_type == FileType::Symlink {
                // The cached directory may have been found through it.
                self.parent = None;
            }
            sys::unlinkat(dir, OsStr::from_bytes(name), false)?;
        }
        Ok(())
    }

    fn make_opaque(&mut self, dir: &OwnedFd, path: &[u8]) -> Done {
        let stat = sys::fstat(dir)?;
        let fresh = self.opaque.insert((stat.st_dev, stat.st_ino));
        if !fresh {
            return Ok(());
        }
        self.remember(0)?;
        match self.whiteouts {
            Whiteouts::Overlay if path.is_empty() => {
                // overlayfs does not look at the attribute on the roots of its layers.
                self.out.opaque_root = true;
                Ok(())
            }
            Whiteouts::Overlay => Ok(sys::set_xattr(dir, xattr::os(xattr::OPAQUE), b"y")?),
            Whiteouts::Apply => self.empty(dir, path),
        }
    }

    fn delete(&mut self, dir: &OwnedFd, parent: &[u8], name: &[u8]) -> Done {
        let existing = lstat(dir, name)?;
        match self.whiteouts {
            Whiteouts::Overlay => match existing {
                None => {
                    let kind = FileType::CharacterDevice;
                    sys::mknodat(dir, OsStr::from_bytes(name), kind, 0, 0, 0)?;
                    self.made(0)
                }
                // The layer brings a directory of that name: it stands alone.
                Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                    let made = open(dir, name, OFlags::PATH | OFlags::DIRECTORY)?;
                    self.make_opaque(&made, &join(parent, name))
                }
                // Any other file of this layer hides what is below by itself.
                Some(_) => Ok(()),
            },
            Whiteouts::Apply => match existing {
                None => Ok(()),
                Some(stat) => {
                    let path = join(parent, name);
                    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                        if !self.brought.contains(&path) {
                            sys::unlinkat(dir, OsStr::from_bytes(name), false)?;
                        }
                        return Ok(());
                    }
                    let inner = open(dir, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
                    self.empty(&inner, &path)?;
                    let gone = !self.brought.contains(&path)
                        && match sys::unlinkat(dir, OsStr::from_bytes(name), true) {
                            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => false,
                            other => other.map(|()| true)?,
                        };
                    if gone {
                        self.parent = None;
                    }
                    Ok(())
                }
            },
        }
    }

    /// Removes from a directory, at all depths, what this layer did not bring.
    fn empty(&mut self, dir: &OwnedFd, path: &[u8]) -> Done {
        self.parent = None;
        // A stack of our own: a tree as deep as an image likes must not become our call stack.
        let mut pending = vec![(path.to_vec(), false)];
        let base = path.len();
        let relative = |full: &[u8]| -> PathBuf {
            let rest = full[base..].strip_prefix(b"/").unwrap_or(&full[base..]);
            PathBuf::from(OsStr::from_bytes(if rest.is_empty() { b"." } else { rest }))
        };
        while let Some((full, visited)) = pending.pop() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let here = sys::open_beneath(dir, &relative(&full), flags, 0)?;
            let mut directories = Vec::new();
            for name in names(&here)? {
                let inner = join(&full, &name);
                match lstat(&here, &name)? {
                    Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                        directories.push((inner, name));
                    }
                    Some(_) if !self.brought.contains(&inner) => {
                        sys::unlinkat(&here, OsStr::from_bytes(&name), false)?;
                    }
                    _ => {}
                }
            }
            if visited {
                for (inner, name) in directories {
                    if !self.brought.contains(&inner) {
                        match sys::unlinkat(&here, OsStr::from_bytes(&name), true) {
                            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                            other => other?,
                        }
                    }
                }
            } else if !directories.is_empty() {
                pending.push((full, true));
                pending.extend(directories.into_iter().map(|(inner, _)| (inner, false)));
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Done {
        let said_root = self.directories.contains_key(&b""[..]);
        for (path, mtime) in std::mem::take(&mut self.directories) {
            let path = if path.is_empty() { &b"."[..] } else { &path };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            match sys::open_in_root(&self.root, Path::new(OsStr::from_bytes(path)), flags, 0) {
                Ok(dir) => sys::futimens(&dir, mtime.0, mtime.1)?,
                // Replaced or deleted by a later entry.
                Err(e) if gone(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let implicit = std::mem::take(&mut self.implicit);
        self.out.implicit = (!said_root)
            .then(PathBuf::new)
            .into_iter()
            .chain(
                implicit
                    .into_iter()
                    .map(|path| OsStr::from_bytes(&path).into()),
            )
            .collect();
        Ok(())
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
    )
}

fn named(trouble: Trouble, path: &[u8]) -> Error {
    let shown: String = String::from_utf8_lossy(path).chars().take(256).collect();
    let what = format!("layer entry {shown:?}");
    match trouble {
        Trouble::Io(source) => Error::Io { what, source },
        Trouble::Refused(reason) => Error::invalid(what, reason),
        Trouble::Limit(limit, unit) => Error::Limit { what, limit, unit },
    }
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    match parent {
        b"" => name.to_vec(),
        parent => [parent, name].join(&b'/'),
    }
}

fn open(dir: &OwnedFd, name: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    sys::open_nofollow(dir, OsStr::from_bytes(name), flags, 0)
}

fn lstat(dir: &OwnedFd, name: &[u8]) -> io::Result<Option<Stat>> {
    match sys::lstatat(dir, OsStr::from_bytes(name)) {
        Ok(stat) => Ok(Some(stat)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Only ours: an image's own 0:0 device is refused before it is made.
fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn owner(entry: &Entry) -> Done<(u32, u32)> {
    match (u32::try_from(entry.uid), u32::try_from(entry.gid)) {
        (Ok(uid), Ok(gid)) if entry.uid <= OWNER_MAX && entry.gid <= OWNER_MAX => Ok((uid, gid)),
        _ => Err(Trouble::Refused("owner or group is not a 32-bit number")),
    }
}

/// Owner, mode and attributes, in this order: a change of owner clears set-id bits and file
/// capabilities (chown(2)).
fn describe(file: &OwnedFd, entry: &Entry) -> Done {
    let (uid, gid) = owner(entry)?;
    rustix::fs::fchown(
        file,
        Some(rustix::fs::Uid::from_raw(uid)),
        Some(rustix::fs::Gid::from_raw(gid)),
    )?;
    rustix::fs::fchmod(file, entry.mode.into())?;
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| xattr::wanted(name)) {
        let flags = rustix::fs::XattrFlags::empty();
        match rustix::fs::fsetxattr(file, name.as_slice(), value, flags) {
            // A file system without them has nothing to lose: containers cannot see them either.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn names(dir: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Takes `name` in `dir` and all directories below it out of `opaque`.
fn forget(opaque: &mut HashSet<(u64, u64)>, dir: &OwnedFd, name: &[u8]) -> io::Result<()> {
    // A stack of our own, as deep as an image likes; of paths, since descriptors are few.
    let mut pending = vec![name.to_vec()];
    while let Some(path) = pending.pop() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let inner = sys::open_beneath(dir, Path::new(OsStr::from_bytes(&path)), flags, 0)?;
        let stat = sys::fstat(&inner)?;
        opaque.remove(&(stat.st_dev, stat.st_ino));
        for below in names(&inner)? {
            let kind = lstat(&inner, &below)?.map(|stat| FileType::from_raw_mode(stat.st_mode));
            if kind == Some(FileType::Directory) {
                pending.push(join(&path, &below));
            }
        }
    }
    Ok(())
}

/// Deletes `name` in `dir` with everything below it; links are not followed.
fn remove_tree(dir: std::os::fd::BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    // The path ends in a name that is not followed (remove_dir_all opens it with O_NOFOLLOW).
    let path = sys::proc_fd(dir).join(OsStr::from_bytes(name));
    std::fs::remove_dir_all(path)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

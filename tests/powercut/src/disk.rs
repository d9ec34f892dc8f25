//! A disk that remembers the order of all that was asked of it.
//!
//! It is one file, served by FUSE, with a loop device over it. The kernel sends each write of the
//! loop device to the server before the write completes (FUSE without its write-back cache), and
//! each flush of the device's cache as an FSYNC (loop(4) calls `fsync` for one). The server writes
//! both down, in order, beside the marks that the driver of the workload makes in between.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};

/// What happened, in the order in which the disk saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// `length` bytes came for `offset`; they are kept at `at` of the log's data.
    Write { offset: u64, length: u32, at: u64 },
    /// The cache was flushed: every write before it is on the medium.
    Flush,
    /// The driver made a mark of that number.
    Mark(usize),
}

#[derive(Debug, Default)]
struct Entries {
    entries: Vec<Entry>,
    /// Bytes of data so far.
    end: u64,
}

/// What a disk was asked, with the data. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Log {
    entries: Arc<Mutex<Entries>>,
    data: Arc<File>,
}

impl Log {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            entries: Arc::default(),
            data: Arc::new(tempfile::tempfile_in("/var/tmp")?),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a mark: whatever the disk sees from now on comes after it.
    pub fn mark(&self, number: usize) {
        self.lock().entries.push(Entry::Mark(number));
    }

    /// Writes a flush down.
    pub(crate) fn flush(&self) {
        self.lock().entries.push(Entry::Flush);
    }

    /// Writes a write down; returns its length.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> io::Result<u32> {
        let length = u32::try_from(data.len()).map_err(io::Error::other)?;
        let mut log = self.lock();
        let at = log.end;
        self.data.write_all_at(data, at)?;
        log.end += u64::from(length);
        log.entries.push(Entry::Write { offset, length, at });
        Ok(length)
    }

    /// Entries so far.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.lock().entries.clone()
    }

    /// The data of a write.
    pub fn data(&self, at: u64, length: u32) -> io::Result<Vec<u8>> {
        let mut data = vec![0; length as usize];
        self.data.read_exact_at(&mut data, at)?;
        Ok(data)
    }
}

/// The file server.
#[derive(Debug)]
struct Server {
    backing: File,
    bytes: u64,
    log: Log,
}

const DISK: INodeNo = INodeNo(2);
const NAME: &str = "disk";
/// Nobody else changes anything.
const TTL: Duration = Duration::from_secs(3600);

impl Server {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o700, 0),
            DISK => (FileType::RegularFile, 0o600, self.bytes),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn reply_attributes(&self, inode: INodeNo, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn write_down(&self, offset: u64, data: &[u8]) -> io::Result<u32> {
        if offset + data.len() as u64 > self.bytes {
            return Err(io::Error::from_raw_os_error(nix::libc::ENOSPC));
        }
        self.backing.write_all_at(data, offset)?;
        self.log.write(offset, data)
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(DISK) {
            Some(attributes) if parent == INodeNo::ROOT && name == NAME => {
                reply.entry(&TTL, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.reply_attributes(inode, reply);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let wanted = self.bytes.saturating_sub(offset).min(u64::from(size));
        let mut data = vec![0; wanted as usize];
        match self.backing.read_exact_at(&mut data, offset) {
            Ok(()) => reply.data(&data),
            Err(error) => reply.error(error.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_down(offset, data) {
            Ok(length) => reply.written(length),
            Err(error) => reply.error(error.into()),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.log.flush();
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Of close(2): no matter of durability.
        reply.ok();
    }
}

/// A disk under a server that writes down what is asked of it. Whatever uses its file must be
/// gone before it is dropped.
#[derive(Debug)]
pub struct Disk {
    session: Option<BackgroundSession>,
    log: Log,
    dir: tempfile::TempDir,
}

impl Disk {
    /// Serves a copy of `medium`.
    pub fn serve(medium: &Path) -> io::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("gantry-disk-")
            .tempdir_in("/var/tmp")?;
        let backing = dir.path().join("backing");
        copy(medium, &backing)?;
        let backing = File::options().read(true).write(true).open(backing)?;
        let server = Server {
            bytes: backing.metadata()?.len(),
            backing,
            log: Log::new()?,
        };
        let log = server.log.clone();
        let point = dir.path().join("served");
        fs::create_dir(&point)?;
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("gantry-disk".to_owned())];
        let session = fuser::spawn_mount(server, &point, &config)?;
        Ok(Self {
            session: Some(session),
            log,
            dir,
        })
    }

    /// The file to put a loop device over.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("served").join(NAME)
    }

    pub fn log(&self) -> &Log {
        &self.log
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        let unmounted = crate::filesystem::unmount(&self.dir.path().join("served"));
        // The server ends when its file system has gone.
        if let Err(error) = unmounted.and_then(|()| session.join()) {
            println!("clean-up of {}: {error}", self.dir.path().display());
        }
    }
}

/// Copies a file, holes as holes.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut command = std::process::Command::new("cp");
    command.args(["--sparse=always", "--reflink=auto"]);
    crate::succeed(command.arg(from).arg(to))
}

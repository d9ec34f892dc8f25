//! What trees occupy, counted while a container may be changing them.
//!
//! Whoever writes to a tree can put a link in the place of a directory at any moment, or take a
//! directory from one place to another. So the walk goes from descriptor to descriptor, never by a
//! path: what it counts lies below its root, whatever happens meanwhile. What vanishes is passed over.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gantry_ports::Error;
use gantry_ports::snapshotter::{Measured, Usage};
use gantry_types::ErrorKind;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// Directories on the way down that stay open; a container may have nested its own a million deep.
/// Below them one is open, and the way up is `..`.
const OPEN_MAX: usize = 64;

/// What trees occupy on disk, their roots included. A file with several names counts once.
///
/// # Errors
/// A root that does not exist or is no directory, and whatever keeps a directory from being read.
pub fn measure(roots: &[PathBuf]) -> Result<Usage, Error> {
    match measure_within(roots, Bounds::default())? {
        Measured::Whole(usage) => Ok(usage),
        Measured::AtLeast(_, error) => Err(error),
    }
}

/// As [`measure()`] for trees that somebody may make larger than is good: what was counted up to a
/// bound is in them at least.
pub(crate) fn measure_within(roots: &[PathBuf], bounds: Bounds) -> Result<Measured, Error> {
    let mut walk = Walk {
        deadline: Instant::now().checked_add(bounds.time),
        bounds,
        ..Walk::default()
    };
    for root in roots {
        match walk.tree(root, |_| ()) {
            Ok(()) => {}
            Err(Stop::Failed(error)) => {
                let what = format_args!("measure {}", root.display());
                return Err(Error::io(what, error.into()));
            }
            Err(Stop::Bound(kind, bound)) => {
                let error = Error::new(kind, format!("measure {}: {bound}", root.display()));
                return Ok(Measured::AtLeast(walk.usage, error));
            }
        }
    }
    Ok(Measured::Whole(walk.usage))
}

/// What a walk may cost. The default is as much as there is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub entries: u64,
    pub time: Duration,
    /// Bytes of memory, about.
    pub held: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            entries: u64::MAX,
            time: Duration::MAX,
            held: usize::MAX,
        }
    }
}

/// Why a walk ended early.
#[derive(Debug)]
enum Stop {
    Failed(Errno),
    Bound(ErrorKind, String),
}

impl From<Errno> for Stop {
    fn from(error: Errno) -> Self {
        Self::Failed(error)
    }
}

/// What a name or an inode costs beside its bytes, about.
const HELD_EACH: usize = 32;

#[derive(Default)]
struct Walk {
    usage: Usage,
    bounds: Bounds,
    /// `None`: never.
    deadline: Option<Instant>,
    /// Entries met, counted or not.
    entries: u64,
    /// Memory in `linked` and in what is pending.
    held: usize,
    /// Inodes of files with several names.
    linked: HashSet<u64>,
}

/// A directory on the way from the root to where the walk is.
struct Level {
    /// `None`: closed until the walk comes back.
    fd: Option<OwnedFd>,
    id: (u64, u64),
    /// Directories in it that are still to be walked.
    pending: Vec<CString>,
}

impl Walk {
    /// `enter` is called with the name of each directory before it is opened.
    fn tree(&mut self, root: &PathBuf, mut enter: impl FnMut(&CStr)) -> Result<(), Stop> {
        let root = self.directory(open(CWD, root)?)?;
        let mut way = vec![root];
        while let Some(level) = way.last_mut() {
            let Some(name) = level.pending.pop() else {
                up(&mut way)?;
                continue;
            };
            self.held = self.held.saturating_sub(HELD_EACH + name.count_bytes());
            enter(&name);
            let Some(fd) = &level.fd else { continue };
            let inner = match open(fd, name.as_c_str()) {
                Err(error) if is_gone(error) => {
                    // Who swaps directories for links all the time has no entries to be counted.
                    self.step()?;
                    continue;
                }
                opened => self.directory(opened?)?,
            };
            if way.len() >= OPEN_MAX
                && let Some(level) = way.last_mut()
            {
                level.fd = None;
            }
            way.push(inner);
        }
        Ok(())
    }

    /// Counts an open directory and all in it that is none.
    fn directory(&mut self, fd: OwnedFd) -> Result<Level, Stop> {
        let stat = rustix::fs::fstat(&fd)?;
        self.count(&stat);
        let mut pending = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = match entry {
                // Deleted while it is open (getdents(2)).
                Err(Errno::NOENT) => break,
                entry => entry?,
            };
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            self.step()?;
            let stat = match rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(error) if is_gone(error) => continue,
                stat => stat?,
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                self.hold(name.count_bytes())?;
                pending.push(name.to_owned());
            } else if stat.st_nlink < 2 {
                self.count(&stat);
            } else if self.linked.insert(stat.st_ino) {
                self.hold(0)?;
                self.count(&stat);
            }
        }
        Ok(Level {
            id: id(&stat),
            fd: Some(fd),
            pending,
        })
    }

    /// One more entry.
    fn step(&mut self) -> Result<(), Stop> {
        self.entries += 1;
        if self.entries > self.bounds.entries {
            let bound = format!("more than {} entries", self.bounds.entries);
            return Err(Stop::Bound(ErrorKind::ResourceExhausted, bound));
        }
        if self.deadline.is_some_and(|at| at <= Instant::now()) {
            let bound = format!("not at its end after {:?}", self.bounds.time);
            return Err(Stop::Bound(ErrorKind::DeadlineExceeded, bound));
        }
        Ok(())
    }

    /// Memory for one more thing.
    fn hold(&mut self, bytes: usize) -> Result<(), Stop> {
        self.held = self.held.saturating_add(HELD_EACH + bytes);
        if self.held > self.bounds.held {
            let bound = "too many directories side by side, or files with several names";
            return Err(Stop::Bound(ErrorKind::ResourceExhausted, bound.to_owned()));
        }
        Ok(())
    }

    fn count(&mut self, stat: &Stat) {
        let blocks = u64::try_from(stat.st_blocks).unwrap_or_default();
        self.usage.bytes = self.usage.bytes.saturating_add(blocks.saturating_mul(512));
        self.usage.inodes += 1;
    }
}

/// Leaves the last directory of `way`. If it was taken elsewhere meanwhile, its `..` is not where
/// the walk came from: then what is left of the directories up to one that is still open is not
/// counted.
fn up(way: &mut Vec<Level>) -> Result<(), Errno> {
    let left = way.pop().and_then(|level| level.fd);
    let Some(above) = way.last_mut().filter(|level| level.fd.is_none()) else {
        return Ok(());
    };
    if let Some(left) = left {
        match open(&left, c"..") {
            Ok(parent) if id(&rustix::fs::fstat(&parent)?) == above.id => {
                above.fd = Some(parent);
                return Ok(());
            }
            Ok(_) => {}
            Err(error) if is_gone(error) => {}
            Err(error) => return Err(error),
        }
    }
    while way.last().is_some_and(|level| level.fd.is_none()) {
        way.pop();
    }
    Ok(())
}

fn id(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn open(dir: impl AsFd, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// It vanished, or something else is in its place.
fn is_gone(error: Errno) -> bool {
    matches!(error, Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use gantry_types::Kind;

    use super::*;

    fn inodes(root: &Path) -> u64 {
        measure(&[root.to_owned()]).unwrap().inodes
    }

    #[test]
    fn a_directory_swapped_for_a_link_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        for path in ["root/a/deep", "root/b", "outside/deep"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        for n in 0..10 {
            fs::write(outside.join(format!("deep/{n}")), vec![1; 100_000]).unwrap();
        }
        fs::write(root.join("a/deep/inside"), "x").unwrap();
        symlink(&outside, root.join("b/link")).unwrap();
        let whole = measure(std::slice::from_ref(&root)).unwrap();
        assert_eq!(whole.inodes, 6, "a link counts, not where it leads");
        assert!(whole.bytes < 100_000, "{whole:?}");

        // Each is swapped when the walk knows it as a directory and has not opened it yet.
        for (victim, left) in [("a", 3), ("deep", 4)] {
            let root = dir.path().join(format!("swapped-{victim}"));
            fs::create_dir_all(root.join("a/deep")).unwrap();
            fs::create_dir(root.join("b")).unwrap();
            fs::write(root.join("a/deep/inside"), "x").unwrap();
            fs::write(root.join("file"), "x").unwrap();
            let place = match victim {
                "a" => root.join("a"),
                _ => root.join("a/deep"),
            };
            let mut swaps = 0;
            let mut walk = Walk::default();
            walk.tree(&root, |name| {
                if name.to_str() == Ok(victim) {
                    fs::remove_dir_all(&place).unwrap();
                    symlink(&outside, &place).unwrap();
                    swaps += 1;
                }
            })
            .unwrap();
            assert_eq!(swaps, 1, "{victim}");
            assert_eq!(walk.usage.inodes, left, "{victim}");
            assert!(walk.usage.bytes < 100_000, "{victim}: {:?}", walk.usage);
        }
    }

    #[test]
    fn a_deep_tree_is_counted_with_few_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("tree");
        fs::create_dir(&root).unwrap();
        let mode = Mode::from_raw_mode(0o700);
        let mut at = open(CWD, &root).unwrap();
        for _ in 0..5000 {
            for name in ["d", "e", "f"] {
                rustix::fs::mkdirat(&at, name, mode).unwrap();
            }
            at = open(&at, "d").unwrap();
        }
        let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
        let (mut most, mut entered) = (0, 0_u32);
        let mut walk = Walk::default();
        walk.tree(&root, |_| {
            entered += 1;
            if entered % 100 == 0 {
                most = most.max(descriptors());
            }
        })
        .unwrap();
        assert_eq!(walk.usage.inodes, 1 + 3 * 5000);
        // Other tests of this process have some open too.
        assert!(most < 8 * OPEN_MAX, "{most} descriptors");
        crate::layout::remove_tree(&root).unwrap();
    }

    /// Deep below, the way up is no longer the way down: the rest of that branch is not counted, what
    /// is beside it is, and nothing outside.
    #[test]
    fn a_directory_taken_elsewhere_does_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let branch: PathBuf = std::iter::repeat_n("d", OPEN_MAX + 4).collect();
        fs::create_dir_all(root.join(&branch).join("last")).unwrap();
        fs::create_dir(root.join("beside")).unwrap();
        for n in 0..10 {
            fs::create_dir(dir.path().join(format!("outside-{n}"))).unwrap();
        }
        let before = inodes(&root);
        assert_eq!(before, 3 + u64::try_from(OPEN_MAX).unwrap() + 4);
        let moved = root.join(&branch);
        let mut walk = Walk::default();
        walk.tree(&root, |name| {
            if name == c"last" {
                fs::rename(&moved, dir.path().join("away")).unwrap();
            }
        })
        .unwrap();
        assert_eq!(walk.usage.inodes, before);
    }

    #[test]
    fn a_walk_ends_at_its_bounds() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..10 {
            fs::create_dir(dir.path().join(format!("d{n}"))).unwrap();
            let file = dir.path().join(format!("d{n}/file"));
            fs::write(&file, "x").unwrap();
            fs::hard_link(&file, dir.path().join(format!("d{n}/again"))).unwrap();
        }
        let roots = [dir.path().to_owned()];
        let within = |bounds| measure_within(&roots, bounds);
        let whole = measure(&roots).unwrap();
        assert_eq!(whole.inodes, 21);
        let enough = Bounds {
            entries: 30,
            time: Duration::from_secs(600),
            held: 20 * (HELD_EACH + 2),
        };
        let counted = |bounds| match within(bounds).unwrap() {
            Measured::Whole(usage) => usage,
            Measured::AtLeast(_, error) => panic!("{error}"),
        };
        assert_eq!(counted(enough), whole);
        let table = [
            (
                Bounds {
                    entries: 29,
                    ..enough
                },
                ErrorKind::ResourceExhausted,
                20,
            ),
            (
                Bounds {
                    held: 9 * (HELD_EACH + 2),
                    ..enough
                },
                ErrorKind::ResourceExhausted,
                1,
            ),
            (
                Bounds {
                    time: Duration::ZERO,
                    ..enough
                },
                ErrorKind::DeadlineExceeded,
                1,
            ),
        ];
        for (bounds, kind, least) in table {
            let Measured::AtLeast(part, error) = within(bounds).unwrap() else {
                panic!("{bounds:?} held nothing up");
            };
            assert!((least..=whole.inodes).contains(&part.inodes), "{part:?}");
            assert!(part.bytes <= whole.bytes, "{part:?}");
            assert_eq!(error.kind(), kind, "{bounds:?}: {error}");
            assert!(error.to_string().contains(&roots[0].display().to_string()));
        }
        // A directory that was walked is not held any more.
        let held = Bounds {
            held: 10 * (HELD_EACH + 2),
            ..enough
        };
        assert_eq!(counted(held), whole);
    }

    #[test]
    fn what_is_no_directory_is_no_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        symlink(dir.path(), dir.path().join("link")).unwrap();
        for name in ["file", "link", "missing"] {
            let error = measure(&[dir.path().join(name)]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}

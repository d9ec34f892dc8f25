//! Comparing an unpacked layer with what its archive says.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use gantry_sys::fs as sys;
use gantry_sys::fs::{FileType, OFlags, ResolveFlags, Stat};

/// Differences that are told of one tree; more say nothing new.
const TOLD_MAX: usize = 20;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW);

/// Where two trees differ: a path and in what, for people. The times of directories and devices do not count.
pub fn trees(wanted: &Path, found: &Path) -> io::Result<Vec<String>> {
    let (wanted, found) = (sys::open_root(wanted)?, sys::open_root(found)?);
    let mut told = Vec::new();
    let mut pending = vec![PathBuf::from(".")];
    while let Some(dir) = pending.pop() {
        let open = |root: &OwnedFd| {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            sys::openat2(root, &dir, DIRECTORY, 0, resolve)
        };
        let (ours, theirs) = (open(&wanted)?, open(&found)?);
        if dir == Path::new(".")
            && let Some(what) = differs(&(&ours, &theirs), OsStr::new("."))?
        {
            told.push(format!("/: {what}"));
        }
        let mut names: BTreeSet<Vec<u8>> = names(&ours)?;
        names.extend(self::names(&theirs)?);
        for name in names {
            if told.len() >= TOLD_MAX {
                told.push("and more".to_owned());
                return Ok(told);
            }
            let name = OsStr::from_bytes(&name);
            let path = dir.join(name);
            let shown = || Path::new("/").join(path.strip_prefix(".").unwrap_or(&path));
            match (stat(&ours, name)?, stat(&theirs, name)?) {
                (Some(_), None) => told.push(format!("{:?}: is missing", shown())),
                (None, Some(_)) => told.push(format!("{:?}: should not be there", shown())),
                (Some(stat), Some(_)) => match differs(&(&ours, &theirs), name)? {
                    Some(what) => told.push(format!("{:?}: {what}", shown())),
                    None if kind(&stat) == FileType::Directory => pending.push(path),
                    None => {}
                },
                (None, None) => {}
            }
        }
    }
    Ok(told)
}

fn names(dir: &OwnedFd) -> io::Result<BTreeSet<Vec<u8>>> {
    let mut names = BTreeSet::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.insert(name.to_vec());
        }
    }
    Ok(names)
}

fn stat(dir: &OwnedFd, name: &OsStr) -> io::Result<Option<Stat>> {
    match sys::lstatat(dir, name) {
        Ok(stat) => Ok(Some(stat)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// In what the two files of one name differ.
fn differs(
    (ours, theirs): &(&OwnedFd, &OwnedFd),
    name: &OsStr,
) -> io::Result<Option<&'static str>> {
    let (want, have) = (sys::lstatat(ours, name)?, sys::lstatat(theirs, name)?);
    let times = |stat: &Stat| (stat.st_mtime, stat.st_mtime_nsec);
    if kind(&want) != kind(&have) {
        return Ok(Some("another kind of file"));
    }
    if (want.st_uid, want.st_gid) != (have.st_uid, have.st_gid) {
        return Ok(Some("another owner"));
    }
    if want.st_mode != have.st_mode {
        return Ok(Some("another mode"));
    }
    let open = |dir: &OwnedFd, flags| sys::open_nofollow(dir, name, flags, 0);
    let differ = match kind(&want) {
        FileType::Directory => None,
        FileType::RegularFile if want.st_size != have.st_size => Some("another size"),
        FileType::RegularFile => {
            let (ours, theirs) = (open(ours, OFlags::RDONLY)?, open(theirs, OFlags::RDONLY)?);
            (!same(File::from(ours), File::from(theirs))?).then_some("another content")
        }
        FileType::Symlink => {
            let read = |dir: &OwnedFd| rustix::fs::readlinkat(dir, name, Vec::new());
            (read(ours)? != read(theirs)?).then_some("leads elsewhere")
        }
        _ => (want.st_rdev != have.st_rdev).then_some("another device"),
    };
    if differ.is_some() {
        return Ok(differ);
    }
    // Whiteouts are made when they are unpacked.
    let timed = matches!(kind(&want), FileType::RegularFile | FileType::Symlink);
    if timed && times(&want) != times(&have) {
        return Ok(Some("another time"));
    }
    let attributes = |dir: &OwnedFd| attributes(&open(dir, OFlags::PATH)?);
    Ok((attributes(ours)? != attributes(theirs)?).then_some("other extended attributes"))
}

fn attributes(file: &OwnedFd) -> io::Result<Vec<(std::ffi::OsString, Option<Vec<u8>>)>> {
    let mut names = match sys::list_xattr(file) {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Vec::new(),
        names => names?,
    };
    // The node's labels, not the image's.
    names.retain(|name| name != "security.selinux" && name != "security.ima");
    names.sort();
    names
        .into_iter()
        .map(|name| sys::get_xattr(file, &name).map(|value| (name, value)))
        .collect()
}

fn same(mut ours: File, mut theirs: File) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        let n = ours.read(&mut left)?;
        if n == 0 {
            return Ok(theirs.read(&mut right[..1])? == 0);
        }
        match theirs.read_exact(&mut right[..n]) {
            Ok(()) if left[..n] == right[..n] => {}
            Ok(()) => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn tree(root: &Path) {
        fs::create_dir_all(root.join("d/e")).unwrap();
        for name in ["d/file", "d/other", "top"] {
            fs::write(root.join(name), "content").unwrap();
        }
        symlink("top", root.join("link")).unwrap();
        let dir = sys::open_root(root).unwrap();
        for name in ["top", "link"] {
            sys::lutimensat(&dir, OsStr::new(name), 1_000_000_000, 0).unwrap();
        }
        let dir = sys::open_root(&root.join("d")).unwrap();
        for name in ["file", "other"] {
            sys::lutimensat(&dir, OsStr::new(name), 1_000_000_000, 0).unwrap();
        }
    }

    #[test]
    fn every_kind_of_difference_is_told_with_its_path() {
        if !rustix::process::geteuid().is_root() {
            println!(
                "SKIP every_kind_of_difference_is_told_with_its_path: changing owners needs root"
            );
            return;
        }
        type Damage = fn(&Path);
        let damages: [(Damage, &str); 9] = [
            (
                |root| fs::remove_file(root.join("d/file")).unwrap(),
                "\"/d/file\": is missing",
            ),
            (
                |root| fs::write(root.join("d/e/new"), "").unwrap(),
                "\"/d/e/new\": should not",
            ),
            (
                |root| fs::write(root.join("top"), "").unwrap(),
                "\"/top\": another size",
            ),
            (
                |root| {
                    fs::write(root.join("top"), "CONTENT").unwrap();
                },
                "\"/top\": another content",
            ),
            (
                |root| chown(root.join("d/other"), Some(7), None).unwrap(),
                "\"/d/other\": another owner",
            ),
            (
                |root| {
                    fs::set_permissions(root.join("d"), fs::Permissions::from_mode(0o700)).unwrap();
                },
                "\"/d\": another mode",
            ),
            (
                |root| {
                    fs::remove_file(root.join("link")).unwrap();
                    symlink("else", root.join("link")).unwrap();
                },
                "\"/link\": leads elsewhere",
            ),
            (
                |root| {
                    fs::remove_dir(root.join("d/e")).unwrap();
                    fs::write(root.join("d/e"), "").unwrap();
                },
                "\"/d/e\": another kind",
            ),
            (
                |root| {
                    fs::set_permissions(root, fs::Permissions::from_mode(0o700)).unwrap();
                },
                "/: another mode",
            ),
        ];
        for (damage, says) in damages {
            let work = tempfile::tempdir().unwrap();
            let (wanted, found) = (work.path().join("wanted"), work.path().join("found"));
            tree(&wanted);
            tree(&found);
            assert_eq!(trees(&wanted, &found).unwrap(), [""; 0], "{says}");
            damage(&found);
            let told = trees(&wanted, &found).unwrap();
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(told[0].starts_with(says), "{told:?} and not {says:?}");
        }
    }
}

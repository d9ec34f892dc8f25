//! SELinux labels on files of the host that a container is given.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use gantry_sys::fs::OFlags;
use nix::errno::Errno;

use crate::Error;

const XATTR: &str = "security.selinux";

/// Directories of the system itself: relabelled, they would be out of reach for the host.
const NEVER: [&str; 18] = [
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/opt", "/proc", "/root",
    "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var",
];

/// Gives `label` to a file, or to a directory and all that is below it.
///
/// # Errors
/// InvalidArgument for a directory of the system. What cannot be labelled is an error too, but
/// not on a file system without labels.
pub(super) fn relabel(path: &Path, label: &str) -> Result<(), Error> {
    if NEVER.iter().any(|never| path == Path::new(never)) {
        return Err(Error::Invalid {
            field: format!("mounts[{}].selinux_relabel", path.display()),
            reason: "is a directory of the system".to_owned(),
        });
    }
    let mut value = label.as_bytes().to_vec();
    value.push(0);
    walk(path, &mut |file| {
        let set = gantry_sys::fs::set_xattr(file, XATTR.as_ref(), &value);
        match set.as_ref().err().and_then(io::Error::raw_os_error) {
            // EOPNOTSUPP: NFS and others carry one label for the whole mount.
            Some(code) if code == Errno::EOPNOTSUPP as i32 => Ok(()),
            _ => set,
        }
    })
    .map_err(|error| Error::io("relabel", path, &error))
}

/// Calls `visit` for `path` and everything below it. By descriptors, and following nothing: the
/// files may belong to a container that exchanges them for links meanwhile.
fn walk(path: &Path, visit: &mut dyn FnMut(BorrowedFd<'_>) -> io::Result<()>) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW;
    let root = gantry_sys::fs::open_nofollow(nix::fcntl::AT_FDCWD, path.as_os_str(), flags, 0)?;
    let mut pending = vec![root];
    while let Some(file) = pending.pop() {
        visit(file.as_fd())?;
        let kind = gantry_sys::fs::fstat(&file)?.st_mode & nix::libc::S_IFMT;
        if kind != nix::libc::S_IFDIR {
            continue;
        }
        for entry in fs::read_dir(gantry_sys::fs::proc_fd(file.as_fd()))? {
            let opened: io::Result<OwnedFd> =
                gantry_sys::fs::open_nofollow(&file, &entry?.file_name(), flags, 0);
            match opened {
                Ok(below) => pending.push(below),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_itself_is_never_relabelled() {
        for path in NEVER {
            let error = relabel(Path::new(path), "x").unwrap_err();
            assert!(error.to_string().contains("directory of the system"));
        }
    }

    #[test]
    fn a_tree_is_walked_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, other) = (dir.path().join("tree"), dir.path().join("other"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(other.join("host"), "").unwrap();
        fs::write(tree.join("a/file"), "").unwrap();
        std::os::unix::fs::symlink(&other, tree.join("a/link")).unwrap();
        let mut seen = Vec::new();
        walk(&tree, &mut |file| {
            seen.push(fs::read_link(gantry_sys::fs::proc_fd(file))?);
            Ok(())
        })
        .unwrap();
        seen.sort();
        let expected = ["", "a", "a/b", "a/file", "a/link"].map(|name| tree.join(name));
        assert_eq!(
            seen,
            expected.map(|path| path.components().collect::<std::path::PathBuf>())
        );
        assert!(walk(&dir.path().join("none"), &mut |_| Ok(())).is_err());
    }
}

//! Bind mounts and unmounting, for the pins of namespaces; mounts that are in no tree.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{self as rm, UnmountFlags};

/// Bind mount of one file or directory, without what is mounted below it.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    Ok(rm::mount_bind(source, target)?)
}

/// A copy of the mount below `source` that is in no tree: it lasts as long as the descriptor,
/// unless it is put somewhere by [`attach`].
pub fn detached(source: &Path) -> io::Result<OwnedFd> {
    use rustix::mount::OpenTreeFlags;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(rm::open_tree(rustix::fs::CWD, source, flags)?)
}

/// As [`detached`], with the owners of files seen through a user namespace: what belongs to id n
/// on disk belongs to the id that n inside it stands for (mount_setattr(2), MOUNT_ATTR_IDMAP).
/// EINVAL: the file system cannot do this, overlayfs and NFS among them.
pub fn idmapped(source: &Path, user_namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let tree = detached(source)?;
    set_attributes(&tree, libc::MOUNT_ATTR_IDMAP, Some(user_namespace))?;
    Ok(tree)
}

/// As [`detached`], and nobody can write through it.
pub fn detached_read_only(source: &Path) -> io::Result<OwnedFd> {
    let tree = detached(source)?;
    set_attributes(&tree, libc::MOUNT_ATTR_RDONLY, None)?;
    Ok(tree)
}

/// mount_setattr(2), Linux 5.12.
fn set_attributes(
    tree: &OwnedFd,
    set: u64,
    user_namespace: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user_namespace.map_or(0, |namespace| namespace.as_raw_fd() as u64),
    };
    // SAFETY: the descriptors are open for the call, the path is an empty C string, and the
    // kernel reads no more of `attributes` than the size that it is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            std::mem::size_of_val(&attributes),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Puts a mount that is in no tree at `target`.
pub fn attach(tree: OwnedFd, target: &Path) -> io::Result<()> {
    use rustix::mount::MoveMountFlags;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rm::move_mount(tree, "", rustix::fs::CWD, target, flags)?)
}

/// The sysfs of this process's network namespace, mounted nowhere: it lasts as long as the
/// descriptor. Its superblock is writable, and other mounts of it may be; this one is not, since
/// whoever gets at the descriptor must not write to the host's devices. All mounts of one network namespace's sysfs share a superblock, which stays
/// read-only for all of them if the mount(2) that made it asked for that (sget_fc(), fs/super.c).
pub fn detached_sysfs() -> io::Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let context = rm::fsopen("sysfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rm::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(rm::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// Takes every mount off `target`, however many are stacked; none, or no such file, is success.
/// Falls back to a lazy unmount where something is still in use.
pub fn umount_all(target: &Path) -> io::Result<()> {
    loop {
        match rm::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(Errno::BUSY) => {
                rm::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacked_binds_are_all_taken_off() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP stacked_binds_are_all_taken_off: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("target"));
        std::fs::write(&source, "bound").unwrap();
        std::fs::write(&target, "").unwrap();
        bind(&source, &target).unwrap();
        bind(&source, &target).unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "bound");
        umount_all(&target).unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "");
    }

    #[test]
    fn unmounting_what_is_not_mounted_is_success() {
        let dir = tempfile::tempdir().unwrap();
        umount_all(&dir.path().join("absent")).unwrap();
        if rustix::process::geteuid().is_root() {
            umount_all(dir.path()).unwrap();
        }
    }
}

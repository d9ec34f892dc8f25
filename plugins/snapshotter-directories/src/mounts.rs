//! Mount points: whether something is there, and taking it away.

use std::path::Path;

use gantry_ports::Error;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// Whether something is mounted at `path`; a path that does not exist is an error.
pub fn is_mount_point(path: &Path) -> Result<bool, Error> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE)
        .map_err(|e| Error::io(format_args!("stat {}", path.display()), e.into()))?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Takes every mount off `target`; not mounted, or no such file, is success.
pub fn unmount(target: &Path) -> Result<(), Error> {
    // More than once if a killed process mounted and another mounted again on top.
    for _ in 0..16 {
        let mut result = rustix::mount::unmount(target, UnmountFlags::NOFOLLOW);
        if result == Err(Errno::BUSY) {
            // Held through another mount namespace or an open file: out of the way now, gone
            // with the last user.
            result = rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
        }
        match result {
            Ok(()) => {}
            // umount(2): EINVAL is "not a mount point".
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(e) => {
                return Err(Error::io(
                    format_args!("unmount {}", target.display()),
                    e.into(),
                ));
            }
        }
    }
    Err(Error::internal(format!(
        "{} is mounted again and again",
        target.display()
    )))
}

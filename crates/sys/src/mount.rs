//! Mounting: overlay by the fsconfig API, bind mounts, unmounting, pivot_root.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount as rm;
pub use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags};

/// fsconfig(2) copies at most 256 bytes of a string value, the final NUL included.
const FSCONFIG_STRING_MAX: usize = 255;

/// An overlay to mount (kernel: Documentation/filesystems/overlayfs.rst).
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    /// Topmost layer first, as the kernel's `lowerdir` lists them.
    pub lower: &'a [&'a Path],
    /// Upper and work directory, which must be on one file system; `None` mounts read-only and
    /// needs at least two lower layers.
    pub upper: Option<(&'a Path, &'a Path)>,
    /// More options, each `key` or `key=value`.
    pub options: &'a [&'a str],
}

/// Mounts an overlay at `target`. Each lower layer is handed over on its own (`lowerdir+`, since
/// Linux 6.8), so that their number is not bounded by a page; an older kernel gets the classic
/// colon-joined string, and then E2BIG tells that it does not fit.
pub fn overlay_mount(overlay: &Overlay<'_>, target: &Path) -> io::Result<()> {
    match overlay_fsconfig(overlay) {
        Ok(mount) => attach(&mount, target),
        Err(Errno::INVAL | Errno::NOSYS) => overlay_classic(overlay, target),
        Err(errno) => Err(errno.into()),
    }
}

/// A detached overlay mount; attach it with [`attach`].
fn overlay_fsconfig(overlay: &Overlay<'_>) -> Result<OwnedFd, Errno> {
    let fs = rm::fsopen("overlay", rm::FsOpenFlags::FSOPEN_CLOEXEC)?;
    rm::fsconfig_set_string(&fs, "source", "overlay")?;
    // Lives until the superblock is made, because a long path is named through it.
    let mut open = Vec::new();
    for layer in overlay.lower {
        set_directory(&fs, "lowerdir+", layer, &mut open)?;
    }
    if let Some((upper, work)) = overlay.upper {
        set_directory(&fs, "upperdir", upper, &mut open)?;
        set_directory(&fs, "workdir", work, &mut open)?;
    }
    for option in overlay.options {
        match option.split_once('=') {
            Some((key, value)) => rm::fsconfig_set_string(&fs, key, value)?,
            None => rm::fsconfig_set_flag(&fs, *option)?,
        }
    }
    rm::fsconfig_create(&fs)?;
    let attributes = match overlay.upper {
        Some(_) => rm::MountAttrFlags::empty(),
        None => rm::MountAttrFlags::MOUNT_ATTR_RDONLY,
    };
    rm::fsmount(&fs, rm::FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Names a directory to the new file system; one whose path is too long for fsconfig goes by its
/// link below `/proc/self/fd`, which `open` keeps valid.
fn set_directory(
    fs: &OwnedFd,
    key: &str,
    path: &Path,
    open: &mut Vec<OwnedFd>,
) -> Result<(), Errno> {
    if path.as_os_str().len() <= FSCONFIG_STRING_MAX {
        return rm::fsconfig_set_string(fs, key, path);
    }
    let directory = crate::fs::open_root(path)
        .map_err(|e| e.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error))?;
    let result = rm::fsconfig_set_string(fs, key, crate::fs::proc_fd(directory.as_fd()));
    open.push(directory);
    result
}

fn overlay_classic(overlay: &Overlay<'_>, target: &Path) -> io::Result<()> {
    let data = classic_data(overlay);
    let page = rustix::param::page_size();
    if data.len() >= page {
        // mount(2) would cut the string silently and mount fewer layers.
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let mut flags = rm::MountFlags::empty();
    if overlay.upper.is_none() {
        flags |= rm::MountFlags::RDONLY;
    }
    let data = CString::new(data.into_vec())?;
    Ok(rm::mount(
        "overlay",
        target,
        "overlay",
        flags,
        data.as_c_str(),
    )?)
}

/// The option string of mount(2). A backslash escapes the separators, as the overlayfs
/// documentation asks for `:` in lower layers and the option parser for `,` everywhere.
fn classic_data(overlay: &Overlay<'_>) -> OsString {
    let mut data = b"lowerdir=".to_vec();
    let escaped = |path: &Path, data: &mut Vec<u8>, colon: bool| {
        for &byte in path.as_os_str().as_bytes() {
            if byte == b'\\' || byte == b',' || (colon && byte == b':') {
                data.push(b'\\');
            }
            data.push(byte);
        }
    };
    for (index, layer) in overlay.lower.iter().enumerate() {
        if index > 0 {
            data.push(b':');
        }
        escaped(layer, &mut data, true);
    }
    if let Some((upper, work)) = overlay.upper {
        data.extend_from_slice(b",upperdir=");
        escaped(upper, &mut data, false);
        data.extend_from_slice(b",workdir=");
        escaped(work, &mut data, false);
    }
    for option in overlay.options {
        data.push(b',');
        data.extend_from_slice(option.as_bytes());
    }
    OsString::from_vec(data)
}

/// Attaches a detached mount at `target` (move_mount(2)).
pub fn attach(mount: &OwnedFd, target: &Path) -> io::Result<()> {
    let flags = rm::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rm::move_mount(mount, "", CWD, target, flags)?)
}

/// A mount(2) with options as a string, for file systems that need nothing more.
pub fn mount(
    source: &str,
    target: &Path,
    fstype: &str,
    flags: MountFlags,
    data: &str,
) -> io::Result<()> {
    let data = CString::new(data)?;
    Ok(rm::mount(source, target, fstype, flags, data.as_c_str())?)
}

/// Bind mount of one file or directory, without what is mounted below it.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    Ok(rm::mount_bind(source, target)?)
}

/// Bind mount with everything mounted below.
pub fn bind_recursive(source: &Path, target: &Path) -> io::Result<()> {
    Ok(rm::mount_bind_recursive(source, target)?)
}

/// Changes flags of an existing mount (`MS_REMOUNT`); give `MountFlags::BIND` to change only this
/// mount and not its file system.
pub fn remount(target: &Path, flags: MountFlags) -> io::Result<()> {
    Ok(rm::mount_remount(target, flags, c"")?)
}

/// Changes how mount events propagate (mount_namespaces(7)).
pub fn set_propagation(target: &Path, flags: MountPropagationFlags) -> io::Result<()> {
    Ok(rm::mount_change(target, flags)?)
}

/// umount2(2) that does not follow a symbolic link at `target`. Not mounted is EINVAL, absent is
/// ENOENT.
pub fn umount(target: &Path, detach: bool) -> io::Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    if detach {
        flags |= UnmountFlags::DETACH;
    }
    Ok(rm::unmount(target, flags)?)
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

/// pivot_root(2).
pub fn pivot_root(new_root: &Path, put_old: &Path) -> io::Result<()> {
    Ok(rustix::process::pivot_root(new_root, put_old)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn the_classic_string_escapes_separators() {
        let lower = [Path::new("/a:b"), Path::new("/c,d")];
        let overlay = Overlay {
            lower: &lower,
            upper: Some((Path::new("/u:u"), Path::new("/w"))),
            options: &["index=off"],
        };
        let data = classic_data(&overlay).into_string().unwrap();
        assert_eq!(
            data,
            r"lowerdir=/a\:b:/c\,d,upperdir=/u:u,workdir=/w,index=off"
        );
    }

    struct Mounted(PathBuf);

    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = umount_all(&self.0);
        }
    }

    #[test]
    fn more_layers_than_a_page_can_name_are_mounted() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP more_layers_than_a_page_can_name_are_mounted: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        // The overlay's own directories must not lie on an overlay: give them a tmpfs.
        let base = dir.path().join("base");
        std::fs::create_dir(&base).unwrap();
        mount("tmpfs", &base, "tmpfs", MountFlags::empty(), "").unwrap();
        let _base = Mounted(base.clone());
        let long = base.join("x".repeat(200)).join("y".repeat(100));
        let mut layers = Vec::new();
        for n in 0..100 {
            let layer = if n == 0 {
                long.clone()
            } else {
                base.join(format!("{n:0>64}"))
            };
            std::fs::create_dir_all(&layer).unwrap();
            std::fs::write(layer.join(format!("f{n}")), "x").unwrap();
            layers.push(layer);
        }
        let [upper, work, target] = ["upper", "work", "target"].map(|name| {
            let path = base.join(name);
            std::fs::create_dir(&path).unwrap();
            path
        });
        let lower: Vec<&Path> = layers.iter().map(PathBuf::as_path).collect();
        let overlay = Overlay {
            lower: &lower,
            upper: Some((&upper, &work)),
            options: &["metacopy=off"],
        };
        if let Err(error) = overlay_mount(&overlay, &target) {
            assert_eq!(error.raw_os_error(), Some(libc::E2BIG), "{error}");
            println!("SKIP more_layers_than_a_page_can_name_are_mounted: kernel before 6.8");
            return;
        }
        let _target = Mounted(target.clone());
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 100);
        std::fs::write(target.join("new"), "x").unwrap();
        assert!(upper.join("new").exists());
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

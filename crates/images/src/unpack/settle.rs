//! What a layer that was unpacked alone needs of the layers below it.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use gantry_sys::fs as sys;
use gantry_sys::fs::{FileType, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{Unpacked, xattr};
use crate::{Error, Result};

/// Completes the layer at `root`, for a snapshotter that stacks layers. `below` are the trees of
/// its parents, topmost first, themselves complete.
///
/// - A directory that the layer has files in but no entry for keeps the owner, mode and time that
///   it has below. In a stack of directories the topmost one's are seen, so that a layer of one
///   file in `/tmp` would otherwise take its sticky bit away.
/// - overlayfs ignores the opaque mark on the root of a layer, so that a layer that hides all
///   below gets one whiteout or mark per name.
pub fn settle(root: &Path, unpacked: &Unpacked, below: &[PathBuf]) -> Result<()> {
    let fail = |e: io::Error| Error::io(format_args!("complete layer {}", root.display()), e);
    if unpacked.opaque_root {
        return hide_all(root, below).map_err(fail);
    }
    let top = sys::open_root(root).map_err(fail)?;
    let below: Vec<OwnedFd> = below
        .iter()
        .map(|dir| sys::open_root(dir))
        .collect::<io::Result<_>>()
        .map_err(fail)?;
    for path in &unpacked.implicit {
        inherit(&top, &below, path).map_err(fail)?;
    }
    Ok(())
}

fn lookup(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    sys::openat2(
        root,
        path,
        flags,
        0,
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
}

fn inherit(top: &OwnedFd, below: &[OwnedFd], path: &Path) -> io::Result<()> {
    let ours = match lookup(top, path) {
        Ok(dir) => dir,
        // Replaced by a later entry of the layer.
        Err(e) if ends(&e).is_some() => return Ok(()),
        Err(e) => return Err(e),
    };
    for layer in below {
        let theirs = match lookup(layer, path) {
            Ok(dir) => dir,
            Err(e) => match ends(&e) {
                Some(true) => return Ok(()),
                // What is further down is hidden from here on.
                Some(false) if is_below_opaque(layer, path)? => return Ok(()),
                Some(false) => continue,
                None => return Err(e),
            },
        };
        let stat = sys::fstat(&theirs)?;
        sys::chown(&ours, stat.st_uid, stat.st_gid)?;
        sys::chmod(&ours, stat.st_mode & 0o7777)?;
        for name in sys::list_xattr(&theirs)? {
            if xattr::wanted(name.as_bytes())
                && let Some(value) = sys::get_xattr(&theirs, &name)?
            {
                sys::set_xattr(&ours, &name, &value)?;
            }
        }
        let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
        return sys::futimens(&ours, stat.st_mtime, nanos);
    }
    Ok(())
}

/// Whether a directory above `path` is opaque in this layer.
fn is_below_opaque(layer: &OwnedFd, path: &Path) -> io::Result<bool> {
    for above in path.ancestors().skip(1) {
        let dir = match lookup(layer, above) {
            Ok(dir) => dir,
            Err(e) if ends(&e).is_some() => continue,
            Err(e) => return Err(e),
        };
        if sys::get_xattr(&dir, xattr::os(xattr::OPAQUE))?.as_deref() == Some(b"y") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a failed lookup means "not in this layer, look further down" (`false`) or "something
/// else stands there, the directory of the layers further down is hidden" (`true`).
fn ends(error: &io::Error) -> Option<bool> {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => Some(false),
        Some(Errno::NOTDIR | Errno::LOOP) => Some(true),
        _ => None,
    }
}

fn hide_all(root: &Path, below: &[PathBuf]) -> io::Result<()> {
    let top = sys::open_root(root)?;
    let mut seen = HashSet::new();
    for layer in below {
        for entry in fs::read_dir(layer)? {
            let name = entry?.file_name();
            if seen.insert(name.clone()) {
                hide(&top, &name)?;
            }
        }
    }
    Ok(())
}

fn hide(top: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match sys::lstatat(top, name) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let dir = sys::open_nofollow(top, name, flags, 0)?;
            sys::set_xattr(&dir, xattr::os(xattr::OPAQUE), b"y")
        }
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            sys::mknodat(top, name, FileType::CharacterDevice, 0, 0, 0)
        }
        Err(e) => Err(e),
    }
}

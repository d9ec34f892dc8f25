//! The container's own files: its root, and the volumes of its image.
//!
//! Image content is not trusted. Every path is resolved as if the root were `/`, so that neither
//! `..` nor a link leads to a file of the host (CVE-2022-23648); places for mounts are left to the
//! OCI runtime, which makes them the same way while it mounts (CVE-2021-30465, CVE-2024-5154).

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use gantry_images::Image;
use gantry_ports::snapshotter::{Ids, Owner, UserNamespace};
use gantry_spec::resolved::Volume;
use gantry_sys::fs::{self, FileType, OFlags};

use crate::pod::Asked;
use crate::registry::{ContainerFacts, PodFacts};
use crate::rundir::make_dir;
use crate::{Context, Error, failpoint};

/// VOLUMEs that an image may have: each is a copy of what it has there.
const MAX_VOLUMES: usize = 64;

/// The user namespace of a pod that has one.
pub(super) struct User {
    /// Where it is pinned.
    pub namespace: PathBuf,
    /// Owner on the host of what belongs to root inside.
    pub uid: u32,
    pub gid: u32,
    /// How many ids there are inside.
    pub uids: u32,
    pub gids: u32,
}

/// Whose the files of the container's mounts are.
pub(super) struct Owners {
    pub user: Option<User>,
    /// SELinux context of what it mounts; `None` where SELinux is off.
    pub label: Option<String>,
}

impl Owners {
    pub fn of(ctx: &Context, pod: &PodFacts, facts: &ContainerFacts) -> Result<Self, Error> {
        let labels = super::resolve::selinux(ctx, pod, &facts.config)?;
        Ok(Self {
            user: user(ctx, pod),
            label: labels.map(|labels| labels.mount),
        })
    }

    pub fn of_mount(&self) -> Owner<'_> {
        Owner {
            user_namespace: self.user.as_ref().map(|user| UserNamespace {
                path: &user.namespace,
                uids: Ids {
                    first: user.uid,
                    length: user.uids,
                },
                gids: Ids {
                    first: user.gid,
                    length: user.gids,
                },
            }),
            label: self.label.as_deref(),
        }
    }
}

fn user(ctx: &Context, pod: &PodFacts) -> Option<User> {
    let mapping = Asked::of(&pod.config).user?;
    Some(User {
        namespace: ctx.records.dirs.pins(&pod.id).join("user"),
        uid: mapping.host_uid,
        gid: mapping.host_gid,
        uids: mapping.uids,
        gids: mapping.gids,
    })
}

/// Makes the root and mounts it at the container's `rootfs`.
pub(super) fn make(
    ctx: &Context,
    facts: &ContainerFacts,
    image: &Image,
    owners: &Owners,
) -> Result<(), Error> {
    let rootfs = ctx.records.dirs.rootfs(&facts.id);
    make_dir(&rootfs).map_err(|error| Error::io("make root", &rootfs, &error))?;
    let step = Error::step("prepare root");
    let snapshotter = ctx.snapshotter(&facts.record)?;
    snapshotter
        .prepare(&facts.id, &image.layers, owners.of_mount())
        .map_err(&step)?;
    failpoint::at("root::prepared")?;
    snapshotter
        .mount(&facts.id, &image.layers, &rootfs, owners.of_mount())
        .map_err(&step)?;
    failpoint::at("root::mounted")?;
    plain_dev(&rootfs).map_err(|error| Error::io("prepare root", &rootfs.join("dev"), &error))
}

/// Puts a directory in place of a /dev that is none: through a link the runtime would make device
/// nodes, and open the console, where the image chose (CVE-2026-41579).
fn plain_dev(rootfs: &Path) -> io::Result<()> {
    let root = fs::open_root(rootfs)?;
    let dev = OsStr::new("dev");
    match fs::lstatat(&root, dev) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => return Ok(()),
        Ok(_) => fs::unlinkat(&root, dev, false)?,
    }
    fs::mkdirat(&root, dev, 0o755)?;
    let made = fs::open_nofollow(&root, dev, OFlags::PATH | OFlags::DIRECTORY, 0)?;
    // The daemon's umask hides everything.
    fs::chmod(made, 0o755)
}

/// Makes a directory for each VOLUME of the image, with what the image has there. They lie beside
/// the writable part of the root and go with it.
pub(super) fn volumes(
    ctx: &Context,
    facts: &ContainerFacts,
    image: &Image,
    user: Option<&User>,
) -> Result<Vec<Volume>, Error> {
    let places = gantry_spec::mounts::volumes(&facts.config, &image.config.volumes)
        .map_err(Error::step("make volume"))?;
    if places.is_empty() {
        return Ok(Vec::new());
    }
    if places.len() > MAX_VOLUMES {
        return Err(Error::Invalid {
            field: "image config Volumes".to_owned(),
            reason: format!("has {} places, more than {MAX_VOLUMES}", places.len()),
        });
    }
    let rootfs = ctx.records.dirs.rootfs(&facts.id);
    let dir = ctx
        .snapshotter(&facts.record)?
        .volumes(&facts.id)
        .map_err(Error::step("make volume"))?;
    let mut volumes = Vec::with_capacity(places.len());
    for (n, destination) in places.into_iter().enumerate() {
        let source = dir.join(n.to_string());
        copy_up(&rootfs, &destination, &source, user).map_err(|error| match error.kind() {
            io::ErrorKind::NotADirectory => Error::Invalid {
                field: format!("image config Volumes[{destination:?}]"),
                reason: "is not a directory of the image".to_owned(),
            },
            _ => Error::io("make volume", &destination, &error),
        })?;
        volumes.push(Volume {
            destination,
            source,
        });
    }
    Ok(volumes)
}

/// Makes `volume` a copy of the directory `place` of the root, or an empty directory of root's
/// when there is no such place.
fn copy_up(rootfs: &Path, place: &Path, volume: &Path, user: Option<&User>) -> io::Result<()> {
    std::fs::create_dir(volume)?;
    let root = fs::open_root(rootfs)?;
    let directory = OFlags::RDONLY | OFlags::DIRECTORY;
    let to = OwnedFd::from(std::fs::File::open(volume)?);
    match fs::open_in_root(&root, place, directory, 0) {
        Ok(from) => gantry_sys::tree::copy(&from, &to, is_the_images),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(user) = user {
                fs::chown(&to, user.uid, user.gid)?;
            }
            fs::chmod(&to, 0o755)
        }
        Err(error) => Err(error),
    }
}

/// What overlayfs keeps for itself and no container sees is not part of the image.
fn is_the_images(attribute: &OsStr) -> bool {
    let own: [&[u8]; 2] = [b"trusted.", b"user.overlay."];
    !own.iter()
        .any(|prefix| attribute.as_bytes().starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs as std_fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A root beside a directory that no image may reach.
    fn root() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std_fs::create_dir_all(root.join("data")).unwrap();
        std_fs::create_dir(dir.path().join("host")).unwrap();
        std_fs::write(dir.path().join("host/secret"), "").unwrap();
        (dir, root)
    }

    fn is_root(test: &str) -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            println!("SKIP {test}: changing owners needs root");
        }
        root
    }

    #[test]
    fn cve_2026_41579_a_dev_that_leads_elsewhere_becomes_a_directory() {
        let (dir, root) = root();
        let dev = root.join("dev");
        plain_dev(&root).unwrap();
        assert!(
            !dev.exists(),
            "one that is missing is the runtime's to make"
        );
        symlink(dir.path().join("host"), &dev).unwrap();
        plain_dev(&root).unwrap();
        let made = std_fs::symlink_metadata(&dev).unwrap();
        assert!(made.is_dir());
        assert_eq!(made.permissions().mode() & 0o7777, 0o755);
        assert!(dir.path().join("host/secret").exists());
        std_fs::write(dev.join("kept"), "").unwrap();
        plain_dev(&root).unwrap();
        assert!(dev.join("kept").exists());
        std_fs::remove_dir_all(&dev).unwrap();
        std_fs::write(&dev, "a file").unwrap();
        plain_dev(&root).unwrap();
        assert!(dev.is_dir());
    }

    #[test]
    fn a_volume_has_the_images_content_and_never_the_hosts() {
        if !is_root("a_volume_has_the_images_content_and_never_the_hosts") {
            return;
        }
        let (dir, root) = root();
        std_fs::write(root.join("data/file"), "image").unwrap();
        symlink("data", root.join("inside")).unwrap();
        symlink("../host", root.join("up")).unwrap();
        symlink(dir.path().join("host"), root.join("absolute")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        let copied = |n: usize, place: &str| {
            let volume = dir.path().join(n.to_string());
            copy_up(&root, Path::new(place), &volume, None).map(|()| {
                let names = std_fs::read_dir(volume).unwrap();
                names
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(copied(0, "/data").unwrap(), ["file"]);
        assert_eq!(copied(1, "/inside").unwrap(), ["file"]);
        for (n, place) in ["/up", "/absolute", "/../host", "/magic", "/missing"]
            .into_iter()
            .enumerate()
        {
            assert!(copied(n + 2, place).unwrap().is_empty(), "{place}");
        }
        let file = copied(9, "/data/file").unwrap_err();
        assert_eq!(file.kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn overlayfs_keeps_its_attributes() {
        let yes = [
            "user.mime",
            "security.capability",
            "system.posix_acl_access",
        ];
        assert!(yes.iter().all(|name| is_the_images(OsStr::new(name))));
        let no = ["trusted.overlay.origin", "trusted.x", "user.overlay.opaque"];
        assert!(!no.iter().any(|name| is_the_images(OsStr::new(name))));
    }
}

//! Where the request's mounts come from: paths of the host, and images.
//!
//! An image that is mounted into a container is shown by a read-only mount of its layers below the
//! container's run directory; the bind mount into the container is the OCI runtime's. Its layers
//! stand in the container's record, so that they stay when the image goes first.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use gantry_cri_api::v1 as cri;
use gantry_images::ImageInUse;
use gantry_spec::mounts::{Source, source};
use gantry_spec::resolved::HostMount;
use gantry_store::record;
use gantry_sys::fs::OFlags;
use gantry_types::{ContainerId, Digest, ErrorKind};

use super::root::Owners;
use crate::registry::ContainerFacts;
use crate::rundir::{make_dir, names};
use crate::{Context, Error, failpoint, mountinfo};

const STEP: &str = "resolve mount";

/// The kubelet reads the first word of the text.
fn image_error(mount: &cri::Mount, reason: impl std::fmt::Display) -> Error {
    Error::Failed {
        step: "ImageVolumeMountFailed",
        kind: ErrorKind::Unknown,
        message: format!("mounts[{}]: {reason}", mount.container_path),
    }
}

/// Looks up the images that are mounted, with the index of each mount, and holds their layers.
pub(super) fn find_images(
    ctx: &Context,
    config: &cri::ContainerConfig,
) -> Result<Vec<(usize, ImageInUse)>, Error> {
    let mut found = Vec::new();
    for (n, mount) in config.mounts.iter().enumerate() {
        let Source::Image { name, .. } = source(mount).map_err(Error::step(STEP))? else {
            continue;
        };
        let image = ctx.images.use_image(name);
        let image = image
            .map_err(|error| image_error(mount, error))?
            .ok_or_else(|| image_error(mount, format!("image {name:?} not found")))?;
        found.push((n, image));
    }
    Ok(found)
}

/// What the container's record keeps of them.
pub(super) fn image_records(images: &[(usize, ImageInUse)]) -> Vec<record::ImageMount> {
    let one = |(n, image): &(usize, ImageInUse)| record::ImageMount {
        mount: u32::try_from(*n).unwrap_or(u32::MAX),
        image_id: image.id.clone(),
        layers: image.layers.iter().map(ToString::to_string).collect(),
    };
    images.iter().map(one).collect()
}

/// The host side of the request's mounts, in their order. A missing source is made, as Docker
/// and containerd do and pods rely on.
pub(super) fn resolve(
    ctx: &Context,
    facts: &ContainerFacts,
    owners: &Owners,
) -> Result<Vec<HostMount>, Error> {
    let mut table = None;
    let mut mounts = Vec::with_capacity(facts.config.mounts.len());
    for (n, mount) in facts.config.mounts.iter().enumerate() {
        let path = match source(mount).map_err(Error::step(STEP))? {
            Source::Host(path) => host_path(ctx, mount, path)?,
            Source::Image { sub_path, .. } => {
                let view = view(ctx, facts, n, mount, owners)?;
                image_path(view, mount, sub_path)?
            }
        };
        let mut resolved = HostMount {
            source: path,
            ..HostMount::default()
        };
        if mount.propagation() != cri::MountPropagation::PropagationPrivate {
            if table.is_none() {
                table = Some(mountinfo::read()?);
            }
            let held = mountinfo::holding(table.as_deref().unwrap_or_default(), &resolved.source);
            if let Some(held) = held.cloned() {
                resolved.point = held.point;
                resolved.shared = held.shared;
                resolved.slave = held.slave;
            }
        }
        mounts.push(resolved);
    }
    Ok(mounts)
}

/// A path of the host with its links resolved; made as a directory when it is missing.
fn host_path(ctx: &Context, mount: &cri::Mount, path: &Path) -> Result<PathBuf, Error> {
    let failed = |error: &io::Error| Error::io(STEP, path, error);
    let refused = |reason: String| Error::Invalid {
        field: format!("mounts[{}].host_path", mount.container_path),
        reason,
    };
    match path.try_exists() {
        Ok(true) => {}
        Ok(false) => {
            // A directory of a pod's author among ours would be taken for one of ours.
            if ctx.owns(&nearest(path).map_err(|error| failed(&error))?) {
                let reason = format!(
                    "{} is missing and would lie in gantry's own directories",
                    path.display()
                );
                return Err(refused(reason));
            }
            crate::rundir::make_public_dir(path).map_err(|error| failed(&error))?;
        }
        Err(error) => return Err(failed(&error)),
    }
    let real = fs::canonicalize(path).map_err(|error| failed(&error))?;
    // What the container mounts there would appear over layers and records of others.
    let writes_back = mount.propagation() == cri::MountPropagation::PropagationBidirectional;
    if writes_back && ctx.owns(&real) {
        let reason = format!(
            "{} is gantry's own: mounts cannot propagate to it",
            real.display()
        );
        return Err(refused(reason));
    }
    Ok(real)
}

/// `path` with the part of it that exists resolved: where it would be made.
fn nearest(path: &Path) -> io::Result<PathBuf> {
    for above in path.ancestors() {
        match fs::canonicalize(above) {
            Ok(real) => {
                let rest = path.strip_prefix(above).unwrap_or(Path::new(""));
                return Ok(real.join(rest));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(path.to_owned())
}

/// Mounts the image for mount `n` and finds the directory in it.
fn view(
    ctx: &Context,
    facts: &ContainerFacts,
    n: usize,
    mount: &cri::Mount,
    owners: &Owners,
) -> Result<PathBuf, Error> {
    let recorded = facts.record.image_mounts.iter();
    let image = recorded
        .into_iter()
        .find(|image| usize::try_from(image.mount) == Ok(n))
        .ok_or_else(|| Error::internal(STEP, format!("mounts[{n}] has no image recorded")))?;
    let layers: Vec<Digest> = image
        .layers
        .iter()
        .map(|layer| layer.parse())
        .collect::<Result<_, _>>()
        .map_err(|error| Error::internal(STEP, error))?;
    let view = ctx.records.dirs.images(&facts.id).join(n.to_string());
    make_dir(&view).map_err(|error| Error::io(STEP, &view, &error))?;
    ctx.snapshotter(&facts.record)?
        .view(&layers, &view, owners.of_mount())
        .map_err(|error| image_error(mount, error))?;
    failpoint::at("view::mounted")?;
    Ok(view)
}

/// The part of an image's view that is mounted.
fn image_path(view: PathBuf, mount: &cri::Mount, sub_path: &Path) -> Result<PathBuf, Error> {
    if sub_path.as_os_str().is_empty() {
        return Ok(view);
    }
    // Nobody can write there, so that what is found now is what will be mounted.
    let find = || {
        let root = gantry_sys::fs::open_root(&view)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let dir = gantry_sys::fs::open_in_root(&root, sub_path, flags, 0)?;
        fs::read_link(gantry_sys::fs::proc_fd(std::os::fd::AsFd::as_fd(&dir)))
    };
    find().map_err(|error| {
        let reason = match error.kind() {
            io::ErrorKind::NotFound => "does not exist in the image".to_owned(),
            io::ErrorKind::NotADirectory => "is not a directory of the image".to_owned(),
            _ => error.to_string(),
        };
        image_error(mount, format!("image_sub_path {sub_path:?} {reason}"))
    })
}

/// Unmounts the container's root and the images that are mounted into it; not mounted is success.
/// All of them are tried, the first failure is returned.
pub(crate) fn unmount(ctx: &Context, id: &ContainerId) -> Result<(), Error> {
    let dirs = &ctx.records.dirs;
    let images = dirs.images(id);
    let views = names(&images).map_err(|error| Error::io("list mounts", &images, &error))?;
    let mut outcome = Ok(());
    for view in views
        .iter()
        .map(|name| images.join(name))
        .chain([dirs.rootfs(id)])
    {
        // A mount is anybody's to take away; what lies behind it is not.
        for snapshotter in ctx.snapshotters.iter() {
            let unmounted = snapshotter.unmount(&view);
            outcome = outcome.and(unmounted.map_err(Error::step("unmount root")));
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_would_be_made_where_the_links_lead() {
        let dir = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(real.join("target")).unwrap();
        std::os::unix::fs::symlink("target", real.join("link")).unwrap();
        let at = |below: &str| nearest(&real.join(below)).unwrap();
        assert_eq!(at("link/a/b"), real.join("target/a/b"));
        assert_eq!(at("target"), real.join("target"));
        fs::write(real.join("file"), "").unwrap();
        assert!(nearest(&real.join("file/x")).is_err());
    }
}

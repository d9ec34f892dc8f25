//! What a container sees mounted.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use gantry_cri_api::v1::{ContainerConfig, IdMapping, Mount as Asked, MountPropagation};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Mount};

use crate::Error;
use crate::container::{Draft, Input};
use crate::path;
use crate::resolved::{HostMount, Namespace};

/// What a mount of the request shows, once its fields are known to fit each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// An absolute path of the host.
    Host(&'a Path),
    /// An image, and the path within it whose directory is shown; empty for all of it.
    Image { name: &'a str, sub_path: &'a Path },
}

/// # Errors
/// InvalidArgument for a mount with neither host path nor image or with both, a relative host
/// path, and an image that is asked for other than read-only.
pub fn source(asked: &Asked) -> Result<Source<'_>, Error> {
    let field = |name: &str| format!("mounts[{}].{name}", asked.container_path);
    let Some(image) = &asked.image else {
        if !asked.image_sub_path.is_empty() {
            return Err(Error::invalid(field("image_sub_path"), "is without image"));
        }
        let path = Path::new(&asked.host_path);
        if !path.is_absolute() || asked.host_path.contains('\0') {
            let reason = format!("{:?} is not an absolute path", asked.host_path);
            return Err(Error::invalid(field("host_path"), reason));
        }
        return Ok(Source::Host(path));
    };
    if image.image.is_empty() {
        return Err(Error::invalid(field("image"), "names no image"));
    }
    if !asked.host_path.is_empty() {
        return Err(Error::invalid(field("host_path"), "goes not with image"));
    }
    if !asked.readonly {
        return Err(Error::invalid(
            field("readonly"),
            "an image volume is read-only",
        ));
    }
    if asked.image_sub_path.contains('\0') {
        return Err(Error::invalid(field("image_sub_path"), "has a NUL byte"));
    }
    Ok(Source::Image {
        name: &image.image,
        sub_path: Path::new(&asked.image_sub_path),
    })
}

/// The places of an image's VOLUMEs that need a directory of their own: cleaned, each once, less
/// those where the request mounts something. Images also write relative ones, meant from the root.
///
/// # Errors
/// InvalidArgument for the root itself and for what is no path.
pub fn volumes(config: &ContainerConfig, image: &[String]) -> Result<BTreeSet<PathBuf>, Error> {
    let asked = config.mounts.iter();
    let covered: HashSet<PathBuf> = asked
        .filter_map(|mount| path::clean(Path::new(&mount.container_path)))
        .collect();
    let mut places = BTreeSet::new();
    for volume in image {
        let field = || format!("image config Volumes[{volume:?}]");
        let place = place(&field(), &Path::new("/").join(volume))?;
        if !covered.contains(&place) {
            places.insert(place);
        }
    }
    Ok(places)
}

/// Step: the file systems that every container has (runtime-spec config-linux.md, Default
/// Filesystems). They are mounted in this order, each below one before it.
pub(crate) fn defaults(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let access = if input.privileged() { "rw" } else { "ro" };
    let namespaces = &input.resolved.namespaces;
    draft.mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            // Group 5 is tty in every distribution.
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        if namespaces.user != Namespace::Host && namespaces.network == Namespace::Host {
            // sysfs shows the network namespace, which this user namespace does not own: a fresh
            // mount is forbidden.
            mount(
                "/sys",
                "bind",
                "/sys",
                &["rbind", "nosuid", "noexec", "nodev", access],
            )
        } else {
            mount(
                "/sys",
                "sysfs",
                "sysfs",
                &["nosuid", "noexec", "nodev", access],
            )
        },
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ];
    if input.resolved.files.shm.is_none() {
        let options = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"];
        draft
            .mounts
            .push(mount("/dev/shm", "tmpfs", "shm", &options));
    }
    Ok(())
}

/// Step: files of the pod, volumes of the image and mounts of the request, shallow ones first so
/// that none hides another; those of equal depth in the request's order. Of two at one place the
/// later covers the earlier, and the request's covers all.
pub(crate) fn requested(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let asked = asked_mounts(input, draft)?;
    let taken: HashSet<PathBuf> = asked.iter().map(|it| it.destination().clone()).collect();

    // A default gives way to a request for its place, and all below /dev to one for /dev.
    let all_of_dev = taken.contains(Path::new("/dev"));
    draft.mounts.retain(|default| {
        let place = default.destination();
        !(taken.contains(place) || all_of_dev && place.starts_with("/dev"))
    });

    let mut list: Vec<Mount> = image_volumes(input)
        .chain(pod_files(input))
        .filter(|offered| !taken.contains(offered.destination()))
        .collect();
    list.extend(asked);
    list.sort_by_key(|mount| mount.destination().components().count());
    draft.mounts.extend(list);
    Ok(())
}

/// /etc/hosts and its like, read-only where the root is: they are part of it to the eye.
fn pod_files(input: &Input<'_>) -> Vec<Mount> {
    let files = &input.resolved.files;
    let access = if input.security.readonly_rootfs {
        "ro"
    } else {
        "rw"
    };
    let file = |place: &str, source: &Option<PathBuf>, access: &str| {
        source
            .as_ref()
            .map(|source| bind(place.into(), source, &["rbind", "rprivate", access]))
    };
    [
        file("/etc/hosts", &files.hosts, access),
        file("/etc/hostname", &files.hostname, access),
        file("/etc/resolv.conf", &files.resolv_conf, access),
        file("/dev/shm", &files.shm, "rw"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Writable where the root is not, too: that is what a VOLUME is for.
fn image_volumes<'a>(input: &'a Input<'_>) -> impl Iterator<Item = Mount> + 'a {
    let volumes = input.resolved.volumes.iter();
    volumes.map(|volume| {
        let options = ["rbind", "rprivate", "rw"];
        bind(volume.destination.clone(), &volume.source, &options)
    })
}

fn asked_mounts(input: &Input<'_>, draft: &mut Draft) -> Result<Vec<Mount>, Error> {
    let (asked, hosts) = (&input.config.mounts, &input.resolved.mounts);
    if asked.len() != hosts.len() {
        return Err(Error::Internal {
            field: "resolved.mounts".into(),
            reason: format!("{} sources for {} mounts", hosts.len(), asked.len()),
        });
    }
    let pairs = asked.iter().zip(hosts);
    pairs
        .map(|(asked, host)| asked_mount(input, draft, asked, host))
        .collect()
}

fn asked_mount(
    input: &Input<'_>,
    draft: &mut Draft,
    asked: &Asked,
    host: &HostMount,
) -> Result<Mount, Error> {
    let field = format!("mounts[{}]", asked.container_path);
    let place = place(&field, Path::new(&asked.container_path))?;
    let of_host = matches!(source(asked)?, Source::Host(_));
    let propagation = propagation(&field, draft, asked, host)?;
    let access = access(&field, input, asked)?;
    let mut mount = bind(place, &host.source, &["rbind", propagation, access]);
    if asked.uid_mappings.is_empty() != asked.gid_mappings.is_empty() {
        return Err(Error::invalid(
            field,
            "uidMappings and gidMappings go together",
        ));
    }
    // An image's layers are mapped already, below the overlay that shows them: overlayfs itself
    // cannot be.
    if !asked.uid_mappings.is_empty() && of_host {
        mount.set_uid_mappings(Some(id_mappings(&field, &asked.uid_mappings)?));
        mount.set_gid_mappings(Some(id_mappings(&field, &asked.gid_mappings)?));
    }
    Ok(mount)
}

/// The option for propagation; also opens the root's, which bounds that of every mount below.
fn propagation(
    field: &str,
    draft: &mut Draft,
    asked: &Asked,
    host: &HostMount,
) -> Result<&'static str, Error> {
    let wanted = MountPropagation::try_from(asked.propagation)
        .map_err(|unknown| Error::invalid(field, unknown.to_string()))?;
    let not = |what: &str| {
        let (source, point) = (host.source.display(), host.point.display());
        Error::precondition(
            field,
            format!("{source} is on the mount at {point}, which is {what}"),
        )
    };
    match wanted {
        MountPropagation::PropagationPrivate => Ok("rprivate"),
        MountPropagation::PropagationHostToContainer => {
            if !host.shared && !host.slave {
                return Err(not("neither shared nor a slave"));
            }
            // Shared already passes on what a slave would.
            if draft.linux.rootfs_propagation().is_none() {
                draft.linux.set_rootfs_propagation(Some("rslave".into()));
            }
            Ok("rslave")
        }
        MountPropagation::PropagationBidirectional => {
            if !host.shared {
                return Err(not("not shared"));
            }
            draft.linux.set_rootfs_propagation(Some("rshared".into()));
            Ok("rshared")
        }
    }
}

fn access(field: &str, input: &Input<'_>, asked: &Asked) -> Result<&'static str, Error> {
    if !asked.recursive_read_only {
        return Ok(if asked.readonly { "ro" } else { "rw" });
    }
    if !asked.readonly || asked.propagation() != MountPropagation::PropagationPrivate {
        return Err(Error::invalid(
            field,
            "recursive_read_only needs readonly and private propagation",
        ));
    }
    if !input.resolved.recursive_read_only {
        return Err(Error::RroUnsupported {
            field: field.into(),
            reason: "the runtime handler cannot make recursive read-only mounts".into(),
        });
    }
    Ok("rro")
}

/// A place for a mount: absolute, and not the root itself.
fn place(field: &str, path: &Path) -> Result<PathBuf, Error> {
    path::clean(path)
        .filter(|place| place.parent().is_some())
        .ok_or_else(|| Error::invalid(field, "is not an absolute path below the root"))
}

fn id_mappings(field: &str, mappings: &[IdMapping]) -> Result<Vec<LinuxIdMapping>, Error> {
    let convert = |mapping: &IdMapping| {
        LinuxIdMappingBuilder::default()
            .host_id(mapping.host_id)
            .container_id(mapping.container_id)
            .size(mapping.length)
            .build()
            .map_err(|error| Error::invalid(field, error.to_string()))
    };
    mappings.iter().map(convert).collect()
}

pub(crate) fn bind(place: PathBuf, source: &Path, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(place)
        .set_typ(Some("bind".into()))
        .set_source(Some(source.to_path_buf()))
        .set_options(Some(
            options.iter().map(|option| (*option).to_owned()).collect(),
        ));
    mount
}

fn mount(place: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = bind(place.into(), Path::new(source), options);
    mount.set_typ(Some(kind.into()));
    mount
}

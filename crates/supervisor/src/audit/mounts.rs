//! Mounts in our directories, views of images, and pinned network namespaces.

use std::fs;
use std::path::{Component, Path, PathBuf};

use gantry_types::ContainerId;

use super::{Claim, Found, Place};
use crate::{Context, Error, mountinfo};

pub(super) fn list(ctx: &Context) -> Result<Vec<Found>, Error> {
    let settings = &ctx.settings;
    let netns_dir = &settings.netns_dir;
    let mut all = Vec::new();
    let pinned = ctx.records.dirs.pinned_netns();
    for id in pinned.map_err(|error| Error::io("list network namespaces", netns_dir, &error))? {
        let path = ctx.records.dirs.netns(&id);
        all.push(Found::new(
            Place::Netns(id.clone()),
            path.display(),
            Claim::Pod(id),
        ));
    }
    for mount in ctx.image_mounts.all() {
        let owner = format!("image {}", mount.image_id);
        let place = Place::Mount(mount.target.clone());
        all.push(Found::new(place, mount.target.display(), Claim::Of(owner)));
    }
    let (state, netns_dir) = (real(&settings.state), real(netns_dir));
    let snapshots: Vec<_> = ctx
        .snapshotters
        .iter()
        .map(|each| real(each.containers()))
        .collect();
    let layers = ctx.snapshotters.iter().map(|each| real(each.root()));
    let mut dirs = vec![real(&settings.root), real(&settings.image_root)];
    dirs.extend(layers.chain(snapshots.iter().cloned()));
    for mount in mountinfo::read()? {
        let point = mount.point;
        // Those of pods are above.
        if point.parent() == Some(&netns_dir) {
            continue;
        }
        let claim = match point.strip_prefix(&state) {
            Ok(below) => of_state(below),
            Err(_) => {
                let mut below = snapshots.iter().map(|dir| point.strip_prefix(dir));
                below.find_map(Result::ok).and_then(of_snapshot)
            }
        };
        let found = Found::new(Place::Mount(point.clone()), point.display(), Claim::Nobody);
        if let Some(claim) = claim {
            all.push(Found { claim, ..found });
        } else if dirs.iter().chain([&state]).any(|dir| is_below(&point, dir)) {
            all.push(Found::of_host(found.place, found.name));
        }
    }
    Ok(all)
}

/// The mount table knows no links.
pub(super) fn real(dir: &Path) -> PathBuf {
    fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned())
}

fn is_below(path: &Path, dir: &Path) -> bool {
    path != dir && path.starts_with(dir)
}

/// Whose a path below the state directory is (src/rundir.rs).
pub(super) fn of_state(below: &Path) -> Option<Claim> {
    let names: Option<Vec<&str>> = below.components().map(name).collect();
    match names?.as_slice() {
        ["pods", id, ..] => id.parse().ok().map(Claim::Pod),
        ["containers", id, ..] | ["runtime", _, id, ..] => id.parse().ok().map(Claim::Container),
        _ => None,
    }
}

/// Whose a path in a snapshotter's directory is: everything of a container's is below its id.
fn of_snapshot(below: &Path) -> Option<Claim> {
    let mut ids = below
        .components()
        .filter_map(name)
        .map(str::parse::<ContainerId>);
    ids.find_map(Result::ok).map(Claim::Container)
}

fn name(component: Component<'_>) -> Option<&str> {
    component.as_os_str().to_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_path_is_in_it() {
        let id = "0a".repeat(32);
        let owner = |path: &str| format!("{:?}", of_state(Path::new(path)));
        assert!(owner(&format!("pods/{id}/shm")).contains("Pod(PodId"));
        assert!(owner(&format!("containers/{id}/rootfs/a")).contains("Container(ContainerId"));
        assert!(owner(&format!("runtime/runc/{id}/runc")).contains("Container(ContainerId"));
        for other in [
            "",
            "pods",
            "pods/x/shm",
            &format!("x/{id}"),
            &format!("runtime/{id}"),
        ] {
            assert_eq!(owner(other), "None", "{other}");
        }
        assert!(of_snapshot(Path::new(&format!("snapshots/{id}/fs"))).is_some());
        assert!(of_snapshot(Path::new("layers/x")).is_none());
    }
}

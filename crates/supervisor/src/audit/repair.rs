//! Removes what belongs to nobody; what keeps other things busy goes first.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_ports::network::Attachment;
use gantry_types::{ContainerId, PodId, ProcessRef};

use super::Place;
use super::cgroups::dirs;
use crate::cgroup::OwnCgroup;
use crate::pod::{
    blocking, delete_from_runtime, end_cgroup, end_shim, is_netns, kill, remove_state, unmount,
    unpin, wait_gone,
};
use crate::recover::orphan_facts;
use crate::rundir::remove_dir;
use crate::{Context, Error, mountinfo};

/// Mounts over each other at one place.
const STACKED: usize = 64;

/// Returns why things stay, in people's words. One failure stops nothing.
pub(super) async fn remove(ctx: &Arc<Context>, orphans: &[Place]) -> HashMap<Place, String> {
    let mut orphans: Vec<&Place> = orphans.iter().collect();
    orphans.sort_by_key(|place| rank(place));
    let mut networks = HashMap::new();
    let mut failures = HashMap::new();
    for place in orphans {
        // Told one by one: whatever becomes of the rest, this has happened.
        match one(ctx, place, &mut networks).await {
            Ok(()) => tracing::info!(?place, "removed: it belonged to nobody"),
            Err(error) => {
                tracing::error!(?place, %error, "belongs to nobody and stays");
                failures.insert(place.clone(), error.to_string());
            }
        }
    }
    failures
}

/// When its turn is. Of mounts the outer ones come first: those in them go along, and no name in
/// somebody's file system is looked up.
fn rank(place: &Place) -> (u8, usize) {
    match place {
        Place::Process(_) => (0, 0),
        Place::Runtime(..) => (1, 0),
        Place::Mount(point) => (2, point.components().count()),
        Place::Attachment(..) => (3, 0),
        Place::Netns(_) => (4, 0),
        Place::Cgroup(_) => (5, 0),
        Place::PodDir(_) | Place::ContainerDir(_) | Place::Directory(_) => (6, 0),
        Place::Snapshot(..) => (7, 0),
        Place::Store(_) => (8, 0),
    }
}

async fn one(
    ctx: &Arc<Context>,
    place: &Place,
    networks: &mut HashMap<PodId, Result<(), Error>>,
) -> Result<(), Error> {
    match place.clone() {
        Place::Process(process) => end(ctx, process).await,
        Place::Runtime(handler, id) => delete_state(ctx, &handler, &id).await,
        Place::Mount(point) => blocking(move || detach(&point)).await,
        Place::Attachment(pod, _) => release(ctx, &pod, networks).await,
        Place::Netns(pod) => {
            // A plugin that fails is to find the namespace when it is asked again; where there is
            // no network no plugin can have been asked.
            if ctx.network.intent().is_ok() {
                release(ctx, &pod, networks).await?;
            }
            let path = ctx.records.dirs.netns(&pod);
            blocking(move || unpin(&path)).await
        }
        Place::Cgroup(path) => delete_cgroup(ctx, path).await,
        Place::PodDir(id) => {
            let path = ctx.records.dirs.pod(&id);
            if !is_link(&path) {
                // One that answers at the socket in there.
                let facts = Arc::new(orphan_facts(ctx, &id));
                end_shim(ctx, &facts, None, None, None).await?;
            }
            blocking(move || delete(&path)).await
        }
        Place::ContainerDir(id) => {
            let path = ctx.records.dirs.container(&id);
            blocking(move || delete(&path)).await
        }
        Place::Snapshot(name, id) => {
            let snapshotters = ctx.snapshotters.clone();
            blocking(move || {
                let removed = snapshotters.named(&name).map(|each| each.remove(&id));
                removed
                    .unwrap_or(Ok(()))
                    .map_err(Error::step("remove snapshot"))
            })
            .await
        }
        Place::Store(path) => blocking(move || delete(&path)).await,
        // The host's: never without an owner.
        Place::Directory(_) => Ok(()),
    }
}

/// Kills exactly this process, which may have ended by itself.
async fn end(ctx: &Context, process: ProcessRef) -> Result<(), Error> {
    kill(process).map_err(|error| Error::internal("kill process", error))?;
    let limit = ctx.settings.timeouts.kill;
    match wait_gone(process, limit).await {
        true => Ok(()),
        false => Err(Error::Deadline {
            what: format!("end of process {}", process.pid),
            seconds: limit.as_secs(),
        }),
    }
}

/// Has the OCI runtime forget a container and end what is left of it.
async fn delete_state(ctx: &Arc<Context>, handler: &str, id: &ContainerId) -> Result<(), Error> {
    let state = ctx
        .settings
        .state
        .join("runtime")
        .join(handler)
        .join(id.as_str());
    if !is_link(&state) {
        if !ctx.settings.handlers.contains_key(handler) {
            return Err(Error::State {
                what: "runtime handler",
                id: handler.to_owned(),
                reason: "is not configured, and only it knows what is left of it".to_owned(),
            });
        }
        delete_from_runtime(ctx, handler, id).await?;
    }
    blocking(move || match is_link(&state) {
        true => delete(&state),
        false => remove_state(&state),
    })
    .await
}

/// Unmounts all that is mounted at one of our places.
fn detach(point: &Path) -> Result<(), Error> {
    for _ in 0..STACKED {
        if !mountinfo::read()?.iter().any(|mount| mount.point == point) {
            return Ok(());
        }
        // The mount table has no links in its paths. One that is there now leads elsewhere.
        let parent = point.parent().unwrap_or(point);
        let real = fs::canonicalize(parent).map_err(|error| Error::io("unmount", point, &error))?;
        if real != parent {
            return Err(Error::io(
                "unmount",
                point,
                &io::ErrorKind::InvalidInput.into(),
            ));
        }
        unmount(point)?;
    }
    Err(Error::io(
        "unmount",
        point,
        &io::ErrorKind::ResourceBusy.into(),
    ))
}

/// Has the plugins give back what they have of a pod, once; under the present configuration, since
/// that of the pod is not known.
async fn release(
    ctx: &Context,
    pod: &PodId,
    networks: &mut HashMap<PodId, Result<(), Error>>,
) -> Result<(), Error> {
    if let Some(outcome) = networks.get(pod) {
        return outcome.clone();
    }
    let netns = ctx.records.dirs.netns(pod);
    // Through a link a plugin would work on somebody else's.
    let pinned = !is_link(&netns) && is_netns(&netns);
    let attachment = Attachment {
        pod: pod.clone(),
        name: String::new(),
        namespace: String::new(),
        uid: String::new(),
        netns: pinned.then_some(netns),
        port_mappings: Vec::new(),
        dns: None,
        annotations: std::collections::BTreeMap::new(),
        cgroup_parent: String::new(),
    };
    let released = async {
        let intent = ctx.network.intent()?;
        ctx.network.detach(&attachment, &intent).await
    };
    let outcome = released.await.map_err(Error::step("tear down network"));
    networks.insert(pod.clone(), outcome.clone());
    outcome
}

/// Kills what has come since to a cgroup, and removes it in each hierarchy.
async fn delete_cgroup(ctx: &Context, path: PathBuf) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if let (Some(scopes), Some(OwnCgroup::Object(_) | OwnCgroup::Shim(_))) =
        (&ctx.scopes, ctx.settings.cgroups.own(&name))
    {
        // Else systemd would keep the name.
        scopes
            .stop(&name)
            .await
            .map_err(Error::step("stop scope"))?;
    }
    let limit = ctx.settings.timeouts.kill;
    let dirs = dirs(&ctx.settings.cgroups.mounts, &path);
    blocking(move || dirs.iter().try_for_each(|dir| end_cgroup(dir, limit))).await
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink())
}

/// Deletes a directory of ours, or what has its name. Nothing below may be a mount: one of the same
/// file system is seen in the mount table alone.
fn delete(path: &Path) -> Result<(), Error> {
    let failed = |error: io::Error| Error::io("remove", path, &error);
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(failed)?,
    };
    if !metadata.is_dir() {
        return fs::remove_file(path).map_err(failed);
    }
    let real = fs::canonicalize(path).map_err(failed)?;
    let mounts = mountinfo::read()?;
    if let Some(mount) = mounts.iter().find(|mount| mount.point.starts_with(&real)) {
        let message = format!("{} is mounted", mount.point.display());
        return Err(failed(io::Error::new(io::ErrorKind::ResourceBusy, message)));
    }
    remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_busy_by_another_goes_after_it() {
        let (pod, id) = (
            PodId::from_random([1; 32]),
            ContainerId::from_random([2; 32]),
        );
        let process = ProcessRef {
            pid: 7,
            start_time: 7,
        };
        let order = [
            Place::Process(process),
            Place::Runtime("runc".into(), id.clone()),
            Place::Mount("/run/gantry/containers/x/rootfs".into()),
            Place::Mount("/run/gantry/containers/x/rootfs/in/it".into()),
            Place::Attachment(pod.clone(), "10.0.0.1".into()),
            Place::Netns(pod.clone()),
            Place::Cgroup("gantry/x".into()),
            Place::PodDir(pod),
            Place::Snapshot("overlayfs".into(), id),
            Place::Store("/var/lib/gantry/store.damaged-1".into()),
        ];
        assert!(order.is_sorted_by(|a, b| rank(a) < rank(b)));
    }

    #[test]
    fn a_link_is_removed_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (outside, link) = (dir.path().join("outside"), dir.path().join("link"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        delete(&link).unwrap();
        assert!(!is_link(&link) && outside.join("file").exists());
        delete(&link).unwrap();
        delete(&outside).unwrap();
        assert!(!outside.exists());
    }
}

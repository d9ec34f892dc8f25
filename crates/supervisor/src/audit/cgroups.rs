//! Cgroups, and the processes in them.
//!
//! Below the parents of our own configuration all that have names of ours are found. A parent that a
//! request named may be another runtime's too, so there only those are that a record names. With the
//! cgroupfs driver nothing but an id tells ours, and what is deeper was named by a request.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gantry_sys::process::{own_process, process_ref};

use super::{Claim, Found, Place};
use crate::cgroup::{Cgroups, Driver, HierarchyMount, OwnCgroup};
use crate::pod::{FOREIGN, cgroup_pids};
use crate::{Context, Error};

/// How deep slices may be nested in each other.
const DEPTH: usize = 8;

pub(super) fn list(ctx: &Context) -> Result<Vec<Found>, Error> {
    let cgroups = &ctx.settings.cgroups;
    let hierarchies = &cgroups.mounts;
    let [parent, shims] = cgroups.own_parents()?;
    let depth = match cgroups.driver {
        Driver::Cgroupfs => 0,
        Driver::Systemd => DEPTH,
    };
    let mut groups = BTreeMap::new();
    for hierarchy in hierarchies {
        for top in [&parent, &shims] {
            walk(cgroups, &hierarchy.dir, top, &shims, depth, &mut groups)?;
        }
    }
    recorded(ctx, hierarchies, &mut groups);

    let daemon = own_process().map_err(|error| Error::internal("find own process", error))?;
    let claim = Claim::Of("gantryd".to_owned());
    let mut all = vec![Found::new(Place::Process(daemon), daemon.pid, claim)];
    for (path, claim) in groups {
        let dirs = dirs(hierarchies, &path);
        let pids = pids(&dirs)?;
        let claim = match pids.contains(&FOREIGN) {
            true => Claim::Of("another pid namespace".to_owned()),
            false => claim,
        };
        for pid in pids {
            // Ended since.
            let Ok(process) = process_ref(pid) else {
                continue;
            };
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let name = format!("{pid} {}", command.trim_end());
            all.push(Found::new(Place::Process(process), name, claim.clone()));
        }
        if !dirs.is_empty() {
            let name = Path::new("/").join(&path);
            all.push(Found::new(Place::Cgroup(path), name.display(), claim));
        }
    }
    Ok(all)
}

/// The directories of a cgroup, in the hierarchies that have it.
pub(super) fn dirs(hierarchies: &[HierarchyMount], path: &Path) -> Vec<PathBuf> {
    let dirs = hierarchies.iter().map(|mount| mount.dir.join(path));
    dirs.filter(|dir| dir.is_dir()).collect()
}

fn pids(dirs: &[PathBuf]) -> Result<Vec<i32>, Error> {
    let mut pids = Vec::new();
    for dir in dirs {
        pids.extend(cgroup_pids(dir)?);
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

/// Finds cgroups with names of ours at and below `path`; what is below these is theirs.
fn walk(
    cgroups: &Cgroups,
    hierarchy: &Path,
    path: &Path,
    shims: &Path,
    depth: usize,
    groups: &mut BTreeMap<PathBuf, Claim>,
) -> Result<(), Error> {
    let dir = hierarchy.join(path);
    let names = match crate::rundir::names(&dir) {
        // Removed while it was read.
        Err(_) if !dir.is_dir() => return Ok(()),
        names => names.map_err(|error| Error::io("list cgroups", &dir, &error))?,
    };
    for name in names {
        let path = path.join(&name);
        if !hierarchy.join(&path).is_dir() {
            continue;
        }
        match cgroups.own(&name) {
            // Half an id means nothing elsewhere.
            Some(OwnCgroup::Shim(half)) if path.parent() == Some(shims) => {
                groups.insert(path, Claim::Shim(half));
            }
            Some(OwnCgroup::Object(id)) => {
                groups.insert(path, Claim::Either(id));
            }
            Some(OwnCgroup::Shim(_)) | None if depth > 0 => {
                walk(cgroups, hierarchy, &path, shims, depth - 1, groups)?;
            }
            Some(OwnCgroup::Shim(_)) | None => {}
        }
    }
    Ok(())
}

/// Adds those that records name, wherever they are.
fn recorded(ctx: &Context, hierarchies: &[HierarchyMount], groups: &mut BTreeMap<PathBuf, Claim>) {
    let mut add = |dir: &str, claim: Claim| {
        let mut below = hierarchies
            .iter()
            .map(|top| Path::new(dir).strip_prefix(&top.dir));
        if let Some(Ok(path)) = below.find(Result::is_ok) {
            groups.entry(path.to_owned()).or_insert(claim);
        }
    };
    for pod in ctx.registry.pods() {
        let record = &pod.facts.record;
        for dir in record.cgroup_dirs.iter().chain(&record.shim_cgroup_dirs) {
            add(dir, Claim::Pod(pod.facts.id.clone()));
        }
        for container in &pod.containers {
            let claim = Claim::Container(container.facts.id.clone());
            add(&container.facts.record.cgroup_dir, claim);
        }
    }
}

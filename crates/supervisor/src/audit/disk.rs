//! Directories: of pods and containers, of OCI runtimes, snapshots, and records that were set aside.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::{Claim, Found, Place};
use crate::rundir::names;
use crate::{Context, Error};

pub(super) fn list(ctx: &Context) -> Result<Vec<Found>, Error> {
    let dirs = &ctx.records.dirs;
    let mut all = in_dir(&dirs.pods(), |name| {
        let id = name.parse::<gantry_types::PodId>().ok()?;
        Some((Place::PodDir(id.clone()), Claim::Pod(id)))
    })?;
    all.extend(in_dir(&dirs.containers(), |name| {
        let id = name.parse::<gantry_types::ContainerId>().ok()?;
        Some((Place::ContainerDir(id.clone()), Claim::Container(id)))
    })?);
    let runtimes = ctx.settings.state.join("runtime");
    for handler in listed(&runtimes)? {
        let states = in_dir(&runtimes.join(&handler), |name| {
            let id = name.parse::<gantry_types::ContainerId>().ok()?;
            let place = Place::Runtime(handler.clone(), id.clone());
            Some((place, Claim::Container(id)))
        })?;
        // Runtimes have directories of their own there too.
        all.extend(
            states
                .into_iter()
                .filter(|found| !matches!(found.place, Place::Directory(_))),
        );
    }
    for snapshotter in ctx.snapshotters.iter() {
        let ids = snapshotter
            .snapshots()
            .map_err(Error::step("list snapshots"))?;
        all.extend(ids.into_iter().map(|id| {
            let place = Place::Snapshot(snapshotter.name().to_owned(), id.clone());
            let name = format!("{} {id}", snapshotter.name());
            Found::new(place, name, Claim::Container(id))
        }));
    }
    all.extend(stores(ctx)?);
    Ok(all)
}

fn listed(dir: &Path) -> Result<Vec<String>, Error> {
    names(dir).map_err(|error| Error::io("list", dir, &error))
}

fn in_dir(dir: &Path, ours: impl Fn(&str) -> Option<(Place, Claim)>) -> Result<Vec<Found>, Error> {
    let found = |name: String| {
        let path = dir.join(&name);
        match ours(&name) {
            Some((place, claim)) => Found::new(place, path.display(), claim),
            None => Found::of_host(Place::Directory(path.clone()), path.display()),
        }
    };
    Ok(listed(dir)?.into_iter().map(found).collect())
}

/// Stores that were set aside (crates/store). The last is for whoever wants to know why. Those
/// before it are nobody's, if all records could be read since: then all is there that there is.
fn stores(ctx: &Context) -> Result<Vec<Found>, Error> {
    let root = &ctx.settings.root;
    let all = listed(root)?
        .into_iter()
        .filter(|name| name.starts_with(SET_ASIDE));
    // The rename is the last that was done to it.
    let changed = |path: &Path| {
        let metadata = fs::symlink_metadata(path).ok()?;
        Some((metadata.ctime(), metadata.ctime_nsec()))
    };
    let mut all: Vec<_> = all
        .map(|name| root.join(name))
        .filter_map(|path| Some((changed(&path)?, path)))
        .collect();
    all.sort();
    let unreadable = ctx.unreadable.load(Ordering::Acquire);
    let last = all.len().saturating_sub(1);
    let found = all.into_iter().enumerate().map(|(n, (_, path))| {
        let claim = match n == last || unreadable {
            true => Claim::Of("whoever looks into it".to_owned()),
            false => Claim::Nobody,
        };
        let remark = "records that would not open, set aside at a start".to_owned();
        let found = Found::new(Place::Store(path.clone()), path.display(), claim);
        Found { remark, ..found }
    });
    Ok(found.collect())
}

/// How the names of such directories begin.
const SET_ASIDE: &str = "store.damaged-";

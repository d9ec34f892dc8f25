//! Who there is: whether anybody knows an id, and by what name people know its object.

use std::path::{Path, PathBuf};

use gantry_store::{Record, record};
use gantry_types::{ContainerId, PodId};

use crate::registry::{ContainerView, PodView};
use crate::rundir::{self, RunDirs, RunRecord, names};
use crate::{Context, Error, neighbours};

/// Everybody who may own a thing: this daemon's objects, and those of others on this machine.
pub(crate) struct Known<'a> {
    ctx: &'a Context,
    neighbours: Vec<RunDirs>,
}

/// Of a thing's owner, where the record that would say more cannot be read.
const UNREADABLE: &str = "a record that cannot be read";

impl<'a> Known<'a> {
    /// # Errors
    /// Who else is on this machine cannot be told.
    pub fn new(ctx: &'a Context) -> Result<Self, Error> {
        let own = &ctx.settings.state;
        let states = neighbours::states(own);
        let states = states.map_err(|error| Error::io("find other gantryds", own, &error))?;
        let nowhere = Path::new("");
        Ok(Self {
            ctx,
            neighbours: states
                .iter()
                .map(|state| RunDirs::new(state, nowhere))
                .collect(),
        })
    }

    /// A pod, of whoever's.
    pub fn pod(&self, id: &PodId) -> Option<String> {
        let registry = &self.ctx.registry;
        if let Ok(view) = registry.pod(id.as_str()) {
            return Some(pod_name(&view));
        }
        if registry.has_pod(id) {
            return Some(format!("pod {}, being made", id.short()));
        }
        let dir = self.ctx.records.dirs.pod(id);
        self.recorded::<record::PodConfig, record::PodStatus>(id.as_str(), &dir)
            .or_else(|| self.neighbours_with(|dirs| dirs.pod(id)))
    }

    /// A container, of whoever's.
    pub fn container(&self, id: &ContainerId) -> Option<String> {
        let registry = &self.ctx.registry;
        if let Ok((pod, view)) = registry.container(id.as_str()) {
            return Some(container_name(&pod, &view));
        }
        if registry.has_container(id) {
            return Some(format!("container {}, being made", id.short()));
        }
        let dir = self.ctx.records.dirs.container(id);
        self.recorded::<record::ContainerConfig, record::ContainerStatus>(id.as_str(), &dir)
            .or_else(|| self.neighbours_with(|dirs| dirs.container(id)))
    }

    /// The pod whose id begins so: shims' cgroups are named by half of it.
    pub fn pod_beginning(&self, half: &str) -> Option<String> {
        // A directory that cannot be read may have it.
        let untold = std::cell::Cell::new(false);
        let own = self.ctx.registry.pod_beginning(half);
        let owner = own.and_then(|id| self.pod(&id)).or_else(|| {
            let states = [&self.ctx.records.dirs].into_iter().chain(&self.neighbours);
            let names = states.flat_map(|dirs| {
                let listed = names(&dirs.pods());
                listed.inspect_err(|_| untold.set(true)).unwrap_or_default()
            });
            let mut ids = names.filter(|name| name.starts_with(half));
            ids.find_map(|id| self.pod(&id.parse().ok()?))
        });
        let unreadable = &self.ctx.unreadable;
        let unknown = || unreadable.load(std::sync::atomic::Ordering::Acquire);
        owner.or_else(|| (untold.get() || unknown()).then(|| UNREADABLE.to_owned()))
    }

    /// A record of ours of which there is no object: it cannot be read, or a start is to take it
    /// up from the run directory.
    fn recorded<C: Record + RunRecord, S: Record + RunRecord>(
        &self,
        id: &str,
        dir: &Path,
    ) -> Option<String> {
        let store = &self.ctx.records.store;
        let stored = !matches!(store.get::<C>(id), Ok(None));
        (stored || rundir::recoverable::<C, S>(dir)).then(|| UNREADABLE.to_owned())
    }

    fn neighbours_with(&self, dir: impl Fn(&RunDirs) -> PathBuf) -> Option<String> {
        let mut neighbours = self.neighbours.iter();
        let absent = |path: PathBuf| match path.symlink_metadata() {
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
            Ok(_) => false,
        };
        let found = neighbours.find(|dirs| !absent(dir(dirs)))?;
        Some(format!("the gantryd at {}", found.state().display()))
    }
}

fn pod_name(pod: &PodView) -> String {
    let metadata = pod.facts.config.metadata.clone().unwrap_or_default();
    let short = pod.facts.id.short();
    format!("pod {short} {}/{}", metadata.namespace, metadata.name)
}

fn container_name(pod: &PodView, container: &ContainerView) -> String {
    let of = pod.facts.config.metadata.clone().unwrap_or_default();
    let metadata = container.facts.config.metadata.clone().unwrap_or_default();
    let short = container.facts.id.short();
    format!(
        "container {short} {}/{}/{}",
        of.namespace, of.name, metadata.name
    )
}

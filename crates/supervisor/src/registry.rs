//! What readers see: immutable views that the drivers publish. Status and List answer from here
//! and never wait for a driver, a shim or a disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use gantry_cri_api::v1 as cri;
use gantry_store::record;
use gantry_types::{ContainerId, ContainerState, PodId, PodState};
use tokio::sync::mpsc;

use crate::Error;
use crate::events::{Events, Subscription, Told};
use crate::pod::Msg;

/// What a pod was asked to be; never changes.
#[derive(Debug)]
pub struct PodFacts {
    pub id: PodId,
    pub config: cri::PodSandboxConfig,
    pub record: record::PodConfig,
}

/// What a container was asked to be; never changes.
#[derive(Debug)]
pub struct ContainerFacts {
    pub id: ContainerId,
    pub pod: PodId,
    pub config: cri::ContainerConfig,
    pub record: record::ContainerConfig,
}

#[derive(Clone, Debug)]
pub struct PodView {
    pub facts: Arc<PodFacts>,
    pub state: PodState,
    /// Never ready, and not taken back yet: no caller has been given its id.
    pub half_made: bool,
    /// Primary first; empty with host network.
    pub ips: Vec<String>,
    /// Raw result of the network plugin.
    pub network_result: Vec<u8>,
    /// How often a new shim has taken the pod over from one that had died.
    pub shim_adoptions: u32,
    /// The holder outlives the shim.
    pub holder_kept: bool,
    /// As last told by the kubelet.
    pub overhead: Option<cri::LinuxContainerResources>,
    pub resources: Option<cri::LinuxContainerResources>,
    pub containers: Vec<Arc<ContainerView>>,
}

#[derive(Clone, Debug)]
pub struct ContainerView {
    pub facts: Arc<ContainerFacts>,
    pub state: ContainerState,
    pub resources: Option<cri::LinuxContainerResources>,
    pub user: Option<record::User>,
    /// We have what lets it outlive its shim.
    pub in_custody: bool,
}

/// A pod sandbox's name: what the kubelet repeats when it repeats a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodName {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub attempt: u32,
}

impl From<&cri::PodSandboxMetadata> for PodName {
    fn from(metadata: &cri::PodSandboxMetadata) -> Self {
        Self {
            name: metadata.name.clone(),
            namespace: metadata.namespace.clone(),
            uid: metadata.uid.clone(),
            attempt: metadata.attempt,
        }
    }
}

impl std::fmt::Display for PodName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}_{}_{}_{}",
            self.name, self.namespace, self.uid, self.attempt
        )
    }
}

struct Entry {
    facts: Arc<PodFacts>,
    mailbox: mpsc::Sender<Msg>,
    doing: Arc<Doing>,
    /// `None` while half made: such a pod is reached by its name alone.
    view: Option<Arc<PodView>>,
    /// What subscribers to events know of it.
    told: Option<Told>,
}

/// What a driver is at, as it says itself after every message: read without asking it.
#[derive(Debug, Default)]
pub(crate) struct Doing(Mutex<Now>);

#[derive(Debug, Default)]
struct Now {
    /// When it took the message that it is handling.
    handling: Option<Instant>,
    /// Effects of the pod (no id) and of its containers.
    busy: BTreeMap<String, (&'static str, Instant)>,
}

impl Doing {
    fn lock(&self) -> MutexGuard<'_, Now> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn handles(&self) {
        self.lock().handling = Some(Instant::now());
    }

    /// A message is handled, and this is what goes on now: by container id, empty for the pod.
    pub(crate) fn handled<'a>(&self, busy: impl Iterator<Item = (&'a str, &'static str)>) {
        let now = Instant::now();
        let mut this = self.lock();
        this.handling = None;
        let mut before = std::mem::take(&mut this.busy);
        this.busy = busy
            .map(|(id, what)| match before.remove_entry(id) {
                Some((id, (was, since))) if was == what => (id, (what, since)),
                _ => (id.to_owned(), (what, now)),
            })
            .collect();
    }
}

/// A driver as it is now.
#[derive(Clone, Debug)]
pub struct DriverView {
    pub pod: PodId,
    /// `None` while the pod is made.
    pub view: Option<Arc<PodView>>,
    /// Messages that wait in its mailbox.
    pub waiting: usize,
    /// For how long it has been handling one message: handling one takes no time.
    pub handling: Option<Duration>,
    /// By container id, empty for the pod: the effect that it waits for, and for how long.
    pub busy: Vec<(String, &'static str, Duration)>,
}

/// A name in use, and by what.
#[derive(Clone, Debug)]
pub struct Reserved {
    pub id: PodId,
    pub config_hash: [u8; 32],
}

#[derive(Default)]
struct Maps {
    pods: BTreeMap<PodId, Entry>,
    containers: BTreeMap<ContainerId, PodId>,
    /// Those that drivers have, also half made: nothing of a container is there without.
    held: HashSet<ContainerId>,
    names: HashMap<PodName, Reserved>,
    /// Ids whose records are newer than we are: what has them is there, and out of reach.
    newer: BTreeMap<String, &'static str>,
}

/// The one index of pods and containers. Its lock is held for map look-ups alone.
#[derive(Default)]
pub struct Registry {
    maps: RwLock<Maps>,
    /// Filled under the lock of `maps`: in the order in which readers see what they tell.
    events: Events,
}

impl Registry {
    fn read(&self) -> RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Knows of objects whose records are newer than this program: whoever asks for one is told so.
    pub(crate) fn keep(&self, what: &'static str, ids: impl Iterator<Item = String>) {
        self.write().newer.extend(ids.map(|id| (id, what)));
    }

    /// Takes a name for a new pod, or says who has it.
    pub(crate) fn reserve(
        &self,
        name: PodName,
        new: Arc<PodFacts>,
        config_hash: [u8; 32],
        mailbox: mpsc::Sender<Msg>,
    ) -> Result<(), Reserved> {
        let mut maps = self.write();
        if let Some(holder) = maps.names.get(&name) {
            return Err(holder.clone());
        }
        let id = new.id.clone();
        maps.pods.insert(
            id.clone(),
            Entry {
                facts: new,
                mailbox,
                doing: Arc::default(),
                view: None,
                told: None,
            },
        );
        maps.names.insert(name, Reserved { id, config_hash });
        Ok(())
    }

    /// Who has a name.
    pub(crate) fn holder(&self, name: &PodName) -> Option<Reserved> {
        self.read().names.get(name).cloned()
    }

    /// Gives a name back, if `id` still has it.
    pub(crate) fn release_name(&self, name: &PodName, id: &PodId) {
        let mut maps = self.write();
        if maps.names.get(name).is_some_and(|holder| holder.id == *id) {
            maps.names.remove(name);
        }
    }

    /// Adds a recovered pod. A name that two records claim goes to the one that is ready: what a
    /// repeated RunPodSandbox must find. `told` is what an earlier daemon has shown of it.
    pub(crate) fn adopt(
        &self,
        name: PodName,
        facts: Arc<PodFacts>,
        config_hash: [u8; 32],
        ready: bool,
        told: Option<Told>,
        mailbox: mpsc::Sender<Msg>,
    ) {
        let mut maps = self.write();
        let id = facts.id.clone();
        let pod = Reserved {
            id: id.clone(),
            config_hash,
        };
        maps.pods.insert(
            id,
            Entry {
                facts,
                mailbox,
                doing: Arc::default(),
                view: None,
                told,
            },
        );
        if ready {
            maps.names.insert(name, pod);
        } else {
            maps.names.entry(name).or_insert(pod);
        }
    }

    pub(crate) fn publish(&self, view: PodView) {
        let mut maps = self.write();
        let id = view.facts.id.clone();
        let view = Arc::new(view);
        let Some(entry) = maps.pods.get_mut(&id) else {
            return;
        };
        let before = entry.view.replace(Arc::clone(&view));
        let now = Told::of(&view);
        self.events.published(entry.told.as_ref(), &now, &view);
        entry.told = Some(now);
        for container in before.iter().flat_map(|before| &before.containers) {
            maps.containers.remove(&container.facts.id);
        }
        for container in &view.containers {
            maps.containers
                .insert(container.facts.id.clone(), id.clone());
        }
    }

    pub(crate) fn remove(&self, name: &PodName, id: &PodId) {
        let mut maps = self.write();
        let view = maps.pods.remove(id).and_then(|entry| entry.view);
        for container in view.iter().flat_map(|view| &view.containers) {
            maps.containers.remove(&container.facts.id);
        }
        if let Some(view) = &view {
            self.events.removed(view);
        }
        if maps.names.get(name).is_some_and(|holder| holder.id == *id) {
            maps.names.remove(name);
        }
    }

    /// Whether there is a later sandbox of the same pod.
    pub fn is_superseded(&self, sandbox: &PodView) -> bool {
        let created = |view: &PodView| view.facts.record.created_at;
        let pod = |view: &PodView| {
            let name = PodName::from(view.facts.config.metadata.as_ref()?);
            Some((name.uid, name.namespace, name.name))
        };
        let (of, since) = (pod(sandbox), created(sandbox));
        let maps = self.read();
        let mut views = maps.pods.values().filter_map(|entry| entry.view.as_deref());
        views.any(|view| created(view) > since && pod(view) == of)
    }

    /// What happens from now on, and what nobody has heard of yet.
    pub fn subscribe(&self) -> Result<Subscription, Error> {
        let maps = self.read();
        let view = |id: &PodId| maps.pods.get(id).and_then(|entry| entry.view.clone());
        self.events.subscribe(view)
    }

    /// Ends all subscriptions, and those that are still to come.
    pub fn close_events(&self) {
        self.events.close();
    }

    /// Where the pod's driver says what it does.
    pub(crate) fn doing(&self, id: &PodId) -> Arc<Doing> {
        let doing = self
            .read()
            .pods
            .get(id)
            .map(|entry| Arc::clone(&entry.doing));
        doing.unwrap_or_default()
    }

    /// Every driver, of half-made pods too.
    pub fn drivers(&self) -> Vec<DriverView> {
        let entries: Vec<_> = self
            .read()
            .pods
            .iter()
            .map(|(id, entry)| {
                let waiting = entry.mailbox.max_capacity() - entry.mailbox.capacity();
                (
                    id.clone(),
                    entry.view.clone(),
                    waiting,
                    Arc::clone(&entry.doing),
                )
            })
            .collect();
        let drivers = entries.into_iter().map(|(pod, view, waiting, doing)| {
            let doing = doing.lock();
            let busy = doing.busy.iter();
            DriverView {
                pod,
                view,
                waiting,
                handling: doing.handling.map(|since| since.elapsed()),
                busy: busy
                    .map(|(id, (what, since))| (id.clone(), *what, since.elapsed()))
                    .collect(),
            }
        });
        drivers.collect()
    }

    pub(crate) fn mailbox(&self, id: &PodId) -> Option<mpsc::Sender<Msg>> {
        self.read().pods.get(id).map(|entry| entry.mailbox.clone())
    }

    /// Whether there is a driver for the pod: from before anything is made of it until nothing is
    /// left.
    pub(crate) fn has_pod(&self, id: &PodId) -> bool {
        self.read().pods.contains_key(id)
    }

    /// What a pod was asked to be, as long as [`Registry::has_pod`]: its cgroup is there before the
    /// pod is shown.
    pub fn pod_facts(&self, id: &PodId) -> Option<Arc<PodFacts>> {
        let maps = self.read();
        maps.pods.get(id).map(|entry| Arc::clone(&entry.facts))
    }

    /// As [`Registry::has_pod`], for the pod whose id begins so.
    pub(crate) fn pod_beginning(&self, prefix: &str) -> Option<PodId> {
        let maps = self.read();
        let (id, _) = from(&maps.pods, prefix).next()?;
        id.as_str().starts_with(prefix).then(|| id.clone())
    }

    /// As [`Registry::has_pod`], for a container.
    pub(crate) fn has_container(&self, id: &ContainerId) -> bool {
        self.read().held.contains(id)
    }

    /// A driver has a container, before anything is made of it.
    pub(crate) fn hold(&self, id: ContainerId) {
        self.write().held.insert(id);
    }

    /// Nothing is left of a container.
    pub(crate) fn let_go(&self, id: &ContainerId) {
        self.write().held.remove(id);
    }

    /// Every pod that is complete enough to be listed.
    pub fn pods(&self) -> Vec<Arc<PodView>> {
        self.read()
            .pods
            .values()
            .filter_map(|entry| entry.view.clone())
            .collect()
    }

    /// Pods of this name that failed to be made and still have to be taken back.
    pub(crate) fn half_made(&self, name: &PodName) -> Vec<Arc<PodView>> {
        let mut pods = self.pods();
        pods.retain(|pod| {
            let metadata = pod.facts.config.metadata.as_ref();
            pod.half_made && metadata.is_some_and(|metadata| PodName::from(metadata) == *name)
        });
        pods
    }

    /// The pod whose id is, or uniquely begins with, `id`.
    pub fn pod(&self, id: &str) -> Result<Arc<PodView>, Error> {
        let maps = self.read();
        let visible = |(id, entry): (&PodId, &Entry)| {
            entry
                .view
                .as_ref()
                .map(|view| (id.as_str().to_owned(), Arc::clone(view)))
        };
        let found = unique("pod sandbox", id, from(&maps.pods, id).filter_map(visible));
        found.map_err(|error| maps.newer(id, error))
    }

    /// The container whose id is, or uniquely begins with, `id`, with its pod.
    pub fn container(&self, id: &str) -> Result<(Arc<PodView>, Arc<ContainerView>), Error> {
        let maps = self.read();
        let (container, pod) = unique(
            "container",
            id,
            from(&maps.containers, id).map(|(id, pod)| (id.as_str().to_owned(), (id, pod))),
        )
        .map_err(|error| maps.newer(id, error))?;
        let missing = || Error::NotFound {
            what: "container",
            id: id.to_owned(),
        };
        let view = maps
            .pods
            .get(pod)
            .and_then(|entry| entry.view.clone())
            .ok_or_else(missing)?;
        let found = view
            .containers
            .iter()
            .find(|c| c.facts.id == *container)
            .cloned();
        Ok((view, found.ok_or_else(missing)?))
    }
}

impl Maps {
    /// What is not found may be there all the same, and must not be taken for removed.
    fn newer(&self, id: &str, error: Error) -> Error {
        let newer = || self.newer.iter().find(|(key, _)| key.starts_with(id));
        let found = (!id.is_empty()).then(newer).flatten();
        match (&error, found) {
            (Error::NotFound { .. }, Some((_, &what))) => Error::State {
                what,
                id: id.to_owned(),
                reason: "its record is of a newer gantryd, for which it is kept".to_owned(),
            },
            _ => error,
        }
    }
}

/// Entries from `prefix` on, in order. A prefix that is not an id's beginning finds what follows
/// it, which `unique` then drops.
fn from<'a, K: Ord + std::borrow::Borrow<str>, V>(
    map: &'a BTreeMap<K, V>,
    prefix: &'a str,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    map.range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
}

fn unique<T>(
    what: &'static str,
    prefix: &str,
    entries: impl Iterator<Item = (String, T)>,
) -> Result<T, Error> {
    let mut matching = entries.take_while(|(id, _)| !prefix.is_empty() && id.starts_with(prefix));
    let Some((id, found)) = matching.next() else {
        return Err(Error::NotFound {
            what,
            id: prefix.chars().take(80).collect(),
        });
    };
    if id != prefix && matching.next().is_some() {
        return Err(Error::Ambiguous {
            what,
            prefix: prefix.to_owned(),
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_match_by_unique_prefix() {
        let entries = |ids: &[&str]| {
            ids.iter()
                .map(|id| ((*id).to_owned(), ()))
                .collect::<Vec<_>>()
        };
        let find =
            |prefix: &str, ids: &[&str]| unique("pod sandbox", prefix, entries(ids).into_iter());
        assert!(find("ab", &["abc", "b"]).is_ok());
        assert!(matches!(
            find("ab", &["abc", "abd"]),
            Err(Error::Ambiguous { .. })
        ));
        assert!(find("abc", &["abc", "abcd"]).is_ok());
        assert!(matches!(find("", &["abc"]), Err(Error::NotFound { .. })));
        assert!(matches!(
            find("x", &["xab"].map(|_| "y")),
            Err(Error::NotFound { .. })
        ));
    }

    #[test]
    fn what_has_a_newer_record_is_not_taken_for_removed() {
        let registry = Registry::default();
        registry.keep("pod sandbox", ["aa".to_owned()].into_iter());
        registry.keep("container", ["bb".to_owned()].into_iter());
        assert!(matches!(registry.pod("aa"), Err(Error::State { .. })));
        assert!(matches!(registry.container("bb"), Err(Error::State { .. })));
        // As with any other, the beginning will do.
        assert!(matches!(registry.pod("a"), Err(Error::State { .. })));
        for unknown in ["", "aaa", "c"] {
            let answer = registry.pod(unknown);
            assert!(matches!(answer, Err(Error::NotFound { .. })), "{unknown:?}");
        }
        assert!(registry.pods().is_empty());
    }

    #[test]
    fn a_name_is_held_by_one_pod() {
        let registry = Registry::default();
        let name = PodName {
            name: "n".into(),
            namespace: "s".into(),
            uid: "u".into(),
            attempt: 0,
        };
        let id = |n: u8| PodId::from_random([n; 32]);
        let (mailbox, _receiver) = mpsc::channel(1);
        let reserve = |n: u8| {
            let facts = PodFacts {
                id: id(n),
                config: Default::default(),
                record: Default::default(),
            };
            registry.reserve(name.clone(), Arc::new(facts), [n; 32], mailbox.clone())
        };
        reserve(1).unwrap();
        assert_eq!(reserve(2).unwrap_err().id, id(1));
        registry.release_name(&name, &id(2));
        assert!(reserve(2).is_err());
        registry.release_name(&name, &id(1));
        reserve(2).unwrap();
        assert!(registry.pod_facts(&id(2)).is_some() && registry.pods().is_empty());
    }
}

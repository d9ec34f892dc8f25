//! Pods and containers: one driver task per pod, the client of its shim, recovery.
//!
//! [`Supervisor`] is the way in. Requests that change something go to the pod's driver
//! (`pod`); reads come from what the drivers publish ([`registry`]) and wait for nobody.

pub mod activity;
mod audit;
mod cgroup;
mod clock;
mod container;
mod error;
pub mod events;
mod failpoint;
mod forward;
pub mod host;
mod image_mounts;
mod mountinfo;
mod neighbours;
mod pod;
mod records;
mod recover;
pub mod registry;
mod rundir;
mod settings;
mod shim;
pub mod stats;
mod undo;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gantry_cri_api::v1 as cri;
use gantry_images::{Images, LayerHolders, LayersInUse};
use gantry_ports::{Network, Scopes, Snapshotter, Snapshotters};
use gantry_store::{Store, record};
use gantry_types::times::Reading;
use gantry_types::{Digest, PodId, PodState};
use prost::Message;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, mpsc};

pub use audit::{Thing, ThingKind};
pub use cgroup::{Cgroups, Driver as CgroupDriver, Hierarchy, HierarchyMount};
pub use clock::now_ns;
pub use container::{
    Attachment, AttachmentEnd, ContainerTerminal, Exec, ExecIo, ExecOutput, ExecProcess, Terminal,
    TerminalSize,
};
pub use error::Error;
pub use forward::Forward;
pub use host::Host;
pub use image_mounts::{ImageMount, mounted_images};
pub use recover::Summary;
pub use settings::{Handler, HandlerFeatures, Settings, Timeouts};

use activity::Activity;
use image_mounts::ImageMounts;
use pod::{Awaited, Driver, MAILBOX, Msg, Reply, Request, host_network, reply};
use records::Records;
use registry::{ContainerView, PodFacts, PodName, PodView, Registry, Reserved};
use rundir::RunDirs;
use shim::Shim;

/// What every driver works with.
pub(crate) struct Context {
    pub settings: Settings,
    pub records: Records,
    pub images: Images,
    pub snapshotters: Snapshotters,
    pub network: Arc<dyn Network>,
    /// Present under the systemd driver.
    pub scopes: Option<Arc<dyn Scopes>>,
    pub registry: Registry,
    pub activity: Arc<Activity>,
    /// Recovery met records that it could not read.
    pub unreadable: AtomicBool,
    /// What gantryctl has mounted.
    pub image_mounts: ImageMounts,
    /// One permit for each connection into a pod.
    pub forwards: Arc<Semaphore>,
    /// One look at what there is outside of the records at a time.
    pub auditing: tokio::sync::Mutex<()>,
    pub stats: stats::Stats,
}

/// What the store is at, from memory.
#[derive(Clone, Debug)]
pub struct StoreNow {
    /// Flushes that have ended.
    pub flushes: Reading,
    /// Age of the one under way.
    pub flushing: Option<Duration>,
    /// Writers that wait for another's.
    pub waiting: usize,
}

/// Which streams of a process a client wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    pub stdin: bool,
    pub stdout: bool,
    /// With a terminal everything comes as stdout.
    pub stderr: bool,
}

impl Context {
    /// Whether a path, its links resolved, lies in gantry's own directories.
    pub(crate) fn owns(&self, path: &Path) -> bool {
        self.own_dirs().any(|dir| path.starts_with(dir))
    }

    /// Whether gantry's own directories, or one of them, lie in a directory.
    pub(crate) fn is_above_own(&self, path: &Path) -> bool {
        self.own_dirs().any(|dir| dir.starts_with(path))
    }

    /// Also where they are by another name, links resolved.
    fn own_dirs(&self) -> impl Iterator<Item = PathBuf> {
        let settings = &self.settings;
        let dirs = [&settings.root, &settings.state, &settings.image_root];
        dirs.into_iter()
            .flat_map(|dir| [Some(dir.clone()), std::fs::canonicalize(dir).ok()])
            .flatten()
    }

    /// The snapshotter of containers of a pod with this runtime handler.
    fn snapshotter_of(&self, handler: &str) -> &Arc<dyn Snapshotter> {
        self.settings
            .handler(handler)
            .and_then(|handler| self.snapshotters.named(&handler.snapshotter))
            .unwrap_or(self.snapshotters.first())
    }

    /// The one that makes this container's root. An older record names none: of its time there was
    /// one.
    fn snapshotter(
        &self,
        container: &record::ContainerConfig,
    ) -> Result<&Arc<dyn Snapshotter>, Error> {
        if container.snapshotter.is_empty() {
            return Ok(self.snapshotters.first());
        }
        let named = self.snapshotters.named(&container.snapshotter);
        named.ok_or_else(|| Error::State {
            what: "container",
            id: container.id.clone(),
            reason: format!(
                "its snapshotter {} is not configured",
                container.snapshotter
            ),
        })
    }

    /// Layers of this snapshotter that containers and mounted images stand on, whatever became of
    /// their image; `None` when a record that cannot be read may name any.
    fn layers_in_use(&self, snapshotter: &str) -> Option<HashSet<Digest>> {
        if self.unreadable.load(Ordering::Acquire) {
            return None;
        }
        let pods = self.registry.pods();
        let containers = pods.iter().flat_map(|pod| &pod.containers);
        let layers = containers
            .filter(|container| stands_on(&container.facts.record, snapshotter))
            .flat_map(|container| chains(&container.facts.record));
        let mounted = self.image_mounts.all().into_iter();
        let mounted = mounted.filter(|mount| mount.stands_on(snapshotter));
        let layers = layers.chain(mounted.flat_map(|mount| mount.layers));
        Some(layers.collect())
    }

    /// A container has gone: when an image of its was removed before it, the layers go now.
    pub(crate) fn layers_freed(self: &Arc<Self>, container: &record::ContainerConfig) {
        let mounted = container.image_mounts.iter().map(|image| &image.image_id);
        let mut images = mounted.chain([&container.image_id]);
        if images.all(|image| matches!(self.images.status(image), Ok(Some(_)))) {
            return;
        }
        let ctx = Arc::clone(self);
        tokio::spawn(async move { ctx.collect_layers().await });
    }

    async fn collect_layers(self: &Arc<Self>) {
        let in_use = Arc::new(Standing(Arc::clone(self)));
        if let Err(error) = self.images.collect(in_use).await {
            tracing::error!(%error, "layers that nothing refers to are not collected");
        }
    }
}

/// What containers and mounted images stand on at the moment of the question.
struct Standing(Arc<Context>);

impl LayersInUse for Standing {
    fn chains(&self, snapshotter: &str) -> Option<HashSet<Digest>> {
        self.0.layers_in_use(snapshotter)
    }
}

/// Whether a container's root may be of this snapshotter. An older record does not say of which it
/// is: its layers stay in all of them.
fn stands_on(container: &record::ContainerConfig, snapshotter: &str) -> bool {
    container.snapshotter.is_empty() || container.snapshotter == snapshotter
}

/// The layers of a container's root and of the images that are mounted into it.
fn chains(container: &record::ContainerConfig) -> HashSet<Digest> {
    let mounted = container.image_mounts.iter();
    let mounted = mounted.flat_map(|image| &image.layers);
    let layers = container.layers.iter().chain(mounted);
    layers.filter_map(|layer| layer.parse().ok()).collect()
}

/// All pods of the node.
#[derive(Clone)]
pub struct Supervisor {
    ctx: Arc<Context>,
}

/// 32 random bytes for an id.
pub(crate) fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    if let Err(error) = getrandom::fill(&mut bytes) {
        // The kernel's generator cannot fail once it is seeded (getrandom(2)); ids that are not
        // random would collide with what is on disk.
        panic!("no randomness: {error}");
    }
    bytes
}

impl Supervisor {
    pub fn new(
        settings: Settings,
        store: Arc<Store>,
        images: Images,
        snapshotters: Snapshotters,
        network: Arc<dyn Network>,
        scopes: Option<Arc<dyn Scopes>>,
    ) -> Result<Self, Error> {
        let dirs = RunDirs::new(&settings.state, &settings.netns_dir);
        dirs.make()
            .map_err(|error| Error::io("make run directories", &settings.state, &error))?;
        // Those that do not know of this one would take its things for leftovers.
        neighbours::announce(&settings.state)
            .map_err(|error| Error::io("tell other gantryds of", &settings.state, &error))?;
        let records = Records { store, dirs };
        let registry = Registry::default();
        let unreadable = AtomicBool::new(false);
        let activity = Activity::new(&settings.default_handler);
        let ctx = Context {
            settings,
            records,
            images,
            snapshotters,
            network,
            scopes,
            registry,
            activity,
            unreadable,
            image_mounts: ImageMounts::default(),
            forwards: Arc::new(Semaphore::new(forward::MAX_FORWARDS)),
            auditing: tokio::sync::Mutex::default(),
            stats: stats::Stats::default(),
        };
        Ok(Self { ctx: Arc::new(ctx) })
    }

    /// Finds everything again. To be called once, before anything else.
    pub async fn recover(&self) -> Result<Summary, Error> {
        recover::recover(&self.ctx).await
    }

    pub fn settings(&self) -> &Settings {
        &self.ctx.settings
    }

    pub fn network(&self) -> &Arc<dyn Network> {
        &self.ctx.network
    }

    pub fn images(&self) -> &Images {
        &self.ctx.images
    }

    /// Pods and containers as last published.
    pub fn registry(&self) -> &Registry {
        &self.ctx.registry
    }

    /// What is under way, and how long it takes.
    pub fn activity(&self) -> &Arc<Activity> {
        &self.ctx.activity
    }

    /// What the store is at.
    pub fn store_now(&self) -> StoreNow {
        let store = &self.ctx.records.store;
        let (flushing, waiting) = store.flushing();
        StoreNow {
            flushes: store.flush_times(),
            flushing,
            waiting,
        }
    }

    /// Returns when the store has answered a look-up. Blocks.
    pub fn probe_store(&self) -> Result<(), Error> {
        let probed = self.ctx.records.store.probe();
        probed.map_err(Error::step("ask the store"))
    }

    /// The node's snapshotters.
    pub fn snapshotters(&self) -> &Snapshotters {
        &self.ctx.snapshotters
    }

    /// The layers that containers and mounted images stand on, whatever became of their image.
    pub fn layers_in_use(&self) -> Arc<dyn LayersInUse> {
        Arc::new(Standing(Arc::clone(&self.ctx)))
    }

    /// Mounts an image at `target`, an existing directory on which nothing is mounted, for all to
    /// read and nobody to write; its layers stay until [`Supervisor::unmount_image`].
    pub async fn mount_image(&self, image: &str, target: &Path) -> Result<ImageMount, Error> {
        image_mounts::mount(&self.ctx, image, target).await
    }

    /// Takes away what [`Supervisor::mount_image`] has mounted.
    pub async fn unmount_image(&self, target: &Path) -> Result<(), Error> {
        image_mounts::unmount(&self.ctx, target).await
    }

    /// Containers (`container ID`) and mounts (`mount PATH`) that an image has, by its id.
    pub fn image_users(&self, image_id: &str) -> Vec<String> {
        let pods = self.ctx.registry.pods();
        let containers = pods.iter().flat_map(|pod| &pod.containers);
        let containers = containers.filter(|container| {
            let record = &container.facts.record;
            let mut mounted = record.image_mounts.iter();
            record.image_id == image_id || mounted.any(|image| image.image_id == image_id)
        });
        let containers = containers.map(|container| format!("container {}", container.facts.id));
        let mounts = self.ctx.image_mounts.all().into_iter();
        let mounts = mounts.filter(|mount| mount.image_id == image_id);
        containers
            .chain(mounts.map(|mount| format!("mount {}", mount.target.display())))
            .collect()
    }

    /// The containers and mounts that stand on a layer, or why it counts as used by somebody.
    pub fn layer_holders(&self) -> LayerHolders {
        let mut holders = LayerHolders::new();
        let pods = self.ctx.registry.pods();
        for snapshotter in self.ctx.snapshotters.iter() {
            let name = snapshotter.name();
            if self.ctx.unreadable.load(Ordering::Acquire) {
                // Who cannot list them sees none to ask about either.
                for (chain, _) in snapshotter.layers().unwrap_or_default() {
                    let unknown = "a record that cannot be read".to_owned();
                    let key = (name.to_owned(), chain);
                    holders.entry(key).or_default().push(unknown);
                }
            }
            for container in pods.iter().flat_map(|pod| &pod.containers) {
                let facts = &container.facts;
                if !stands_on(&facts.record, name) {
                    continue;
                }
                for chain in chains(&facts.record) {
                    let key = (name.to_owned(), chain);
                    let holder = format!("container {}", facts.id);
                    holders.entry(key).or_default().push(holder);
                }
            }
        }
        for mount in self.ctx.image_mounts.all() {
            let holder = format!("mount {}", mount.target.display());
            let named = self.ctx.snapshotters.iter().map(|each| each.name());
            for name in named.filter(|name| mount.stands_on(name)) {
                for chain in &mount.layers {
                    let key = (name.to_owned(), chain.clone());
                    holders.entry(key).or_default().push(holder.clone());
                }
            }
        }
        holders
    }

    /// Everything that there is outside of the records, with its owner. With `repair` what belongs
    /// to nobody is removed, also when the caller goes away meanwhile.
    pub async fn check(&self, repair: bool) -> Result<Vec<Thing>, Error> {
        let ctx = Arc::clone(&self.ctx);
        let checked = tokio::spawn(async move { audit::check(&ctx, repair).await });
        checked
            .await
            .unwrap_or_else(|panic| Err(Error::internal("check", panic)))
    }

    /// Takes away layers and blobs that nothing refers to.
    pub async fn collect_layers(&self) {
        self.ctx.collect_layers().await;
    }

    /// The container's OCI spec as JSON, for verbose answers.
    pub fn runtime_spec(&self, container: &ContainerView) -> Result<serde_json::Value, Error> {
        let path = self
            .ctx
            .records
            .dirs
            .container(&container.facts.id)
            .join("config.json");
        let bytes = std::fs::read(&path).map_err(|error| Error::io("read spec", &path, &error))?;
        serde_json::from_slice(&bytes).map_err(|error| Error::internal("read spec", error))
    }

    /// Makes a pod, or returns the one that this same request made before.
    pub async fn run_pod(
        &self,
        config: cri::PodSandboxConfig,
        handler: String,
    ) -> Result<PodId, Error> {
        let metadata = config.metadata.as_ref().ok_or_else(|| Error::Invalid {
            field: "config.metadata".to_owned(),
            reason: "is missing".to_owned(),
        })?;
        let name = PodName::from(metadata);
        let config_hash = hash(&[&config.encode_to_vec(), handler.as_bytes()]);
        loop {
            // Before anything that a second pod would need: the one there is needs none of it.
            if let Some(holder) = self.ctx.registry.holder(&name) {
                match self.join(&name, &holder, config_hash).await? {
                    Some(id) => return Ok(id),
                    // What has the name is stopped: it stays until it is removed, and this
                    // request makes the pod anew.
                    None => self.ctx.registry.release_name(&name, &holder.id),
                }
            }
            let facts = Arc::new(self.pod_facts(&config, &handler, config_hash)?);
            self.take_back(&name).await;
            let (mailbox, messages) = mpsc::channel(MAILBOX);
            let new = Arc::clone(&facts);
            let reserved =
                self.ctx
                    .registry
                    .reserve(name.clone(), new, config_hash, mailbox.clone());
            if reserved.is_err() {
                // Somebody was quicker: join.
                continue;
            }
            let mut driver = Driver::new(
                Arc::clone(&self.ctx),
                facts,
                record::PodStatus::default(),
                PodState::Creating,
                mailbox.clone(),
            );
            driver.begin_run();
            tokio::spawn(driver.run(messages));
            return match self.ask(&mailbox, Request::AwaitReady).await? {
                Awaited::Ready(id) => Ok(id),
                Awaited::Ended => Err(Error::State {
                    what: "pod sandbox",
                    id: name.to_string(),
                    reason: "it was stopped while it was made".to_owned(),
                }),
            };
        }
    }

    /// Removes what earlier attempts at this pod have left. What still cannot be removed (a
    /// plugin that fails at DEL) stays listed and does not hold up the next attempt; a plugin that
    /// hangs is waited for no longer than recovery would, and the removal goes on without us.
    async fn take_back(&self, name: &PodName) {
        let limit = self.ctx.settings.timeouts.recovery;
        let left = self.ctx.registry.half_made(name);
        futures::future::join_all(left.iter().map(async |pod| {
            let id = pod.facts.id.as_str();
            match tokio::time::timeout(limit, self.remove_pod(id)).await {
                Ok(Ok(())) => tracing::info!(pod = id, "half-made pod taken back"),
                Ok(Err(error)) => tracing::warn!(pod = id, %error, "half-made pod stays"),
                Err(_) => tracing::warn!(pod = id, ?limit, "half-made pod is still being removed"),
            }
        }))
        .await;
    }

    /// Waits for the pod that has the name; `None` when it has ended.
    async fn join(
        &self,
        name: &PodName,
        holder: &Reserved,
        config_hash: [u8; 32],
    ) -> Result<Option<PodId>, Error> {
        if holder.config_hash != config_hash {
            return Err(Error::NameInUse {
                what: "pod sandbox",
                name: name.to_string(),
                id: holder.id.to_string(),
            });
        }
        let Some(mailbox) = self.ctx.registry.mailbox(&holder.id) else {
            return Ok(None);
        };
        match self.ask(&mailbox, Request::AwaitReady).await {
            Ok(Awaited::Ready(id)) => Ok(Some(id)),
            Ok(Awaited::Ended) | Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is known of a pod before anything is made; everything that can be refused is here.
    fn pod_facts(
        &self,
        config: &cri::PodSandboxConfig,
        handler: &str,
        config_hash: [u8; 32],
    ) -> Result<PodFacts, Error> {
        let settings = &self.ctx.settings;
        let found = settings.handler(handler).ok_or_else(|| Error::Invalid {
            field: "runtime_handler".to_owned(),
            reason: format!("no runtime handler {handler:?} is configured"),
        })?;
        if let Some(reason) = &found.features.unusable {
            return Err(Error::State {
                what: "runtime handler",
                id: handler.to_owned(),
                reason: reason.clone(),
            });
        }
        pod::check(config, found.features.no_user_namespaces.as_deref())?;
        let id = self.new_pod_id();
        let host_network = host_network(config);
        let parent = config
            .linux
            .as_ref()
            .map(|linux| linux.cgroup_parent.as_str());
        let parent = settings.cgroups.parent(parent.unwrap_or_default())?;
        let cgroup_dirs = settings.cgroups.holder(parent, &id)?;
        let shim_cgroup_dirs = settings.cgroups.shim(&id)?;
        let scopes = match settings.cgroups.driver {
            CgroupDriver::Cgroupfs => Vec::new(),
            CgroupDriver::Systemd => settings.cgroups.scopes(&id).into(),
        };
        let text = |dirs: Vec<PathBuf>| {
            let text = |dir: PathBuf| dir.to_string_lossy().into_owned();
            dirs.into_iter().map(text).collect()
        };
        let (netns_path, network_intent) = if host_network {
            (String::new(), Vec::new())
        } else {
            let intent = self
                .ctx
                .network
                .intent()
                .map_err(Error::step("set up network"))?;
            (
                self.ctx
                    .records
                    .dirs
                    .netns(&id)
                    .to_string_lossy()
                    .into_owned(),
                intent,
            )
        };
        let record = record::PodConfig {
            id: id.to_string(),
            cri_config: config.encode_to_vec(),
            runtime_handler: handler.to_owned(),
            created_at: clock::now_ns(),
            config_hash: config_hash.to_vec(),
            boot_id: settings.boot_id.clone(),
            netns_path,
            cgroup_dirs: text(cgroup_dirs),
            network_intent,
            shim_cgroup_dirs: text(shim_cgroup_dirs),
            scopes,
        };
        Ok(PodFacts {
            id,
            config: config.clone(),
            record,
        })
    }

    /// An id that no pod has and, where SELinux is on, whose categories no pod has.
    fn new_pod_id(&self) -> PodId {
        let mut id = PodId::from_random(random());
        if self.ctx.settings.host.selinux.is_some() {
            let pods = self.ctx.registry.pods();
            let taken: HashSet<_> = pods
                .iter()
                .map(|pod| gantry_spec::selinux::categories(&pod.facts.id))
                .collect();
            // Half a million pairs: a few tries do for as many pods as a node holds.
            for _ in 0..64 {
                if !taken.contains(&gantry_spec::selinux::categories(&id)) {
                    break;
                }
                id = PodId::from_random(random());
            }
        }
        id
    }

    /// Stops a pod; one that is not there is stopped.
    pub async fn stop_pod(&self, id: &str) -> Result<(), Error> {
        self.ask_pod(id, Request::Stop).await
    }

    /// Removes a pod, stopping it first; one that is not there is removed.
    pub async fn remove_pod(&self, id: &str) -> Result<(), Error> {
        self.ask_pod(id, Request::Remove).await
    }

    async fn ask_pod(
        &self,
        id: &str,
        request: impl FnOnce(Reply<()>) -> Request,
    ) -> Result<(), Error> {
        let pod = match self.ctx.registry.pod(id) {
            Ok(pod) => pod,
            Err(Error::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        match self.ask_of(&pod, request).await {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// Makes a container in a ready pod, or returns the one that this same request made before.
    pub async fn create_container(
        &self,
        pod: &str,
        config: cri::ContainerConfig,
    ) -> Result<gantry_types::ContainerId, Error> {
        let pod = self.ctx.registry.pod(pod)?;
        let config_hash = hash(&[&config.encode_to_vec()]);
        let config = Box::new(config);
        self.ask_of(&pod, |reply| Request::CreateContainer {
            config,
            config_hash,
            reply,
        })
        .await
    }

    pub async fn start_container(&self, id: &str) -> Result<(), Error> {
        let (pod, container) = self.ctx.registry.container(id)?;
        let id = container.facts.id.clone();
        self.ask_of(&pod, |reply| Request::Start { id, reply })
            .await
    }

    /// Stops a container within `grace`; one that is not there is stopped.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), Error> {
        let (pod, container) = match self.ctx.registry.container(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let id = container.facts.id.clone();
        match self
            .ask_of(&pod, |reply| Request::StopContainer { id, grace, reply })
            .await
        {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// Removes a container, killing it first; one that is not there is removed.
    pub async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let (pod, container) = match self.ctx.registry.container(id) {
            Err(Error::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let id = container.facts.id.clone();
        match self
            .ask_of(&pod, |reply| Request::RemoveContainer { id, reply })
            .await
        {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    pub async fn update_container(
        &self,
        id: &str,
        resources: cri::LinuxContainerResources,
    ) -> Result<(), Error> {
        let (pod, container) = self.ctx.registry.container(id)?;
        let id = container.facts.id.clone();
        let resources = Box::new(resources);
        self.ask_of(&pod, |reply| Request::Update {
            id,
            resources,
            reply,
        })
        .await
    }

    /// Keeps what the kubelet tells of a pod's overhead and resources.
    pub async fn update_pod(
        &self,
        id: &str,
        overhead: &cri::LinuxContainerResources,
        resources: &cri::LinuxContainerResources,
    ) -> Result<(), Error> {
        let pod = self.ctx.registry.pod(id)?;
        let (overhead, resources) = (overhead.encode_to_vec(), resources.encode_to_vec());
        self.ask_of(&pod, |reply| Request::UpdatePod {
            overhead,
            resources,
            reply,
        })
        .await
    }

    pub async fn reopen_log(&self, id: &str) -> Result<(), Error> {
        let (pod, container) = self.ctx.registry.container(id)?;
        let id = container.facts.id.clone();
        self.ask_of(&pod, |reply| Request::ReopenLog { id, reply })
            .await
    }

    /// Runs a command in a container and returns what it wrote; `limit` zero means none.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: Vec<String>,
        limit: Duration,
    ) -> Result<ExecOutput, Error> {
        if command.is_empty() {
            return Err(Error::Invalid {
                field: "cmd".to_owned(),
                reason: "is empty".to_owned(),
            });
        }
        let (shim, view) = self.running(id).await?;
        container::exec_sync(&self.ctx, shim, view, command, limit).await
    }

    /// A container that runs.
    pub async fn running_container(&self, id: &str) -> Result<Arc<ContainerView>, Error> {
        self.running(id).await.map(|(_, view)| view)
    }

    async fn running(&self, id: &str) -> Result<(Arc<Shim>, Arc<ContainerView>), Error> {
        let (pod, container) = self.ctx.registry.container(id)?;
        let id = container.facts.id.clone();
        self.ask_of(&pod, |reply| Request::Running { id, reply })
            .await
    }

    /// Starts a command in a container, with a terminal if a size is given for it. Its bytes pass
    /// neither the shim nor us.
    pub async fn exec(
        &self,
        id: &str,
        command: Vec<String>,
        stdio: Stdio,
        terminal: Option<TerminalSize>,
    ) -> Result<Exec, Error> {
        let (shim, view) = self.running(id).await?;
        container::exec(&self.ctx, shim, view, command, stdio, terminal).await
    }

    /// Connects to a container's own streams, from now on.
    pub async fn attach(&self, id: &str, stdio: Stdio) -> Result<Attachment, Error> {
        let (shim, view) = self.running(id).await?;
        container::attach(&self.ctx, shim, view, stdio).await
    }

    /// A ready pod.
    pub fn ready_pod(&self, id: &str) -> Result<Arc<PodView>, Error> {
        let pod = self.ctx.registry.pod(id)?;
        if pod.state.is_ready() {
            return Ok(pod);
        }
        Err(Error::State {
            what: "pod sandbox",
            id: pod.facts.id.to_string(),
            reason: "is not ready".to_owned(),
        })
    }

    /// Connects to a port on the loopback of a pod's network.
    pub async fn port_forward(&self, id: &str, port: u16) -> Result<Forward, Error> {
        let pod = self.ready_pod(id)?;
        forward::connect(&self.ctx, &pod, port).await
    }

    async fn ask_of<T>(
        &self,
        pod: &PodView,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, Error> {
        let id = &pod.facts.id;
        let gone = || Error::NotFound {
            what: "pod sandbox",
            id: id.to_string(),
        };
        let mailbox = self.ctx.registry.mailbox(id).ok_or_else(gone)?;
        self.ask(&mailbox, request).await
    }

    /// Sends a request to a driver. Dropping the future leaves what it began going on.
    async fn ask<T>(
        &self,
        mailbox: &mpsc::Sender<Msg>,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, Error> {
        let gone = || Error::NotFound {
            what: "pod sandbox",
            id: "removed meanwhile".to_owned(),
        };
        let (reply, answer) = reply();
        mailbox
            .send(Msg::Request(tracing::Span::current(), request(reply)))
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Tells a repeated request from another one. Parts are length-prefixed, so that none runs into
/// the next.
fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> String {
        Digest::sha256([n; 32]).to_string()
    }

    #[test]
    fn a_container_stands_on_the_layers_of_its_own_snapshotter() {
        let container = record::ContainerConfig {
            layers: vec![digest(1)],
            image_mounts: vec![record::ImageMount {
                layers: vec![digest(2), "not a digest".to_owned()],
                ..Default::default()
            }],
            snapshotter: "native".to_owned(),
            ..Default::default()
        };
        assert!(stands_on(&container, "native") && !stands_on(&container, "overlayfs"));
        let expected = [digest(1), digest(2)].map(|layer| layer.parse().unwrap());
        assert_eq!(chains(&container), HashSet::from(expected));
    }

    /// A record of before there was a choice: id, pod id and one layer, encoded then.
    #[test]
    fn a_record_without_a_snapshotter_keeps_its_layers_in_all_of_them() {
        let mut old = b"\x0a\x02c1\x12\x02p1\x42\x47".to_vec();
        old.extend(digest(1).as_bytes());
        let container = record::ContainerConfig::decode(old.as_slice()).unwrap();
        assert_eq!(
            (container.id.as_str(), &container.layers),
            ("c1", &vec![digest(1)])
        );
        assert!(stands_on(&container, "native") && stands_on(&container, "overlayfs"));
    }
}

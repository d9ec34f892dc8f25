//! CNI by executing plugins: the [`gantry_ports::Network`] of a node whose network is set up by
//! whoever writes files into the CNI configuration directory.
//!
//! The directory is watched; the first file in lexical order that holds a network is the network
//! of new pods. A pod keeps the network that it was made with: [`Network::intent`] hands the core
//! a copy of the configuration, and teardown uses that copy. Whether the node is ready is known
//! before anybody asks; plugins that can say so themselves (STATUS, CNI 1.1) are asked in the
//! background.
//!
//! Loopback is not our business: the shim raises it.

mod capability;
mod chain;
mod conf_dir;
mod config;
mod error;
mod exec;
mod host_local;
mod leftovers;
mod quantity;
mod result;
mod version;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use gantry_ports::Network;
use gantry_ports::network::{Attached, Attachment, Held, NotReady};
use gantry_types::PodId;
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::chain::{IFNAME, Plugins, Record};
use crate::conf_dir::Loaded;
use crate::error::Error;
use crate::version::Version;

/// The word that kubelets and people know from other runtimes.
const REASON: &str = "NetworkPluginNotReady";

#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of `.conflist`, `.conf` and `.json` files; made when missing.
    pub conf_dir: PathBuf,
    /// Directories of plugins, searched in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// How long one call of one plugin may take before its process group is killed.
    pub timeout: Duration,
    /// Directory of this daemon alone, of this boot, where calls under way are noted: the plugins of
    /// those that a killed daemon left are ended at the start. Empty: none are.
    pub calls_dir: PathBuf,
    /// How often plugins of CNI 1.1 are asked for their status.
    pub status_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into()],
            // A kubelet gives RunPodSandbox four minutes; ADD and the DEL after it must fit.
            timeout: Duration::from_secs(100),
            calls_dir: PathBuf::new(),
            status_interval: Duration::from_secs(10),
        }
    }
}

/// Networks by CNI. Its background tasks end when it is dropped.
pub struct Cni {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

struct Shared {
    options: Options,
    plugins: Plugins,
    state: RwLock<State>,
    /// The configuration has changed: its plugins' status is of interest now.
    reloaded: Notify,
}

struct State {
    loaded: Result<Arc<Loaded>, String>,
    /// What plugins said last; counts only for networks of CNI 1.1.
    status: Result<(), String>,
    pod_cidr: String,
}

impl Cni {
    /// Reads the configuration directory and begins to watch it. Blocks, seldom for long, while it
    /// looks for plugins that a killed daemon has left.
    ///
    /// # Errors
    /// Internal when called outside a tokio runtime. A directory that is empty or unreadable is no
    /// error but "not ready".
    pub fn start(options: Options) -> Result<Self, gantry_ports::Error> {
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|error| Error::Start(error.to_string()))?;
        if let Err(error) = leftovers::end(&options.calls_dir) {
            tracing::warn!(%error, "CNI plugins of a killed gantryd may be left");
        }
        let shared = Arc::new(Shared {
            plugins: Plugins {
                bin_dirs: options.bin_dirs.clone(),
                limit: options.timeout,
                calls_dir: options.calls_dir.clone(),
                mended: Arc::default(),
            },
            state: RwLock::new(State {
                loaded: conf_dir::load(&options.conf_dir).map(Arc::new),
                status: Err("the network's plugins have not been asked yet".into()),
                pod_cidr: String::new(),
            }),
            reloaded: Notify::new(),
            options,
        });
        let watching = Arc::clone(&shared);
        let asking = Arc::clone(&shared);
        let tasks = [
            runtime.spawn(async move {
                conf_dir::watch(&watching.options.conf_dir, || watching.reload()).await;
            }),
            runtime.spawn(async move { asking.keep_asking().await }),
        ];
        Ok(Self { shared, tasks })
    }
}

impl Drop for Cni {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Shared {
    /// A poisoned lock guards plain values that are replaced whole: they are good all the same.
    fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn reload(&self) {
        let loaded = conf_dir::load(&self.options.conf_dir).map(Arc::new);
        if self.read(|state| state.loaded == loaded) {
            return;
        }
        match &loaded {
            Ok(new) => {
                let (network, file) = (&new.network.name, new.file.display());
                tracing::info!(network, %file, "CNI network in use");
            }
            Err(reason) => tracing::warn!(reason, "no CNI network"),
        }
        self.write(|state| state.loaded = loaded);
        self.reloaded.notify_one();
    }

    fn network(&self) -> Result<Arc<Loaded>, Error> {
        self.read(|state| state.loaded.clone())
            .map_err(Error::NoNetwork)
    }

    /// Asks the plugins for their status: at once when the configuration changed, then now and
    /// then. Networks that cannot be asked cost nothing.
    async fn keep_asking(&self) {
        loop {
            let asked = match self.network() {
                Ok(loaded) if has_status(&loaded) => {
                    let status = self.plugins.status(&loaded.network).await;
                    let status = status.map_err(|error| error.to_string());
                    self.write(|state| state.status = status);
                    true
                }
                _ => false,
            };
            let pause = async {
                if asked {
                    tokio::time::sleep(self.options.status_interval).await;
                } else {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = self.reloaded.notified() => {}
                () = pause => {}
            }
        }
    }
}

fn has_status(loaded: &Loaded) -> bool {
    loaded
        .network
        .version()
        .is_ok_and(|version| version >= Version::V1_1)
}

#[async_trait]
impl Network for Cni {
    fn ready(&self) -> Result<(), NotReady> {
        let verdict = self.shared.read(|state| match &state.loaded {
            Err(reason) => Err(reason.clone()),
            Ok(loaded) if has_status(loaded) => state.status.clone(),
            Ok(_) => Ok(()),
        });
        verdict.map_err(|message| NotReady {
            reason: REASON.into(),
            message,
        })
    }

    fn describe(&self) -> serde_json::Value {
        let options = &self.shared.options;
        self.shared.read(|state| {
            let networks: Vec<_> = state
                .loaded
                .iter()
                .map(|loaded| {
                    let config = &loaded.network;
                    json!({
                        "Config": {
                            "Name": config.name,
                            "CNIVersion": config.version,
                            "Plugins": config.plugins.iter().map(|it| json!({"Network": it}))
                                .collect::<Vec<_>>(),
                            "Source": loaded.file,
                        },
                        "IFName": IFNAME,
                    })
                })
                .collect();
            json!({
                "PluginDirs": options.bin_dirs,
                "PluginConfDir": options.conf_dir,
                "PluginMaxConfNum": 1,
                "Prefix": "eth",
                "PodCIDR": state.pod_cidr,
                "Networks": networks,
            })
        })
    }

    fn intent(&self) -> Result<Vec<u8>, gantry_ports::Error> {
        let loaded = self.shared.network()?;
        Ok(Record::intent(loaded.network.clone()).encode()?)
    }

    async fn attach(
        &self,
        pod: &Attachment,
        intent: &[u8],
    ) -> Result<Attached, gantry_ports::Error> {
        Ok(self.shared.plugins.add(pod, Record::parse(intent)?).await?)
    }

    async fn detach(&self, pod: &Attachment, raw: &[u8]) -> Result<(), gantry_ports::Error> {
        // Nothing was recorded: nothing can have been attached.
        if raw.is_empty() {
            return Ok(());
        }
        Ok(self
            .shared
            .plugins
            .delete(pod, &Record::parse(raw)?)
            .await?)
    }

    fn held(&self) -> Result<Vec<Held>, gantry_ports::Error> {
        match self.shared.network() {
            Ok(loaded) => host_local::held(&loaded.network, &host_local::CACHE_DIRS.map(Path::new))
                .map_err(|error| gantry_ports::Error::io("list addresses of host-local", error)),
            Err(_) => Ok(Vec::new()),
        }
    }

    async fn gc(&self, valid: &[PodId]) -> Result<(), gantry_ports::Error> {
        let Ok(loaded) = self.shared.network() else {
            return Ok(());
        };
        Ok(self.shared.plugins.collect(&loaded.network, valid).await?)
    }

    /// Kept for [`Network::describe`]; the configuration itself is written by the cluster's
    /// network add-on.
    async fn update_pod_cidr(&self, cidr: &str) -> Result<(), gantry_ports::Error> {
        self.shared.write(|state| state.pod_cidr = cidr.to_owned());
        Ok(())
    }
}

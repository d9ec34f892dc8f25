//! Runs the plugins of a network for a pod, forward to add and backward to delete.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use gantry_ports::network::{Attached, Attachment};
use gantry_types::PodId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::capability::runtime_config;
use crate::config::{Network, execution_config, plugin_type};
use crate::error::Error;
use crate::exec::{Call, run};
use crate::host_local::{self, Mended};
use crate::result;
use crate::version::Version;

/// The pod's interface.
pub const IFNAME: &str = "eth0";

/// What the core keeps for us: before attach as intent, after it as result. Teardown needs nothing
/// else, whatever has become of the configuration directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub config: Network,
    pub ifname: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
}

impl Record {
    pub fn intent(config: Network) -> Self {
        Self {
            config,
            ifname: IFNAME.into(),
            result: None,
        }
    }

    pub fn parse(raw: &[u8]) -> Result<Self, Error> {
        let record: Self =
            serde_json::from_slice(raw).map_err(|error| Error::Record(error.to_string()))?;
        Ok(Self {
            config: record.config.checked().map_err(Error::Record)?,
            ..record
        })
    }

    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(self).map_err(|error| Error::Record(error.to_string()))
    }
}

/// Where plugins are, how long one may take, and where calls are noted.
#[derive(Clone, Debug)]
pub struct Plugins {
    pub bin_dirs: Vec<PathBuf>,
    pub limit: Duration,
    pub calls_dir: PathBuf,
    pub mended: Arc<Mended>,
}

impl Plugins {
    /// ADD by each plugin, each told what the one before it answered. When one fails all are asked
    /// to delete, those that never ran included: the specification makes that harmless.
    pub async fn add(&self, pod: &Attachment, record: Record) -> Result<Attached, Error> {
        let request = Request::new(pod, &record)?;
        if pod.netns.is_none() {
            return Err(Error::Pod {
                field: "netns".into(),
                reason: "is missing".into(),
            });
        }
        self.mend(&record.config).await;
        let added = self.add_chain(&request, &record).await;
        let (result, ips) = match added {
            Ok(added) => added,
            Err(attach) => {
                return Err(match self.delete_chain(&request, &record).await {
                    Ok(()) => attach,
                    Err(detach) => Error::Undo {
                        attach: Box::new(attach),
                        detach: Box::new(detach),
                    },
                });
            }
        };
        let raw = Record {
            result: Some(result),
            ..record
        }
        .encode()?;
        Ok(Attached { ips, raw })
    }

    async fn add_chain(
        &self,
        request: &Request,
        record: &Record,
    ) -> Result<(Value, Vec<std::net::IpAddr>), Error> {
        let network = &record.config;
        let version = network.version().map_err(Error::Record)?;
        let mut previous = None;
        let mut last = "";
        for (plugin, values) in network.plugins.iter().zip(&request.runtime_configs) {
            last = plugin_type(plugin);
            let config = execution_config(network, plugin, Some(values), previous.as_ref());
            let stdout = self
                .call(network, last, "ADD", &request.env, config)
                .await?;
            let result = result::parse(&stdout, version);
            previous = Some(result.map_err(|reason| bad_result(network, last, reason))?);
        }
        let result = previous.ok_or_else(|| Error::Record("network without plugins".into()))?;
        let ips = result::addresses(&result, &record.ifname)
            .map_err(|reason| bad_result(network, last, reason))?;
        if ips.is_empty() {
            let reason = format!("no address for {}", record.ifname);
            return Err(bad_result(network, last, reason));
        }
        Ok((result, ips))
    }

    /// DEL by each plugin, last one first, under the configuration and result of the record.
    pub async fn delete(&self, pod: &Attachment, record: &Record) -> Result<(), Error> {
        // ADD refused the same values before any plugin ran: there is nothing to give back.
        let Ok(request) = Request::new(pod, record) else {
            return Ok(());
        };
        self.mend(&record.config).await;
        self.delete_chain(&request, record).await?;
        // The core forgets the pod next.
        let network = record.config.clone();
        let settled = tokio::task::spawn_blocking(move || {
            host_local::settle(&network).map_err(|(dir, source)| Error::Settle {
                network: network.name,
                dir,
                source,
            })
        });
        settled
            .await
            .unwrap_or_else(|error| Err(Error::Start(error.to_string())))
    }

    /// Not worth a call's failure, nor its waiting for a lock.
    async fn mend(&self, network: &Network) {
        let (mended, network) = (Arc::clone(&self.mended), network.clone());
        let done = tokio::task::spawn_blocking(move || mended.mend(&network)).await;
        if let Ok(Err(error)) = done {
            tracing::warn!(
                error,
                "addresses that a power loss may have left are not looked at"
            );
        }
    }

    /// One plugin's failure does not spare the others: what they hold would leak until the first
    /// one is mended.
    async fn delete_chain(&self, request: &Request, record: &Record) -> Result<(), Error> {
        let network = &record.config;
        let mut failure: Option<Error> = None;
        for (plugin, values) in network.plugins.iter().zip(&request.runtime_configs).rev() {
            let config = execution_config(network, plugin, Some(values), record.result.as_ref());
            let deleted = self
                .call(network, plugin_type(plugin), "DEL", &request.env, config)
                .await;
            if let Err(error) = deleted {
                failure = Some(match failure {
                    None => error,
                    Some(first) => Error::Several {
                        first: Box::new(first),
                        rest: Box::new(error),
                    },
                });
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// STATUS by each plugin; the first that cannot serve pods is the answer. Networks before
    /// CNI 1.1 cannot be asked and count as ready.
    pub async fn status(&self, network: &Network) -> Result<(), Error> {
        if network.version().map_err(Error::Record)? < Version::V1_1 {
            return Ok(());
        }
        for plugin in &network.plugins {
            let config = execution_config(network, plugin, None, None);
            self.call(network, plugin_type(plugin), "STATUS", &[], config)
                .await?;
        }
        Ok(())
    }

    /// GC by each plugin: everything that is not of these pods may go.
    pub async fn collect(&self, network: &Network, valid: &[PodId]) -> Result<(), Error> {
        if network.disable_gc || network.version().map_err(Error::Record)? < Version::V1_1 {
            return Ok(());
        }
        let attachment = |pod: &PodId| json!({"containerID": pod.as_str(), "ifname": IFNAME});
        let attachments: Vec<Value> = valid.iter().map(attachment).collect();
        let mut failure = None;
        for plugin in &network.plugins {
            let mut config = execution_config(network, plugin, None, None);
            config.insert(
                "cni.dev/valid-attachments".into(),
                attachments.clone().into(),
            );
            let collected = self
                .call(network, plugin_type(plugin), "GC", &[], config)
                .await;
            failure = failure.or(collected.err());
        }
        failure.map_or(Ok(()), Err)
    }

    async fn call(
        &self,
        network: &Network,
        plugin: &str,
        command: &'static str,
        env: &[(&'static str, OsString)],
        config: Map<String, Value>,
    ) -> Result<Vec<u8>, Error> {
        let call = Call {
            network: &network.name,
            plugin,
            command,
            calls_dir: &self.calls_dir,
            env,
            stdin: Value::Object(config).to_string().into_bytes(),
        };
        run(&self.bin_dirs, self.limit, call).await
    }
}

fn bad_result(network: &Network, plugin: &str, reason: String) -> Error {
    Error::Result {
        network: network.name.clone(),
        plugin: plugin.into(),
        command: "ADD",
        reason,
    }
}

/// What is the same for every plugin of a chain, settled before the first one runs.
struct Request {
    env: Vec<(&'static str, OsString)>,
    /// One a plugin.
    runtime_configs: Vec<Map<String, Value>>,
}

impl Request {
    fn new(pod: &Attachment, record: &Record) -> Result<Self, Error> {
        let netns = pod.netns.clone().unwrap_or_default();
        if pod.netns.is_some() && !netns.is_absolute() {
            let reason = format!("{} is not absolute", netns.display());
            return Err(Error::Pod {
                field: "netns".into(),
                reason,
            });
        }
        let plugins = record.config.plugins.iter();
        let runtime_configs = plugins
            .map(|plugin| runtime_config(plugin, pod))
            .collect::<Result<_, _>>()?;
        let env = vec![
            ("CNI_CONTAINERID", pod.pod.as_str().into()),
            ("CNI_NETNS", netns.into_os_string()),
            ("CNI_IFNAME", record.ifname.clone().into()),
            ("CNI_ARGS", args(pod)?.into()),
        ];
        Ok(Self {
            env,
            runtime_configs,
        })
    }
}

/// `CNI_ARGS` as Kubernetes plugins have always read them. A separator within a value would smuggle
/// in an argument.
fn args(pod: &Attachment) -> Result<String, Error> {
    let mut text = String::from("IgnoreUnknown=1");
    for (key, value) in [
        ("K8S_POD_NAMESPACE", pod.namespace.as_str()),
        ("K8S_POD_NAME", pod.name.as_str()),
        ("K8S_POD_INFRA_CONTAINER_ID", pod.pod.as_str()),
        ("K8S_POD_UID", pod.uid.as_str()),
    ] {
        if value
            .chars()
            .any(|c| c == ';' || c == '=' || c.is_control())
        {
            let reason = format!("{value:?} has a character that CNI_ARGS cannot carry");
            return Err(Error::Pod {
                field: key.to_ascii_lowercase(),
                reason,
            });
        }
        text.push_str(&format!(";{key}={value}"));
    }
    Ok(text)
}

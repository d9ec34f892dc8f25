//! The node: Version, Status, RuntimeConfig, UpdateRuntimeConfig.

use std::collections::BTreeMap;
use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_supervisor::CgroupDriver;
use serde_json::json;
use tokio::runtime::Handle;
use tonic::Status;

use super::Runtime;
use crate::status::status;

/// Facts for Status that the daemon has and the supervisor has not.
#[derive(Clone)]
pub struct Conditions {
    /// The configuration in force, without secrets, for verbose Status.
    pub config: serde_json::Value,
    /// Why pods cannot be run now; `None` when they can.
    pub not_ready: Arc<dyn Fn() -> Option<String> + Send + Sync>,
}

pub fn version() -> cri::VersionResponse {
    cri::VersionResponse {
        // Of the CRI's version message, as the kubelet expects it.
        version: "0.1.0".to_owned(),
        runtime_name: "gantry".to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}

impl Runtime {
    pub(super) fn node_status(&self, verbose: bool) -> cri::StatusResponse {
        let settings = self.supervisor.settings();
        let condition = |kind: &str, problem: Option<(String, String)>| {
            let ready = problem.is_none();
            let (reason, message) = problem.unwrap_or_default();
            cri::RuntimeCondition {
                r#type: kind.to_owned(),
                status: ready,
                reason,
                message,
            }
        };
        let runtime = (self.conditions.not_ready)()
            .map(|message| ("RuntimeNotReady".to_owned(), message))
            .or_else(|| {
                let default = settings.handler("")?;
                let reason = default.features.unusable.clone()?;
                Some(("RuntimeHandlerUnusable".to_owned(), reason))
            });
        let network = self.supervisor.network();
        let network_problem = network
            .ready()
            .err()
            .map(|problem| (problem.reason, problem.message));

        let mut handlers: Vec<_> = settings
            .handlers
            .iter()
            .filter(|(_, handler)| handler.features.unusable.is_none())
            .map(|(name, handler)| (name.clone(), handler))
            .collect();
        // The empty name is the default handler, and the kubelet looks features up by it.
        if let Some(default) = settings
            .handler("")
            .filter(|h| h.features.unusable.is_none())
        {
            handlers.insert(0, (String::new(), default));
        }
        let mut info = BTreeMap::new();
        if verbose {
            info.insert("config".to_owned(), self.conditions.config.to_string());
            info.insert("cniconfig".to_owned(), network.describe().to_string());
            let load = match network.ready() {
                Ok(()) => "OK".to_owned(),
                Err(problem) => problem.message,
            };
            info.insert("lastCNILoadStatus".to_owned(), json!(load).to_string());
            let runtimes: BTreeMap<_, _> = settings
                .handlers
                .iter()
                .map(|(name, handler)| {
                    let facts = json!({
                        "path": handler.binary,
                        "version": handler.features.version,
                        "snapshotter": handler.snapshotter,
                        "unusable": handler.features.unusable,
                        "knownHoles": handler.features.known_holes,
                        "noUserNamespaces": handler.features.no_user_namespaces,
                    });
                    (name, facts)
                })
                .collect();
            info.insert("runtimes".to_owned(), json!(runtimes).to_string());
            // A number that only grows is a leak.
            let tasks = Handle::current().metrics().num_alive_tasks();
            info.insert("daemon".to_owned(), json!({ "tasks": tasks }).to_string());
        }
        cri::StatusResponse {
            status: Some(cri::RuntimeStatus {
                conditions: vec![
                    condition("RuntimeReady", runtime),
                    condition("NetworkReady", network_problem),
                ],
            }),
            info,
            runtime_handlers: handlers
                .into_iter()
                .map(|(name, handler)| cri::RuntimeHandler {
                    name,
                    features: Some(cri::RuntimeHandlerFeatures {
                        recursive_read_only_mounts: handler.features.recursive_read_only_mounts,
                        user_namespaces: handler.features.no_user_namespaces.is_none(),
                    }),
                })
                .collect(),
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: settings
                    .handlers
                    .values()
                    .any(|handler| handler.features.no_user_namespaces.is_none()),
            }),
        }
    }

    pub(super) fn cgroup_driver(&self) -> cri::RuntimeConfigResponse {
        let driver = match self.supervisor.settings().cgroups.driver {
            CgroupDriver::Systemd => cri::CgroupDriver::Systemd,
            CgroupDriver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
        };
        cri::RuntimeConfigResponse {
            linux: Some(cri::LinuxRuntimeConfiguration {
                cgroup_driver: driver.into(),
            }),
        }
    }

    pub(super) async fn set_pod_cidr(
        &self,
        request: cri::UpdateRuntimeConfigRequest,
    ) -> Result<cri::UpdateRuntimeConfigResponse, Status> {
        let network = request
            .runtime_config
            .and_then(|config| config.network_config);
        if let Some(network) = network.filter(|network| !network.pod_cidr.is_empty()) {
            self.supervisor
                .network()
                .update_pod_cidr(&network.pod_cidr)
                .await
                .map_err(status)?;
        }
        Ok(cri::UpdateRuntimeConfigResponse {})
    }
}
